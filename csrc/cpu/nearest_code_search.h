// The search of nearest_code, once for each instruction set: a file that includes this defines, in a namespace of its
// own and compiled for that instruction set, `struct Isa`:
//
//   kLanes           floats in a vector, at most kClass
//   kRows, kBlocks   the screen's register tile: rows by blocks of kLanes codes
//   kPairs           whether a step takes a pair of bfloat16 channels or one float channel
//   Scores, Doubles  vectors of kLanes floats, of kLanes / 2 doubles
//   Codes            a step of kLanes codes: load_codes, spread (one row's step on all lanes),
//                    step(scores, x, codes) = scores + x * codes
//   and the small functions of plain_lanes.h.
//
// Everything here has internal linkage, and nothing is a template of the standard library: the linker would keep one
// copy of a shared function, perhaps that of an instruction set which the processor lacks.

namespace {

using Scores = typename Isa::Scores;
using Doubles = typename Isa::Doubles;
typedef uint32_t Words __attribute__((vector_size(sizeof(Scores))));
using Step = uint32_t;  // a float's bits, or two bfloat16, the even channel below

constexpr int64_t kLanes = Isa::kLanes, kRows = Isa::kRows;
// Rows are padded to whole vectors and whole register tiles.
constexpr int64_t kPadding = kRows % 3 == 0 ? 3 * kLanes : kLanes;
static_assert(kPadding % kRows == 0 && kPadding % kLanes == 0);
constexpr int64_t kMostRows = 96;
// A chunk's minima stay in the second-level cache.
constexpr int64_t kMinimaBytes = 256 * 1024;
// Beyond this share of the classes, searching the whole codebook is as quick.
constexpr int64_t kFullScanShare = 4;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// What the screen's number format keeps of a value: for pairs, the nearest bfloat16 (ties to even).
inline Words rounded(Scores value) {
  const Words words = (Words)value;
  return Isa::kPairs ? (words + 0x7fffu + ((words >> 16) & 1u)) & 0xffff0000u : words;
}

// Uninitialised memory for `size` elements, on a cache line.
template <typename E>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<E*>(std::aligned_alloc(64, (static_cast<size_t>(size) * sizeof(E) + 63) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  E* at(int64_t i) { return data_ + i; }
  const E* at(int64_t i) const { return data_ + i; }
  E& operator[](int64_t i) { return data_[i]; }

 private:
  E* data_;
};

struct Candidate {
  int row, number;  // of the class
};

// A chunk of rows of one group, from input to indices.
template <typename T>
class Chunk {
 public:
  Chunk(const Codebook& book, const Rows<T>& rows, int64_t capacity)
      : book_(book),
        rows_(rows),
        capacity_(capacity),
        steps_(Isa::kPairs ? (book.channels + 1) / 2 : book.channels),
        classes_(book.tiles * kLanes),
        minima_stride_(classes_ + kLanes),
        most_(classes_ / kFullScanShare + 4),
        values_(capacity * book.channels),
        negated_(capacity * steps_),
        slack_(capacity),
        minima_(capacity * minima_stride_),
        candidates_(capacity * most_),
        near_(capacity * most_ * kClass),
        nearest_(capacity),
        finalists_(capacity),
        needs_full_scan_(capacity) {}

  FullScans search(int64_t begin, int64_t count, int64_t* indices) {
    const int64_t padded = round_up(count, kPadding);
    read(begin, count, padded);
    for (int64_t n = 0; n < padded; n += kLanes) centre(n);
    for (int64_t tile = 0; tile < book_.tiles; ++tile) {
      for (int64_t n = 0; n < padded; n += kRows) screen(tile, n);
    }
    const int64_t candidates = collect(count);
    book_.cosine ? decide_by_definition(candidates, indices) : decide(candidates, count, indices);
    FullScans full_scans = 0;
    for (int64_t n = 0; n < count; ++n) {
      if (!needs_full_scan_[n]) continue;
      if (!finite(n)) {
        indices[n] = 0;
        continue;
      }
      ++full_scans;
      Winner winner;
      for (int64_t k = 0; k * kClass < book_.codes; ++k) check(n, k, winner);
      indices[n] = winner.index;
    }
    return full_scans;
  }

 private:
  // Rows as given; zeros for padding.
  void read(int64_t begin, int64_t count, int64_t padded) {
    const int64_t channels = book_.channels, stride = rows_.channel_stride;
    int64_t place = begin % rows_.inner;
    const T* from = rows_.data + begin / rows_.inner * rows_.outer_stride + place * rows_.row_stride;
    for (int64_t n = 0; n < count; ++n) {
      float* to = values_.at(n * channels);
      if (stride == 1) {
        for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<float>(from[c]);
      } else {
        for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<float>(from[c * stride]);
      }
      from += rows_.row_stride;
      if (++place == rows_.inner) {
        place = 0;
        from += rows_.outer_stride - rows_.inner * rows_.row_stride;
      }
    }
    std::memset(values_.at(count * channels), 0, static_cast<size_t>((padded - count) * channels) * sizeof(float));
  }

  // The negated steps and the slack of kLanes rows. A row beyond the range of the bound gets the slack -1.
  void centre(int64_t n) {
    Scores length = Isa::fill(0), error = Isa::fill(0);
    Words even = {};
    for (int64_t c = 0; c < book_.channels; ++c) {
      const Scores value = Isa::gather(values_.at(n * book_.channels + c), book_.channels);
      const Scores x = (Isa::fill(book_.mean[c]) - value) * Isa::fill(book_.scale);
      const Words kept = rounded(x);
      const Scores lost = x - (Scores)kept;
      length += x * x;
      error += lost * lost;
      Step* to = negated_.at((Isa::kPairs ? c / 2 : c) * capacity_ + n);
      if (!Isa::kPairs) {
        std::memcpy(to, &kept, sizeof kept);
      } else if (c % 2 == 0) {
        even = kept >> 16;
        std::memcpy(to, &even, sizeof even);  // to stay if there is no odd channel
      } else {
        const Words pair = even | kept;
        std::memcpy(to, &pair, sizeof pair);
      }
    }
    const Scores slack = slack_of(length, error);
    Isa::store(slack_.at(n), slack);
  }

  // The bound of docs/ops/nearest_code.md, twice, from the squared lengths of rows and of what rounding took.
  Scores slack_of(Scores squared_length, Scores squared_error) const {
    constexpr float kUp = 1.0f + 0x1p-10f;  // over the rounding of these very lines
    const float rounding = static_cast<float>(book_.channels + 4) * 0x1p-23f;
    const float definition = static_cast<float>(book_.channels + 4) * 0x1p-52f;
    const Scores length = Isa::root(squared_length) * kUp;
    const Scores error = (Isa::root(squared_error) + 0x1p-23f * length) * kUp;
    const Scores reach = length + book_.longest;
    const Scores split = error * book_.longest + (length + error) * book_.longest_error;
    const Scores summed = rounding * (reach * book_.longest + 0x1p-100f);
    const Scores whole = length + book_.longest_given;
    const Scores slack = 2 * kUp * (split + summed + definition * whole * whole);
    return squared_length < 0x1p100f ? slack : Isa::fill(-1);  // NaN is not below
  }

  // Least scores in the classes of a tile, for kRows rows.
  void screen(int64_t tile, int64_t n) {
    constexpr int kBlocks = Isa::kBlocks;
    const Step* codes = static_cast<const Step*>(book_.screen) + tile * kClass * steps_ * kLanes;
    const float* norms = book_.half_norms + tile * kClass * kLanes;
    const Step* x = negated_.at(n);
    Scores least[kRows];
    for (auto& scores : least) scores = Isa::fill(std::numeric_limits<float>::infinity());
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
          const auto value = Isa::spread(x + s * capacity_ + r);
#pragma GCC unroll 16
          for (int j = 0; j < kBlocks; ++j) scores[r][j] = Isa::step(scores[r][j], value, step[j]);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int j = 0; j < kBlocks; ++j) least[r] = Isa::minimum(least[r], scores[r][j]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) Isa::store(minima_.at((n + r) * minima_stride_ + tile * kLanes), least[r]);
  }

  // List every class that may hold a row's nearest code: rows, and classes of a row, in ascending order.
  int64_t collect(int64_t count) {
    constexpr int64_t kWord = 64;
    int64_t listed = 0;
    for (int64_t n = 0; n < count; ++n) {
      const float* minima = minima_.at(n * minima_stride_);
      Scores least = Isa::load(minima);
      for (int64_t k = kLanes; k < classes_; k += kLanes) least = Isa::minimum(least, Isa::load(minima + k));
      const float lowest = Isa::lowest(least);
      const float limit = lowest + slack_[n] + 0x1p-22f * std::abs(lowest);
      const int64_t first = listed;
      bool full = !(slack_[n] >= 0 && limit < std::numeric_limits<float>::infinity());
      for (int64_t k = 0; k < classes_ && !full; k += kWord) {
        uint64_t kept = 0;
        for (int64_t l = 0; l < smaller(kWord, classes_ - k); l += kLanes) {
          kept |= static_cast<uint64_t>(Isa::at_most(Isa::load(minima + k + l), limit)) << l;
        }
        full = listed - first + __builtin_popcountll(kept) > most_;
        for (; kept != 0 && !full; kept &= kept - 1) {
          candidates_[listed++] = {static_cast<int>(n), static_cast<int>(k + __builtin_ctzll(kept))};
        }
      }
      needs_full_scan_[n] = full;
      if (full) listed = first;
    }
    return listed;
  }

  // The nearest code of each row, from the classes that are left. Distances in float32 have a relative error, as
  // they add only what is not negative, and leave one code in nearly every case; the definition decides the others.
  void decide(int64_t candidates, int64_t count, int64_t* indices) {
    constexpr int kVectors = kClass / kLanes;
    // The scale in two factors: one before the difference, which could overflow, and one after it.
    const float before = book_.scale < 1 ? book_.scale : 1, after = book_.scale < 1 ? 1 : book_.scale;
    for (int64_t n = 0; n < count; ++n) {
      nearest_[n] = std::numeric_limits<float>::infinity();
      finalists_[n] = 0;
    }
    for (int64_t i = 0; i < candidates; ++i) {
      const auto [n, number] = candidates_[i];
      const float* value = values_.at(n * book_.channels);
      const float* codes = static_cast<const float*>(book_.exact) + number * book_.channels * kClass;
      Scores total[kVectors] = {};
      for (int64_t c = 0; c < book_.channels; ++c) {
        for (int v = 0; v < kVectors; ++v) {
          const Scores code = Isa::load(codes + c * kClass + v * kLanes);
          const Scores apart = (value[c] * before - code * before) * after;
          total[v] += apart * apart;
        }
      }
      Scores least = total[0];
      for (int v = 0; v < kVectors; ++v) {
        Isa::store(near_.at(i * kClass + v * kLanes), total[v]);
        least = Isa::minimum(least, total[v]);
      }
      const float lowest = Isa::lowest(least);
      nearest_[n] = lowest < nearest_[n] ? lowest : nearest_[n];
    }
    const float relative = 1.0f + static_cast<float>(book_.channels + 4) * 0x1p-22f;
    for (int64_t i = 0; i < candidates; ++i) {
      const auto [n, number] = candidates_[i];
      const float limit = nearest_[n] * relative + 0x1p-100f;
      for (int v = 0; v < kVectors; ++v) {
        for (uint32_t kept = Isa::at_most(Isa::load(near_.at(i * kClass + v * kLanes)), limit); kept != 0;
             kept &= kept - 1) {
          const int64_t k = number * kClass + v * kLanes + __builtin_ctz(kept);
          if (k >= book_.codes) break;
          indices[n] = k;
          ++finalists_[n];
        }
      }
    }
    for (int64_t i = 0; i < candidates; ++i) {
      if (finalists_[candidates_[i].row] != 1) return decide_by_definition(candidates, indices);
    }
  }

  struct Winner {
    double distance = std::numeric_limits<double>::infinity();
    int64_t index = 0;
  };

  // The same from the definition alone, for the rows that are not decided yet.
  void decide_by_definition(int64_t candidates, int64_t* indices) {
    Winner winner;
    for (int64_t i = 0; i < candidates; ++i) {
      const int n = candidates_[i].row;
      if (i == 0 || candidates_[i - 1].row != n) winner = Winner{};
      if (!book_.cosine && finalists_[n] == 1) continue;
      check(n, candidates_[i].number, winner);
      indices[n] = winner.index;
    }
  }

  // The distances of the definition between a row and a class, channel by channel in float64.
  void check(int64_t n, int64_t number, Winner& winner) {
    const float* value = values_.at(n * book_.channels);
    const int64_t offset = number * book_.channels * kClass;
    constexpr int kVectors = 2 * kClass / kLanes;
    Doubles total[kVectors] = {};
    if (book_.cosine) {
      const double* codes = static_cast<const double*>(book_.exact) + offset;
      for (int64_t c = 0; c < book_.channels; ++c) {
        for (int v = 0; v < kVectors; ++v) {
          total[v] -= static_cast<double>(value[c]) * Isa::widen(codes + c * kClass + v * kLanes / 2);
        }
      }
    } else {
      const float* codes = static_cast<const float*>(book_.exact) + offset;
      for (int64_t c = 0; c < book_.channels; ++c) {
        for (int v = 0; v < kVectors; ++v) {
          const Doubles apart = static_cast<double>(value[c]) - Isa::widen(codes + c * kClass + v * kLanes / 2);
          total[v] += apart * apart;
        }
      }
    }
    double distance[kClass];
    std::memcpy(distance, total, sizeof distance);
    for (int64_t l = 0; l < smaller(kClass, book_.codes - number * kClass); ++l) {
      if (distance[l] < winner.distance) winner = {distance[l], number * kClass + l};
    }
  }

  bool finite(int64_t n) {
    for (int64_t c = 0; c < book_.channels; ++c) {
      if (!std::isfinite(values_[n * book_.channels + c])) return false;
    }
    return true;
  }

  const Codebook& book_;
  const Rows<T>& rows_;
  // Rows of minima are a vector apart beside their length, or a tile's would all fall into the same cache sets.
  const int64_t capacity_, steps_, classes_, minima_stride_, most_;
  Buffer<float> values_;          // [rows][C], as given
  Buffer<Step> negated_;          // [steps][rows]
  Buffer<float> slack_;           // [rows]
  Buffer<float> minima_;          // [rows][classes], padded
  Buffer<Candidate> candidates_;
  Buffer<float> near_;            // [candidates][kClass], distances in float32
  Buffer<float> nearest_;         // [rows], the least of them
  Buffer<int> finalists_;         // [rows], codes that float32 cannot tell from the nearest
  Buffer<bool> needs_full_scan_;  // [rows]
};

}  // namespace

template <typename T>
FullScans search(const Codebook& book, const Rows<T>& rows, int64_t begin, int64_t end, int64_t* indices) {
  const int64_t row_bytes = book.tiles * kLanes * static_cast<int64_t>(sizeof(float));
  const int64_t fitting = kMinimaBytes / row_bytes / kPadding * kPadding;
  const int64_t wanted = smaller(round_up(end - begin, kPadding), kMostRows);
  const int64_t capacity = fitting < kPadding ? kPadding : smaller(fitting, wanted);
  Chunk<T> chunk(book, rows, capacity);
  FullScans full_scans = 0;
  for (int64_t n = begin; n < end; n += capacity) {
    full_scans += chunk.search(n, smaller(capacity, end - n), indices + (n - begin));
  }
  return full_scans;
}

template FullScans search(const Codebook&, const Rows<float>&, int64_t, int64_t, int64_t*);
template FullScans search(const Codebook&, const Rows<c10::Half>&, int64_t, int64_t, int64_t*);
template FullScans search(const Codebook&, const Rows<c10::BFloat16>&, int64_t, int64_t, int64_t*);
