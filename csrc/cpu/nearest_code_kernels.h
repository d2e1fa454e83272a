// The kernels of nearest_code (foreach_isa.h): rows and codes are screened by scores of bounded error, on vectors or on
// AMX's tiles, and what the screen leaves is decided by the definition.

#include "cpu/nearest_code_screen.h"

constexpr int kVectors = kClass / kLanes;  // of a class
// From this scale to its inverse, squares of distances are far from overflow and underflow.
constexpr float kPlainScale = 0x1p-30f;

// Rows go from input to indices in chunks.
template <typename T>
class Search final : public Searcher<T> {
 public:
  Search(const Codebook& book, int64_t capacity)
      : book_(book),
        capacity_(capacity),
        classes_(book.tiles * kLanes),
        minima_stride_(classes_ + kLanes),
        most_(classes_ / kFullScanShare + 4),
        screen_(book, capacity),
        values_(capacity * book.channels),
        slack_(capacity),
        least_(capacity * kLanes),
        minima_(capacity * minima_stride_),
        first_(capacity + 1),
        candidates_(capacity * most_ + classes_ + kLanes),
        near_(capacity * most_ * kClass),
        undecided_(capacity) {}

  int64_t search(const Rows<T>& rows, int64_t begin, int64_t end, int64_t* indices) override {
    const typename Screen::Active active(screen_);
    int64_t full_scans = 0;
    for (int64_t n = begin; n < end; n += capacity_) {
      full_scans += search_chunk(rows, n, smaller(capacity_, end - n), indices + (n - begin));
    }
    return full_scans;
  }

 private:
  int64_t search_chunk(const Rows<T>& rows, int64_t begin, int64_t count, int64_t* indices) {
    const int64_t padded = round_up(count, kPadding);
    read(rows, begin, count, padded);
    for (int64_t n = 0; n < padded; n += kLanes) centre(n);
    for (int64_t i = 0; i < padded; ++i) Isa::store(least_.at(i * kLanes), Isa::fill(kInfinity));
    for (int64_t tile = 0; tile < book_.tiles; ++tile) {
      for (int64_t n = 0; n < padded; n += kRows) {
        float* minima = minima_.at(n * minima_stride_ + tile * kLanes);
        screen_.search(tile, n, minima, minima_stride_, least_.at(n * kLanes));
      }
    }
    // One stage after the other for all rows: a stage's rows do not wait for each other.
    first_[0] = 0;
    for (int64_t n = 0; n < count; ++n) first_[n + 1] = first_[n] + collect(n, candidates_.at(first_[n]));
    if (book_.cosine) {
      for (int64_t n = 0; n < count; ++n) indices[n] = by_definition(n);
    } else {
      const bool plain = kPlainScale <= book_.scale && book_.scale <= 1 / kPlainScale;
      for (int64_t n = 0; n < count; ++n) plain ? measure<false>(n) : measure<true>(n);
      for (int64_t n = 0; n < count; ++n) indices[n] = nearest(n);
    }
    int64_t full_scans = 0;
    for (int64_t n = 0; n < count; ++n) {
      if (!undecided_[n]) continue;
      full_scans += finite(n);
      indices[n] = finite(n) ? anywhere(n) : 0;
    }
    return full_scans;
  }

  // Rows as given; zeros for padding.
  void read(const Rows<T>& rows, int64_t begin, int64_t count, int64_t padded) {
    const int64_t channels = book_.channels, stride = rows.channel_stride, area = rows.height * rows.width;
    int64_t x = begin % rows.width, y = begin % area / rows.width;
    const T* map = rows.data + begin / area * rows.map_stride;
    for (int64_t n = 0; n < count; ++n) {
      const T* from = map + y * rows.y_stride + x * rows.x_stride;
      float* to = values_.at(n * channels);
      if (stride == 1) {
        for (int64_t c = 0; c < channels; ++c) to[c] = wide(from[c]);
      } else {
        for (int64_t c = 0; c < channels; ++c) to[c] = wide(from[c * stride]);
      }
      if (++x < rows.width) continue;
      x = 0;
      if (++y < rows.height) continue;
      y = 0;
      map += rows.map_stride;
    }
    std::memset(values_.at(count * channels), 0, static_cast<size_t>((padded - count) * channels) * sizeof(float));
  }

