// Included by kernels (foreach_isa.h).

// 2^x for x below 127; what is below -126 counts as -126. The polynomials are minimax on [0, 1]. Relative error,
// rounding included: below 2^-23 with kDegree 6, below 2^-13 with 3.
template <int kDegree>
inline typename Vectors::Scores power_of_two(typename Vectors::Scores x) {
  x = Vectors::maximum(Vectors::fill(-126), x);  // in this order NaN stays NaN
  const typename Vectors::Scores part = Vectors::fraction(x);
  typename Vectors::Scores y;
  if constexpr (kDegree == 6) {
    y = Vectors::fused(Vectors::fill(0.00021709866996388882f), part, Vectors::fill(0.0012437442783266306f));
    y = Vectors::fused(y, part, Vectors::fill(0.009679085575044155f));
    y = Vectors::fused(y, part, Vectors::fill(0.055483222007751465f));
    y = Vectors::fused(y, part, Vectors::fill(0.24022985994815826f));
    y = Vectors::fused(y, part, Vectors::fill(0.6931470036506653f));
    y = Vectors::fused(y, part, Vectors::fill(1.0f));
  } else {
    static_assert(kDegree == 3);
    y = Vectors::fused(Vectors::fill(0.07802452147006989f), part, Vectors::fill(0.22606715559959412f));
    y = Vectors::fused(y, part, Vectors::fill(0.6958335638046265f));
    y = Vectors::fused(y, part, Vectors::fill(0.9999251961708069f));
  }
  return Vectors::times_power_of_two(y, x);
}
