// y = activation(x + bias) and its gradient, which is computed from x again.

namespace activation {

// Beyond it the derivatives are 0 or 1 to within a rounding; products with larger numbers could overflow.
SENTFAST_INLINE inline Vec bounded(Vec x) { return Vec::min(Vec::fill(20.0f), Vec::max(Vec::fill(-20.0f), x)); }

// The derivative of each class of math.inl.h.
template <class A>
struct Derivative;
template <bool Exact>
struct Derivative<math::Gelu<Exact>> {
  // Phi(x) + x phi(x), where x Phi(x) is gelu itself.
  static SENTFAST_INLINE Vec of(Vec x) {
    const Vec z = bounded(x);
    const Vec density = Vec::fill(0.3989422804f) * math::exp2<Exact>(Vec::fill(-0.5f * math::kLog2E) * z * z);
    return Vec::fma(z, density, math::normal_cdf<Exact>(x));
  }
};
template <bool Exact>
struct Derivative<math::GeluTanh<Exact>> {
  static SENTFAST_INLINE Vec of(Vec x) {
    const Vec one = Vec::fill(1.0f), z = bounded(x), square = z * z;
    const Vec inner = Vec::fill(1.5957691216f) * Vec::fma(Vec::fill(0.044715f) * square, z, z);
    const Vec slope = Vec::fma(Vec::fill(3.0f * 0.044715f), square, one) * Vec::fill(1.5957691216f);
    const Vec s = math::sigmoid<Exact>(inner);
    return Vec::fma(z * slope * s, one - s, s);
  }
};
template <>
struct Derivative<math::Relu> {
  // 0 at 0; NaN as PyTorch has it: the gradient passes.
  static SENTFAST_INLINE Vec of(Vec x) { return Vec::select(Vec::above(x, Vec::zero()), Vec::fill(1.0f), Vec::zero()); }
};
template <bool Exact>
struct Derivative<math::Silu<Exact>> {
  static SENTFAST_INLINE Vec of(Vec x) {
    const Vec one = Vec::fill(1.0f), s = math::sigmoid<Exact>(x);
    return Vec::fma(x * s, one - s, s);
  }
};
template <>
struct Derivative<math::Identity> {
  static SENTFAST_INLINE Vec of(Vec) { return Vec::fill(1.0f); }
};

template <class T>
SENTFAST_INLINE inline auto input(const BiasActivation& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x.data) + row * p.x.stride;
  return [&p, x](int64_t d, auto k) SENTFAST_INLINE {
    const Vec value = load(x + d, k);
    return p.bias != nullptr ? value + load(p.bias + d, k) : value;
  };
}

template <class T>
void forward(const BiasActivation& p, int64_t begin, int64_t end) {
  constexpr bool exact = sizeof(T) == 4;
  math::with_activation<exact>(p.activation, [&](auto a) {
    for (int64_t i = begin; i < end; ++i) {
      const auto x = input<T>(p, i);
      T* y = static_cast<T*>(p.y) + i * p.dim;
      each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE { store(decltype(a)::of(x(d, k)), y + d, k); });
    }
  });
}

// grad_x = grad * activation'(x + bias); its sum over a block of rows goes to one row of `partial`.
template <class T>
void backward(const BiasActivation& p, int64_t begin, int64_t end) {
  constexpr bool exact = sizeof(T) == 4;
  math::with_activation<exact>(p.activation, [&](auto a) {
    for (int64_t block = begin; block < end; ++block) {
      float* partial = p.partial != nullptr ? p.partial + block * p.dim : nullptr;
      if (partial != nullptr) fill(partial, p.dim, 0.0f);
      const int64_t first = block * kPartialRows, last = first + kPartialRows < p.rows ? first + kPartialRows : p.rows;
      for (int64_t i = first; i < last; ++i) {
        const auto x = input<T>(p, i);
        const T* grad = static_cast<const T*>(p.grad.data) + i * p.grad.stride;
        T* grad_x = static_cast<T*>(p.y) + i * p.dim;
        each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE {
          const Vec value = load(grad + d, k) * Derivative<decltype(a)>::of(x(d, k));
          if (partial != nullptr) store(load(partial + d, k) + value, partial + d, k);
          store(value, grad_x + d, k);
        });
      }
    }
  });
}

}  // namespace activation
