// nearest_code on AMX with BF16: the scores of 16 rows and 16 codes in one instruction for 32 channels.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/nearest_code.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,popcnt,amx-tile,amx-bf16")
namespace hitsr_fast::nearest::amx_bf16 {
namespace {

#include "cpu/avx512.h"

struct Isa : Avx512 {
  static constexpr int kRows = 16;
};

}  // namespace
#include "cpu/nearest_code_vectors.h"
namespace {

class Screen {
 public:
  Screen(const Codebook& book, int64_t rows)
      : book_(book),
        steps_(tile_steps(book.channels)),
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

}  // namespace
#include "cpu/nearest_code_search.h"
}  // namespace hitsr_fast::nearest::amx_bf16
HITSR_TARGET_END
#endif
