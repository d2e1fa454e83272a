// The kernels of sample_codes (foreach_isa.h). The loops are plain, for the compiler to turn into vectors: all but a
// few float operations a logit are on integers, in which it may order sums as it likes. Those few round as the
// definition's do, one by one: setup.py forbids to contract them.

constexpr int32_t kMagnitude = 0x7fffffff;
constexpr int32_t kInfinity = 0x7f800000;
constexpr int32_t kLowest = ~kInfinity;  // key of -infinity

inline int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Floats as integers in the same order, and back: the function is its own inverse.
inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & kMagnitude); }

// -0 is 0, and NaN is -infinity. Choices are between integers: those between floats keep the compiler from vectors.
inline int32_t key_of(float value) {
  const int32_t key = ordered(bits_of(value + 0.0f));
  const int32_t number = key > kInfinity ? kLowest : key;
  return number < kLowest ? kLowest : number;
}

// Keys of a row's guided logits. Returns the largest.
inline int32_t guide(const Options& options, const float* logits, const float* uncond_logits, int64_t V, int32_t* keys) {
  if (uncond_logits == nullptr) {
    for (int64_t i = 0; i < V; ++i) keys[i] = key_of(logits[i]);
  } else {
    for (int64_t i = 0; i < V; ++i) keys[i] = key_of(logits[i] * options.cond - uncond_logits[i] * options.uncond);
  }
  int32_t most = keys[0];
  for (int64_t i = 1; i < V; ++i) most = keys[i] > most ? keys[i] : most;
  return most;
}

inline int32_t least_of(const int32_t* keys, int64_t n) {
  int32_t least = keys[0];
  for (int64_t i = 1; i < n; ++i) least = keys[i] < least ? keys[i] : least;
  return least;
}

inline int64_t count_below(const int32_t* keys, int64_t n, int32_t threshold) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] < threshold;
  return count;
}

inline int64_t weight_below(const int32_t* keys, const int32_t* weights, int64_t n, int32_t threshold) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += keys[i] < threshold ? weights[i] : 0;
  return sum;
}

// A threshold such that what lies below it amounts to no more than `limit`, and to more just above the next key. Of those
// with the same amount below, any will do. least: no key is smaller; most: all keys up to it are more than the limit.
template <typename Below>
inline int32_t bisect(int32_t least, int32_t most, int64_t limit, const Below& below) {
  int64_t low = least, high = static_cast<int64_t>(most) + 1;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2, amount = below(static_cast<int32_t>(middle));
    if (amount == limit) return static_cast<int32_t>(middle);
    (amount < limit ? low : high) = middle;
  }
  return static_cast<int32_t>(low);
}

// Move keys from the threshold on to the front, and note their places. Returns how many.
inline int64_t keep(int32_t* keys, int64_t n, int32_t threshold, int32_t* places) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = keys[i];
    keys[kept] = key;
    places[kept] = static_cast<int32_t>(i);
    kept += key >= threshold;
  }
  return kept;
}

// floor(2^30 exp((x - largest) / temperature)), by the definition's own steps. Returns the sum.
inline int64_t weigh(const int32_t* keys, int64_t n, int32_t most, float scale, int32_t* weights) {
  constexpr float kNearest = 12582912.0f;  // 1.5 * 2^23
  const int32_t lowest_power = ordered(bits_of(-40.0f));
  const float largest = float_of(ordered(most));
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t power_key = ordered(bits_of((float_of(ordered(keys[i])) - largest) * scale));
    const int32_t clamped = power_key < lowest_power ? lowest_power : power_key;
    // A mask and no choice, for which the compiler would leave out the float operations above by a branch.
    const float scaled = float_of(ordered(clamped) & -static_cast<int32_t>(keys[i] != most));
    const float whole = scaled + kNearest - kNearest, part = scaled - whole;
    float power = 1.5403530393381608e-04f;
    power = power * part + 1.3333558146428443e-03f;
    power = power * part + 9.6181291076284770e-03f;
    power = power * part + 5.5504108664821576e-02f;
    power = power * part + 2.4022650695910070e-01f;
    power = power * part + 6.9314718055994530e-01f;
    power = power * part + 1.0f;
    weights[i] = static_cast<int32_t>(power * float_of((static_cast<int32_t>(whole) + 157) * (1 << 23)));
    total += weights[i];
  }
  return total;
}

// floor(total * fraction), for totals below 2^61.
inline int64_t share(int64_t total, const Fraction& of) {
  const int64_t high = total >> 31, low = total & kMagnitude;
  return high * of.high + ((high * of.low + low * of.high + ((low * of.low) >> 31)) >> 31);
}

// The first place up to which weights sum to more than `target`.
inline int64_t find(const int32_t* weights, int64_t n, int64_t target) {
  constexpr int64_t kBlock = 64;  // is summed, or passed over, at once
  int64_t begin = 0;
  for (; begin + kBlock < n; begin += kBlock) {
    int64_t sum = 0;
    for (int64_t i = begin; i < begin + kBlock; ++i) sum += weights[i];
    if (sum > target) break;
    target -= sum;
  }
  while (weights[begin] <= target) target -= weights[begin++];
  return begin;
}

int64_t largest(
    const Options& options, const float* logits, const float* uncond_logits, int64_t V, const Workspace& work) {
  const int32_t most = guide(options, logits, uncond_logits, V, work.keys);
  int64_t place = 0;
  while (work.keys[place] != most) ++place;
  return place;
}

int64_t draw(
    const Options& options, const float* logits, const float* uncond_logits, int64_t V, const Fraction& random,
    const Workspace& work) {
  int32_t *keys = work.keys, *weights = work.weights;
  const int32_t most = guide(options, logits, uncond_logits, V, keys);
  const bool some = options.top_k > 0 && options.top_k < V;
  int64_t n = V;
  if (some) {
    const int32_t threshold = bisect(least_of(keys, n), most, V - options.top_k, [&](int32_t middle) {
      return count_below(keys, V, middle);
    });
    n = keep(keys, V, threshold, work.places);
  }
  int64_t total = weigh(keys, n, most, options.scale, weights);
  if (options.top_p) {
    const int32_t threshold = bisect(least_of(keys, n), most, share(total, options.dropped), [&](int32_t middle) {
      return weight_below(keys, weights, n, middle);
    });
    total = 0;
    for (int64_t i = 0; i < n; ++i) {
      weights[i] = keys[i] < threshold ? 0 : weights[i];
      total += weights[i];
    }
  }
  const int64_t place = find(weights, n, share(total, random));
  return some ? work.places[place] : place;
}

constexpr Kernels kKernels{largest, draw};
