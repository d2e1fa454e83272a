// The screen of nearest_code, on vectors or on AMX's tiles: scores of bounded error, and their least for each class of
// codes. Part of nearest_code_kernels.h.

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

// Uninitialised memory for `size` elements, on a cache line. Not buffer.h's, of which the linker keeps one copy for all
// instruction sets.
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
