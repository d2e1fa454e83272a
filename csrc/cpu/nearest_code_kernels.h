// The kernels of nearest_code (foreach_isa.h): rows and codes are screened by scores of bounded error, on vectors or on
// AMX's tiles, and what the screen leaves is decided by the definition.

// What a set's screen is made of.
#if defined(HITSR_TILES)
struct Isa : Vectors {
  static constexpr int kRows = 16;  // that the screen takes at a time
};

// A tile register holds this many pairs of channels. More channels come in whole tiles.
constexpr int64_t kTileSteps = 16;

constexpr int64_t steps_of(int64_t channels) {
  const int64_t steps = (channels + 1) / 2;
  return steps <= kTileSteps ? steps : (steps + kTileSteps - 1) / kTileSteps * kTileSteps;
}
#else
// kRows by kBlocks of kLanes codes is the register tile. A step of kLanes codes, a pair of bfloat16 channels or one
// float channel, is loaded, or one row's is spread on all lanes; step(scores, x, codes) = scores + x * codes.
struct Isa : Vectors {
#if defined(HITSR_PAIRS)
  static constexpr bool kPairs = true;
  using Codes = __m512bh;
  static Codes load_codes(const uint32_t* from) { return (Codes)_mm512_loadu_si512(from); }
  static Codes spread(const uint32_t* from) { return (Codes)_mm512_set1_epi32(static_cast<int>(*from)); }
  static Scores step(Scores scores, Codes x, Codes codes) { return _mm512_dpbf16_ps(scores, x, codes); }
#else
  static constexpr bool kPairs = false;
  using Codes = Scores;
  static Codes load_codes(const uint32_t* from) { return load(reinterpret_cast<const float*>(from)); }
  static Codes spread(const uint32_t* from) { return fill(*reinterpret_cast<const float*>(from)); }
  static Scores step(Scores scores, Codes x, Codes codes) { return fused(x, codes, scores); }
#endif
  static constexpr int kRows = kLanes == 8 ? 6 : kRegisters / 4, kBlocks = 2;
};

constexpr int64_t steps_of(int64_t channels) { return Isa::kPairs ? (channels + 1) / 2 : channels; }
#endif

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

