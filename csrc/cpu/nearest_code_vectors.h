// What the screen and the search of nearest_code share, compiled for one instruction set: see nearest_code_search.h.

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

constexpr float kInfinity = std::numeric_limits<float>::infinity();

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

}  // namespace
