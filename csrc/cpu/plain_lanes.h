// What needs no special instruction, on the compiler's own vectors of kPlainLanes floats; included inside the namespace
// of its user.
struct PlainLanes {
  static constexpr int kLanes = kPlainLanes;
  typedef float Scores __attribute__((vector_size(4 * kPlainLanes)));
  typedef double Doubles __attribute__((vector_size(4 * kPlainLanes)));

  static Scores load(const float* from) {
    Scores values;
    std::memcpy(&values, from, sizeof values);
    return values;
  }
  static void store(float* to, Scores values) { std::memcpy(to, &values, sizeof values); }
  static Scores fill(float value) { return value - Scores{}; }
  static Scores minimum(Scores a, Scores b) { return a < b ? a : b; }

  static Scores root(Scores values) {
    for (int l = 0; l < kLanes; ++l) values[l] = std::sqrt(values[l]);
    return values;
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
};