constexpr float kInfinity = __builtin_inff();

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// The nearest bfloat16 (ties to even), as a float's bits.
inline Words rounded_to_bfloat16(Scores value) {
  const Words words = (Words)value;
  return (words + 0x7fffu + ((words >> 16) & 1u)) & 0xffff0000u;
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

#if defined(HITSR_TILES)
// The scores of 16 rows and 16 codes in one instruction for 32 channels.
class Screen {
 public:
  Screen(const Codebook& book, int64_t rows)
      : book_(book),
        steps_(steps_of(book.channels)),
        stride_(smaller(steps_, kTileSteps)),
        negated_(rows * steps_) {}

  // Tiles are this thread's, and are shaped for these steps.
  struct Active {
    explicit Active(const Screen& screen) { screen.configure(); }
    ~Active() { _tile_release(); }
    Active(const Active&) = delete;
    Active& operator=(const Active&) = delete;
  };

  void round(const float* values, int64_t n, Scores& length, Scores& error) {
    float lengths[kLanes], errors[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      round_row(values + r * book_.channels, negated_.at(n * steps_ + r * stride_), lengths[r], errors[r]);
    }
    length = Isa::load(lengths);
    error = Isa::load(errors);
  }

  void search(int64_t tile, int64_t n, float* minima, int64_t stride, float* lowest) const {
    const Step* codes = static_cast<const Step*>(book_.screen) + tile * kClass * steps_ * kLanes;
    const float* norms = book_.half_norms + tile * kClass * kLanes;
    const Step* x = negated_.at(n * steps_);
    alignas(64) float products[2][2][kRows * kLanes];
    Scores least[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) least[r] = Isa::fill(kInfinity);
    asm volatile("" ::: "memory");  // what the tiles load has been stored
    if (steps_ <= kTileSteps) _tile_loadd(2, x, stride_ * 4);
    multiply(codes, x);
    _tile_stored(0, products[0][0], kLanes * 4);
    _tile_stored(1, products[0][1], kLanes * 4);
#pragma GCC unroll 8
    for (int64_t block = 0; block < kClass; block += 2) {
      // The tiles work on the next blocks while vectors take the minima of these.
      if (block + 2 < kClass) multiply(codes + (block + 2) * steps_ * kLanes, x);
      const auto& current = products[block / 2 % 2];
      auto& next = products[1 - block / 2 % 2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const Scores norm = Isa::load(norms + (block + j) * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          least[r] = Isa::minimum(least[r], norm + Isa::load(current[j] + r * kLanes));
        }
      }
      if (block + 2 < kClass) {
        _tile_stored(0, next[0], kLanes * 4);
        _tile_stored(1, next[1], kLanes * 4);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      Isa::store(minima + r * stride, least[r]);
      Isa::store(lowest + r * kLanes, Isa::minimum(Isa::load(lowest + r * kLanes), least[r]));
    }
  }

 private:
  // Tile registers, whose numbers must be literals: 0 and 1 scores of an even and an odd block, 2 rows, 3 and 4 codes.
  void configure() const {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const auto steps = static_cast<uint8_t>(stride_);
    for (int tile = 0; tile < 5; ++tile) {
      config.rows[tile] = tile < 3 ? kRows : steps;
      config.row_bytes[tile] = tile == 2 ? 4 * steps : 64;
    }
    _tile_loadconfig(&config);
  }

  // Tiles 0 and 1: products of the rows with two blocks of codes.
  void multiply(const Step* codes, const Step* x) const {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t s = 0; s < steps_; s += kTileSteps) {
      if (steps_ > kTileSteps) _tile_loadd(2, x + s * kRows, stride_ * 4);
      _tile_loadd(3, codes + s * kLanes, kLanes * 4);
      _tile_dpbf16ps(0, 2, 3);
      _tile_loadd(4, codes + (steps_ + s) * kLanes, kLanes * 4);
      _tile_dpbf16ps(1, 2, 4);
    }
  }

  // A row, centred, scaled, negated and rounded: tiles of kTileSteps steps, kRows rows apart in memory.
  void round_row(const float* values, Step* to, float& length, float& error) const {
    Scores lengths = Isa::fill(0), errors = Isa::fill(0);
    const int64_t padded = 2 * steps_;
    for (int64_t c = 0; c < padded; c += kLanes) {
      const int64_t left = book_.channels - c;
      const auto given = static_cast<__mmask16>(left >= kLanes ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
      const Scores value = _mm512_maskz_loadu_ps(given, values + c), mean = _mm512_maskz_loadu_ps(given, book_.mean + c);
      const Scores x = (mean - value) * Isa::fill(book_.scale);
      const Words kept = rounded_to_bfloat16(x);
      const Scores lost = x - (Scores)kept;
      lengths += x * x;
      errors += lost * lost;
      Step* tile = to + c / 2 / kTileSteps * kTileSteps * kRows + c / 2 % kTileSteps;
      const __m256i halves = _mm512_cvtepi32_epi16((__m512i)(kept >> 16));
      const auto stored = static_cast<__mmask8>(padded - c >= kLanes ? 0xff : (1 << (padded - c) / 2) - 1);
      _mm256_mask_storeu_epi32(tile, stored, halves);
    }
    length = _mm512_reduce_add_ps(lengths);
    error = _mm512_reduce_add_ps(errors);
  }

  const Codebook& book_;
  const int64_t steps_, stride_;
  Buffer<Step> negated_;  // [rows / kRows][steps / kTileSteps][kRows][kTileSteps]
};

#else
// Rows of a chunk as the screen keeps them, and their least scores.
class Screen {
 public:
  Screen(const Codebook& book, int64_t rows)
      : book_(book),
        rows_(rows),
        steps_(steps_of(book.channels)),
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
#endif

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