  // The slack of kLanes rows, which the screen rounds. A row beyond the range of the bound gets the slack -1.
  void centre(int64_t n) {
    Scores length, error;
    screen_.round(values_.at(n * book_.channels), n, length, error);
    Isa::store(slack_.at(n), slack_of(length, error));
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

  // List every class that may hold the row's nearest code, in ascending order; how many there are. Rows that the screen
  // cannot decide get none.
  int64_t collect(int64_t n, int* to) {
    const float* minima = minima_.at(n * minima_stride_);
    const float lowest = Isa::lowest(Isa::load(least_.at(n * kLanes)));
    const float limit = lowest + slack_[n] + 0x1p-22f * std::abs(lowest);
    const int64_t listed = Isa::list_at_most(minima, classes_, limit, to);
    undecided_[n] = !(slack_[n] >= 0 && limit < kInfinity && listed <= most_);
    return undecided_[n] ? 0 : listed;
  }

  // Distances in float32 to the codes of the row's candidates. Their error is relative, as they add only what is not
  // negative. Values far from the order of one are scaled: by one factor before the difference, which could overflow, and
  // by one after it.
  template <bool kScaled>
  void measure(int64_t n) {
    const float before = book_.scale < 1 ? book_.scale : 1, after = book_.scale < 1 ? 1 : book_.scale;
    const float* value = values_.at(n * book_.channels);
    for (int64_t i = first_[n]; i < first_[n + 1]; ++i) {
      const float* codes = static_cast<const float*>(book_.exact) + candidates_[i] * book_.channels * kClass;
      const auto add_square = [&](Scores& total, int64_t c, int v) {
        const Scores code = Isa::load(codes + c * kClass + v * kLanes);
        const Scores apart = kScaled ? (value[c] * before - code * before) * after : value[c] - code;
        total = Isa::fused(apart, apart, total);
      };
      Scores even[kVectors] = {}, odd[kVectors] = {};  // channels apart: half as long to wait for the sum
      for (int64_t c = 0; c + 1 < book_.channels; c += 2) {
        for (int v = 0; v < kVectors; ++v) {
          add_square(even[v], c, v);
          add_square(odd[v], c + 1, v);
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        if (book_.channels % 2 != 0) add_square(even[v], book_.channels - 1, v);
        Isa::store(near_.at(i * kClass + v * kLanes), even[v] + odd[v]);
      }
    }
  }

  // The code of least distance. Mostly float32 leaves one; the definition decides the others.
  int64_t nearest(int64_t n) {
    const int64_t first = first_[n] * kVectors, last = first_[n + 1] * kVectors;
    Scores least = Isa::fill(kInfinity);
    for (int64_t i = first; i < last; ++i) least = Isa::minimum(least, Isa::load(near_.at(i * kLanes)));
    const float relative = 1.0f + static_cast<float>(book_.channels + 4) * 0x1p-22f;
    const float limit = Isa::lowest(least) * relative + 0x1p-100f;
    int finalists = 0;
    int64_t index = 0;
    for (int64_t i = first; i < last; ++i) {
      const uint32_t kept = Isa::at_most(Isa::load(near_.at(i * kLanes)), limit);
      finalists += __builtin_popcount(kept);
      if (kept != 0) index = candidates_[i / kVectors] * kClass + i % kVectors * kLanes + __builtin_ctz(kept);
    }
    return finalists == 1 ? index : by_definition(n);
  }

  struct Winner {
    double distance = kInfinity;
    int64_t index = 0;
  };

  // The same from the definition alone: among the candidates, and among all codes.
  int64_t by_definition(int64_t n) {
    Winner winner;
    for (int64_t i = first_[n]; i < first_[n + 1]; ++i) check(n, candidates_[i], winner);
    return winner.index;
  }
  int64_t anywhere(int64_t n) {
    Winner winner;
    for (int64_t number = 0; number * kClass < book_.codes; ++number) check(n, number, winner);
    return winner.index;
  }

  // The distances of the definition between a row and a class, channel by channel in float64.
  void check(int64_t n, int64_t number, Winner& winner) {
    const float* value = values_.at(n * book_.channels);
    const int64_t offset = number * book_.channels * kClass;
    Doubles total[2 * kVectors] = {};
    if (book_.cosine) {
      const double* codes = static_cast<const double*>(book_.exact) + offset;
      for (int64_t c = 0; c < book_.channels; ++c) {
        for (int v = 0; v < 2 * kVectors; ++v) {
          total[v] -= static_cast<double>(value[c]) * Isa::widen(codes + c * kClass + v * kLanes / 2);
        }
      }
    } else {
      const float* codes = static_cast<const float*>(book_.exact) + offset;
      for (int64_t c = 0; c < book_.channels; ++c) {
        for (int v = 0; v < 2 * kVectors; ++v) {
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
  // Rows of minima are a vector apart beside their length, or a tile's would all fall into the same cache sets.
  const int64_t capacity_, classes_, minima_stride_, most_;
  Screen screen_;
  Buffer<float> values_;    // [rows][C], as given
  Buffer<float> slack_;     // [rows]
  Buffer<float> least_;     // [rows][kLanes], of the minima
  Buffer<float> minima_;    // [rows][classes], padded
  Buffer<int64_t> first_;   // [rows + 1], of a row's candidates
  Buffer<int> candidates_;  // numbers of classes
  Buffer<float> near_;      // [candidates][kClass], distances in float32
  Buffer<bool> undecided_;  // [rows]
};

template <typename T>
Searcher<T>* make_searcher(const Codebook& book, int64_t rows) {
  const int64_t row_bytes = book.tiles * kLanes * static_cast<int64_t>(sizeof(float));
  const int64_t fitting = kMinimaBytes / row_bytes / kPadding * kPadding;
  const int64_t wanted = smaller(round_up(rows, kPadding), kMostRows);
  return new Search<T>(book, fitting < kPadding ? kPadding : smaller(fitting, wanted));
}

template <typename T>
constexpr Kernels<T> kKernels{
#if defined(HITSR_TILES)
    {kLanes, steps_of, true},
#else
    {kLanes, steps_of, Isa::kPairs},
#endif
    make_searcher<T>};
