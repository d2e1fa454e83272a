// Powers of two of any Isa, a vector type of avx512.h, avx2.h or plain_lanes.h; included inside an anonymous namespace
// of its user.

// 2^x for x below 127; what is below -126 counts as -126. The polynomials are minimax on [0, 1]. Relative error,
// rounding included: below 2^-23 with kDegree 6, below 2^-13 with 3.
template <int kDegree>
inline typename Isa::Scores power_of_two(typename Isa::Scores x) {
  x = Isa::maximum(Isa::fill(-126), x);  // in this order NaN stays NaN
  const typename Isa::Scores part = Isa::fraction(x);
  typename Isa::Scores y;
  if constexpr (kDegree == 6) {
    y = Isa::fused(Isa::fill(0.00021709866996388882f), part, Isa::fill(0.0012437442783266306f));
    y = Isa::fused(y, part, Isa::fill(0.009679085575044155f));
    y = Isa::fused(y, part, Isa::fill(0.055483222007751465f));
    y = Isa::fused(y, part, Isa::fill(0.24022985994815826f));
    y = Isa::fused(y, part, Isa::fill(0.6931470036506653f));
    y = Isa::fused(y, part, Isa::fill(1.0f));
  } else {
    static_assert(kDegree == 3);
    y = Isa::fused(Isa::fill(0.07802452147006989f), part, Isa::fill(0.22606715559959412f));
    y = Isa::fused(y, part, Isa::fill(0.6958335638046265f));
    y = Isa::fused(y, part, Isa::fill(0.9999251961708069f));
  }
  return Isa::times_power_of_two(y, x);
}
