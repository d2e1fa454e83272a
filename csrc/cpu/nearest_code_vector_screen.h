// The screen of nearest_code on ordinary vectors. Beside what nearest_code_search.h asks for, `struct Isa` holds
//
//   kBlocks          of kLanes codes; kRows by kBlocks is the register tile
//   kRegisters       vectors that the processor holds
//   kPairs           whether a step takes a pair of bfloat16 channels or one float channel
//   Codes            a step of kLanes codes: load_codes, spread (one row's step on all lanes),
//                    step(scores, x, codes) = scores + x * codes

namespace {

// Rows of a chunk as the screen keeps them, and their least scores.
class Screen {
 public:
  Screen(const Codebook& book, int64_t rows)
      : book_(book),
        rows_(rows),
        steps_(Isa::kPairs ? (book.channels + 1) / 2 : book.channels),
        negated_(rows * steps_) {}

  // Holds while rows are taken in and searched.
  struct Active {
    explicit Active(const Screen&) {}
  };

  // Take in kLanes rows of floats, to be numbered from n. Gives the squared lengths of the centred, scaled rows, and of
  // what rounding took from them.
  void round(const float* values, int64_t n, Scores& length, Scores& error) {
    length = error = Isa::fill(0);
    Words even = {};
    for (int64_t c = 0; c < book_.channels; ++c) {
      const Scores value = Isa::gather(values + c, book_.channels);
      const Scores x = (Isa::fill(book_.mean[c]) - value) * Isa::fill(book_.scale);
      length += x * x;
      Step* to = negated_.at((Isa::kPairs ? c / 2 : c) * rows_ + n);
      if (!Isa::kPairs) {
        Isa::store(reinterpret_cast<float*>(to), x);
        continue;
      }
      const Words kept = rounded_to_bfloat16(x);
      const Scores lost = x - (Scores)kept;
      error += lost * lost;
      if (c % 2 == 0) even = kept >> 16;
      const Words pair = c % 2 == 0 ? even : even | kept;  // an even channel stays alone if there is no odd one
      std::memcpy(to, &pair, sizeof pair);
    }
  }

  // Least scores in the classes of a tile, for kRows rows from n: kLanes floats a row, rows `stride` apart. `lowest` holds
  // their least so far, kLanes floats a row.
  void search(int64_t tile, int64_t n, float* minima, int64_t stride, float* lowest) const {
    constexpr int kBlocks = Isa::kBlocks;
    const Step* codes = static_cast<const Step*>(book_.screen) + tile * kClass * steps_ * kLanes;
    const float* norms = book_.half_norms + tile * kClass * kLanes;
    const Step* x = negated_.at(n);
    Scores least[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) least[r] = Isa::fill(kInfinity);
    for (int64_t block = 0; block < kClass; block += kBlocks) {
      Scores scores[kRows][kBlocks];
#pragma GCC unroll 16
      for (int j = 0; j < kBlocks; ++j) {
        const Scores norm = Isa::load(norms + (block + j) * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) scores[r][j] = norm;
      }
      const Step* code = codes + block * steps_ * kLanes;
      for (int64_t s = 0; s < steps_; ++s) {
        typename Isa::Codes step[kBlocks];
#pragma GCC unroll 16
        for (int j = 0; j < kBlocks; ++j) step[j] = Isa::load_codes(code + (j * steps_ + s) * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const auto value = Isa::spread(x + s * rows_ + r);
#pragma GCC unroll 16
          for (int j = 0; j < kBlocks; ++j) scores[r][j] = Isa::step(scores[r][j], value, step[j]);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int j = 0; j < kBlocks; ++j) least[r] = Isa::minimum(least[r], scores[r][j]);
      }
      // Where registers are few, minima go to memory; left to itself the compiler would send sums there.
      if (kRows * (kBlocks + 1) + kBlocks >= Isa::kRegisters) asm volatile("" : "+m"(least));
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      Isa::store(minima + r * stride, least[r]);
      Isa::store(lowest + r * kLanes, Isa::minimum(Isa::load(lowest + r * kLanes), least[r]));
    }
  }

 private:
  const Codebook& book_;
  const int64_t rows_, steps_;
  Buffer<Step> negated_;  // [steps][rows]
};

}  // namespace
