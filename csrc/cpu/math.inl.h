// Elementary functions of whole vectors. NaN stays NaN.
//
// Coefficients: minimax fits, made by weighted least squares. Exact: for float32, errors of a few roundings.
// Otherwise for results that are rounded to bf16, errors below a quarter of its last place.

namespace math {

// 2^x for x up to 127, inf for 128; below -126 the result is 2^-126 or less.
template <bool Exact>
SENTFAST_INLINE inline Vec exp2(Vec x) {
  x = Vec::max(Vec::fill(-126.0f), x);
  const Vec n = Vec::round(x), f = x - n;
  Vec p;
  if constexpr (Exact) {
    p = Vec::fma(f, Vec::fill(1.5353362e-4f), Vec::fill(1.3398875e-3f));
    p = Vec::fma(f, p, Vec::fill(9.618437e-3f));
    p = Vec::fma(f, p, Vec::fill(5.5503324e-2f));
    p = Vec::fma(f, p, Vec::fill(2.4022648e-1f));
    p = Vec::fma(f, p, Vec::fill(6.931472e-1f));
  } else {
    p = Vec::fma(f, Vec::fill(5.500893e-2f), Vec::fill(2.4221095e-1f));
    p = Vec::fma(f, p, Vec::fill(6.932829e-1f));
  }
  return Vec::scale_by_power(Vec::fma(f, p, Vec::fill(1.0f)), n);
}

constexpr float kLog2E = 1.44269504f;

// 1 / (1 + exp(-x))
template <bool Exact>
SENTFAST_INLINE inline Vec sigmoid(Vec x) {
  const Vec one = Vec::fill(1.0f);
  // Beyond 88 the exponential is inf and the result 0, which makes NaN of its product with -inf as in PyTorch.
  const Vec y = Vec::min(Vec::fill(128.0f), Vec::fill(-kLog2E) * x);
  return one / (one + exp2<Exact>(y));
}

// erf(x / sqrt 2) as x P(x^2) / Q(x^2). Beyond the limit it is 1 to within a rounding, and must not stop short of it:
// what GELU leaves of a strongly negative x is then small but has the same sign everywhere.
template <bool Exact>
SENTFAST_INLINE inline Vec erf(Vec x) {
  const Vec limit = Vec::fill(Exact ? 5.7f : 4.6f), one = Vec::fill(1.0f);
  const Vec z = Vec::min(limit, Vec::max(Vec::zero() - limit, x)), u = z * z;
  Vec p, q;
  if constexpr (Exact) {
    p = Vec::fma(u, Vec::fill(-3.911074797e-10f), Vec::fill(2.862654824e-8f));
    p = Vec::fma(u, p, Vec::fill(1.459588293e-5f));
    p = Vec::fma(u, p, Vec::fill(2.849739685e-4f));
    p = Vec::fma(u, p, Vec::fill(9.189595468e-3f));
    p = Vec::fma(u, p, Vec::fill(6.088946760e-2f));
    p = Vec::fma(u, p, Vec::fill(7.978845835e-1f));
    q = Vec::fma(u, Vec::fill(-6.713539946e-9f), Vec::fill(1.510137395e-6f));
    q = Vec::fma(u, q, Vec::fill(7.020016346e-5f));
    q = Vec::fma(u, q, Vec::fill(1.761348685e-3f));
    q = Vec::fma(u, q, Vec::fill(2.701402269e-2f));
    q = Vec::fma(u, q, Vec::fill(2.429803610e-1f));
  } else {
    p = Vec::fma(u, Vec::fill(6.639224739e-5f), Vec::fill(7.644851226e-3f));
    p = Vec::fma(u, p, Vec::fill(5.457564816e-2f));
    p = Vec::fma(u, p, Vec::fill(7.978816032e-1f));
    q = Vec::fma(u, Vec::fill(1.163337729e-3f), Vec::fill(2.373123728e-2f));
    q = Vec::fma(u, q, Vec::fill(2.350751460e-1f));
  }
  q = Vec::fma(u, q, one);
  return Vec::min(one, Vec::max(Vec::zero() - one, z * p / q));
}

// The normal distribution function, (1 + erf(x / sqrt 2)) / 2.
template <bool Exact>
SENTFAST_INLINE inline Vec normal_cdf(Vec x) {
  const Vec half = Vec::fill(0.5f);
  return Vec::fma(half, erf<Exact>(x), half);
}

// x times that, halved first: the sum of two large halves cannot overflow.
template <bool Exact>
SENTFAST_INLINE inline Vec gelu(Vec x) {
  const Vec half = Vec::fill(0.5f) * x;
  return Vec::fma(half, erf<Exact>(x), half);
}

struct Identity {
  static SENTFAST_INLINE Vec of(Vec x) { return x; }
};
template <bool Exact>
struct Gelu {
  static SENTFAST_INLINE Vec of(Vec x) { return gelu<Exact>(x); }
};
// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
template <bool Exact>
struct GeluTanh {
  static SENTFAST_INLINE Vec of(Vec x) {
    const Vec inner = Vec::fma(Vec::fill(0.044715f) * x * x, x, x);
    return x * sigmoid<Exact>(Vec::fill(1.5957691216f) * inner);
  }
};
struct Relu {
  static SENTFAST_INLINE Vec of(Vec x) { return Vec::max(Vec::zero(), x); }
};
template <bool Exact>
struct Silu {
  static SENTFAST_INLINE Vec of(Vec x) { return x * sigmoid<Exact>(x); }
};

// Calls f(A{}) with the class of `activation`.
template <bool Exact, class F>
SENTFAST_INLINE inline void with_activation(Activation activation, F f) {
  switch (activation) {
    case kGelu:
      return f(Gelu<Exact>{});
    case kGeluTanh:
      return f(GeluTanh<Exact>{});
    case kRelu:
      return f(Relu{});
    case kSilu:
      return f(Silu<Exact>{});
    default:
      return f(Identity{});
  }
}

}  // namespace math
