// What needs no special instruction, on the compiler's own vectors of kPlainLanes floats; included inside the namespace
// of its user.
struct PlainLanes {
  static constexpr int kLanes = kPlainLanes, kRegisters = 16;
  typedef float Scores __attribute__((vector_size(4 * kPlainLanes)));
  typedef double Doubles __attribute__((vector_size(4 * kPlainLanes)));
  typedef uint32_t Words __attribute__((vector_size(4 * kPlainLanes)));

  static Scores load(const float* from) {
    Scores values;
    std::memcpy(&values, from, sizeof values);
    return values;
  }
  static void store(float* to, Scores values) { std::memcpy(to, &values, sizeof values); }
  static Scores fill(float value) { return value - Scores{}; }
  static Scores minimum(Scores a, Scores b) { return a < b ? a : b; }
  static Scores maximum(Scores a, Scores b) { return a > b ? a : b; }
  static Scores fused(Scores a, Scores b, Scores c) { return a * b + c; }  // may round once or twice
  static float fused(float a, float b, float c) { return a * b + c; }  // fmaf could be a call
  template <bool kPrecise, typename T>
  static T quotient(T a, T b) {
    return a / b;
  }

  static Scores root(Scores values) {
    for (int l = 0; l < kLanes; ++l) values[l] = std::sqrt(values[l]);
    return values;
  }

  // What is above the next integer below, in [0, 1]; and a times 2 to that integer, from -126 to 127. The two agree on
  // which that is where the values are close to one.
  static Scores fraction(Scores values) { return values - (integer(values) - kShifter); }
  static Scores times_power_of_two(Scores a, Scores power) {
    return a * (Scores)(((Words)integer(power) << 23) + 0x3f800000u);
  }

  static float lowest(Scores values) {
    float least = values[0];
    for (int l = 1; l < kLanes; ++l) least = values[l] < least ? values[l] : least;
    return least;
  }

  static Scores gather(const float* from, int64_t stride) {
    Scores values;
    for (int l = 0; l < kLanes; ++l) values[l] = from[l * stride];
    return values;
  }

  // Bit l is set where lane l is not above the limit.
  static uint32_t at_most(Scores values, float limit) {
    uint32_t mask = 0;
    for (int l = 0; l < kLanes; ++l) mask |= static_cast<uint32_t>(values[l] <= limit) << l;
    return mask;
  }

  // Write the numbers of the values that are at most `limit`, in ascending order; how many there are. count: whole vectors;
  // `to` has room for one more. Lanes: the struct that builds on this one.
  template <typename Lanes>
  static int64_t list(const float* values, int64_t count, float limit, int* to) {
    constexpr int64_t kWord = 64;  // of a mask: one guess of a branch for many values
    const int* first = to;
    for (int64_t i = 0; i < count; i += kWord) {
      uint64_t kept = 0;
      for (int64_t l = 0; l < kWord && i + l < count; l += kLanes) {
        kept |= static_cast<uint64_t>(Lanes::at_most(Lanes::load(values + i + l), limit)) << l;
      }
      for (; kept != 0; kept &= kept - 1) *to++ = static_cast<int>(i) + __builtin_ctzll(kept);
    }
    return to - first;
  }

  static int64_t list_at_most(const float* values, int64_t count, float limit, int* to) {
    return list<PlainLanes>(values, count, limit, to);
  }

  static Doubles widen(const float* from) {
    Doubles values;
    for (int l = 0; l < kLanes / 2; ++l) values[l] = from[l];
    return values;
  }
  static Doubles widen(const double* from) {
    Doubles values;
    std::memcpy(&values, from, sizeof values);
    return values;
  }

 private:
  // Adding it rounds to an integer, in the lowest bits.
  static constexpr float kShifter = 12582912.0f;  // 1.5 * 2^23
  static Scores integer(Scores values) { return (values - 0.5f) + kShifter; }
};
