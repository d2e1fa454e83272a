// How the programs that run kernels on the CPU read their problem and leave their results; host_kernel.py is the other
// side.
#pragma once

#include <cstdio>
#include <deque>
#include <fstream>
#include <stdexcept>
#include <vector>

#include "../../csrc/block/block.h"

class Reader {
 public:
  explicit Reader(const char* path) : file_(path, std::ios::binary) {}

  // Aligned as a GPU's allocations are.
  template <class T>
  const T* take(size_t count) {
    using Word = hitsr_fast::block::Word4;
    kept_.emplace_back((count * sizeof(T) + sizeof(Word) - 1) / sizeof(Word));
    file_.read(reinterpret_cast<char*>(kept_.back().data()), static_cast<std::streamsize>(count * sizeof(T)));
    if (!file_) throw std::runtime_error("the problem file is too short");
    return reinterpret_cast<const T*>(kept_.back().data());
  }

 private:
  std::ifstream file_;
  std::deque<std::vector<hitsr_fast::block::Word4>> kept_;
};

template <class T>
void write(std::ofstream& file, const std::vector<T>& values) {
  file.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
}

// main() of such a program.
inline int solve_files(int count, char** paths, void (*solve)(const char* from, const char* to)) {
  if (count != 3) {
    std::fprintf(stderr, "usage: %s PROBLEM RESULT\n", paths[0]);
    return 2;
  }
  solve(paths[1], paths[2]);
  return 0;
}
