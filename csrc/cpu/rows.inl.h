// Row by row: L2 normalisation and pairwise similarity. A row is read from memory once and again from the first cache.
// Plain loops: asking for rows ahead, or walking four places at once as pooling does, were both slower here.

namespace rows {

template <class T>
const T* row(const Rows& r, int64_t i) {
  return static_cast<const T*>(r.data) + i * r.stride;
}

template <class A, class B>
float dot(const A* a, const B* b, int64_t dim) {
  Vec even = Vec::zero(), odd = Vec::zero();
  int64_t d = 0;
  for (; d + 2 * Vec::lanes <= dim; d += 2 * Vec::lanes) {
    even = Vec::fma(Vec::load(a + d), Vec::load(b + d), even);
    odd = Vec::fma(Vec::load(a + d + Vec::lanes), Vec::load(b + d + Vec::lanes), odd);
  }
  each_vector(dim - d, [&](int64_t e, auto k)
                           SENTFAST_INLINE { even = Vec::fma(load(a + d + e, k), load(b + d + e, k), even); });
  return (even + odd).sum();
}

// <x / |x|, y / |y|> with every element divided first: for norms whose squares or products leave float32's range. An
// infinite norm makes zeros of a row, and of what is not finite in it NaN.
template <class A, class B>
float unit_dot(const A* a, float norm_a, const B* b, float norm_b, int64_t dim) {
  const Vec divisor_a = Vec::fill(norm_a), divisor_b = Vec::fill(norm_b);
  Vec sum = Vec::zero();
  each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
    sum = Vec::fma(only(load(a + d, k) / divisor_a, k), only(load(b + d, k) / divisor_b, k), sum);
  });
  return sum.sum();
}

// Whether a sum of products of two rows has lost nothing to float32's range, by the product of their norms: it bounds
// the sum, and where it is this large, what single products lose to zero does not count.
inline bool sum_in_range(float norms) { return norms >= 1e-30f && norms < __builtin_inff(); }

// Whether the square of a norm and its inverse are far from the ends of float32's range.
inline bool square_in_range(float norm) { return norm >= 1e-15f && norm <= 1e15f; }

// |x|; of a row of one column without squaring it, as PyTorch's vector_norm does, so that it cannot leave the range.
template <class T>
float norm_of(const T* x, int64_t dim) {
  if (dim == 1) return Vec::abs(only(load(x, Tail{1}), Tail{1})).sum();
  return __builtin_sqrtf(dot(x, x, dim));
}

// Rows of two floats: a sum across a vector takes longer than all else.
inline void normalize_pairs(const Normalize& p, int64_t begin, int64_t end) {
  auto* y = static_cast<float*>(p.y);
  for (int64_t i = begin; i < end; ++i) {
    const float* x = row<float>(p.x, i);
    const float first = x[0], second = x[1], norm = __builtin_sqrtf(first * first + second * second);
    if (p.norm != nullptr) p.norm[i] = norm;
    if (y == nullptr) continue;
    const float scale = 1.0f / at_least(norm, p.eps);
    y[i * 2] = first * scale;
    y[i * 2 + 1] = second * scale;
  }
}

template <class T>
void normalize(const Normalize& p, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.dim == 2) return normalize_pairs(p, begin, end);
  }
  for (int64_t i = begin; i < end; ++i) {
    const T* x = row<T>(p.x, i);
    const float norm = norm_of(x, p.dim);
    if (p.norm != nullptr) p.norm[i] = norm;
    if (p.y == nullptr) continue;
    T* y = static_cast<T*>(p.y) + i * p.dim;
    const float divisor = at_least(norm, p.eps);
    if (p.dim == 1) {  // the inverse of a large norm would be subnormal
      store(load(x, Tail{1}) / Vec::fill(divisor), y, Tail{1});
      continue;
    }
    const Vec scale = Vec::fill(1.0f / divisor);
    each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE { store(load(x + d, k) * scale, y + d, k); });
  }
}

// <x, grad> / n^3, zero below eps.
template <class T, class G>
float along_row(const T* x, const G* grad, float norm, float eps, int64_t dim) {
  if (norm < eps) return 0.0f;
  const float sum = dot(x, grad, dim);
  if (__builtin_fabsf(sum) < __builtin_inff() && norm < __builtin_inff()) return sum / norm / norm / norm;
  return unit_dot(x, norm, grad, 1.0f, dim) / norm / norm;
}

// grad / n - x <x, grad> / n^3; below eps only grad / eps.
template <class T, class G>
void normalize_backward_row(const NormalizeBackward& p, int64_t i) {
  const T* x = row<T>(p.x, i);
  const G* grad = row<G>(p.grad, i);
  T* grad_x = static_cast<T*>(p.grad_x) + i * p.dim;
  const float norm = at_least(p.norm[i], p.eps);
  // The coefficient of x could be lost to zero, or of one column, whose u is 1, leave a rounding where the gradient is
  // zero: (grad - u <u, grad>) / n with u = x / n.
  if (!(norm <= 1e15f) || (p.dim == 1 && !(p.norm[i] < p.eps))) {
    const Vec divisor = Vec::fill(norm), along_unit = Vec::fill(unit_dot(x, norm, grad, 1.0f, p.dim));
    each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE {
      store((load(grad + d, k) - along_unit * (load(x + d, k) / divisor)) / divisor, grad_x + d, k);
    });
    return;
  }
  const float along = along_row(x, grad, p.norm[i], p.eps, p.dim);
  const Vec scale = Vec::fill(1.0f / norm), tangent = Vec::fill(along);
  if (along == 0.0f) {  // 0 * inf must not make NaN
    each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE { store(load(grad + d, k) * scale, grad_x + d, k); });
    return;
  }
  each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE {
    store(load(grad + d, k) * scale - tangent * load(x + d, k), grad_x + d, k);
  });
}

template <class T>
void normalize_backward(const NormalizeBackward& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    switch (p.grad_dtype) {
      case Dtype::Float32:
        normalize_backward_row<T, float>(p, i);
        break;
      case Dtype::BFloat16:
        normalize_backward_row<T, BFloat16>(p, i);
        break;
      case Dtype::Float16:
        normalize_backward_row<T, Float16>(p, i);
        break;
    }
  }
}

template <class T>
float cosine(const Pairwise& p, int64_t i, const T* a, const T* b) {
  Vec ab = Vec::zero(), aa = Vec::zero(), bb = Vec::zero();
  each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE {
    const Vec x = load(a + d, k), y = load(b + d, k);
    ab = Vec::fma(x, y, ab);
    aa = Vec::fma(x, x, aa);
    bb = Vec::fma(y, y, bb);
  });
  const bool one = p.dim == 1;
  const float norm_a = one ? norm_of(a, 1) : __builtin_sqrtf(aa.sum());
  const float norm_b = one ? norm_of(b, 1) : __builtin_sqrtf(bb.sum());
  if (p.norm_a != nullptr) {
    p.norm_a[i] = norm_a;
    p.norm_b[i] = norm_b;
  }
  const float divisor_a = at_least(norm_a, p.eps), divisor_b = at_least(norm_b, p.eps);
  if (one || !sum_in_range(norm_a * norm_b)) return unit_dot(a, divisor_a, b, divisor_b, p.dim);
  return ab.sum() / divisor_a / divisor_b;
}

template <class T>
float distance(Metric metric, int64_t dim, const T* a, const T* b) {
  const bool squared = metric == kEuclidean && dim > 1;  // see norm_of
  Vec sum = Vec::zero();
  each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
    const Vec difference = load(a + d, k) - load(b + d, k);
    sum = squared ? Vec::fma(difference, difference, sum) : sum + Vec::abs(difference);
  });
  return squared ? __builtin_sqrtf(sum.sum()) : sum.sum();
}

template <class T>
void pairwise(const Pairwise& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T *a = row<T>(p.a, i), *b = row<T>(p.b, i);
    if (p.metric == kCosine) {
      p.scores[i] = cosine(p, i, a, b);
    } else if (p.metric == kDot) {
      p.scores[i] = dot(a, b, p.dim);
    } else {
      p.scores[i] = -distance(p.metric, p.dim, a, b);
    }
  }
}

// Cosine and euclidean: grad_a = across * b - along_a * a and grad_b = across * a - along_b * b.
struct Coefficients {
  float across, along_a = 0.0f, along_b = 0.0f;

  Coefficients(const PairwiseBackward& p, int64_t i) : across(p.grad[i]) {
    if (p.metric == kCosine) {
      const float norm_a = at_least(p.norm_a[i], p.eps), norm_b = at_least(p.norm_b[i], p.eps);
      const float score = p.grad[i] * p.scores[i];
      across = p.grad[i] / norm_a / norm_b;
      if (!(p.norm_a[i] < p.eps)) along_a = score / norm_a / norm_a;
      if (!(p.norm_b[i] < p.eps)) along_b = score / norm_b / norm_b;
    } else if (p.metric == kEuclidean) {
      across = along_a = along_b = p.scores[i] == 0.0f ? 0.0f : -p.grad[i] / p.scores[i];
    }
  }
};

// Of rows whose norms leave float32's range in the coefficients: (grad b / |b| - score a / |a|) / |a|.
template <class T>
void cosine_backward_row(const PairwiseBackward& p, int64_t i, const T* x, float norm_x, const T* y, float norm_y,
                         T* grad_x) {
  const Vec divisor_x = Vec::fill(at_least(norm_x, p.eps)), divisor_y = Vec::fill(at_least(norm_y, p.eps));
  const Vec grad = Vec::fill(p.grad[i]), along = Vec::fill(norm_x < p.eps ? 0.0f : p.grad[i] * p.scores[i]);
  each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE {
    const Vec across = grad * (load(y + d, k) / divisor_y);
    store((across - along * (load(x + d, k) / divisor_x)) / divisor_x, grad_x + d, k);
  });
}

template <class T>
void pairwise_backward(const PairwiseBackward& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T *a = row<T>(p.a, i), *b = row<T>(p.b, i);
    T* grad_a = static_cast<T*>(p.grad_a) + i * p.dim;
    T* grad_b = static_cast<T*>(p.grad_b) + i * p.dim;
    // Other metrics have no norms.
    if (p.metric == kCosine && (p.dim == 1 || !(square_in_range(p.norm_a[i]) && square_in_range(p.norm_b[i])))) {
      cosine_backward_row(p, i, a, p.norm_a[i], b, p.norm_b[i], grad_a);
      cosine_backward_row(p, i, b, p.norm_b[i], a, p.norm_a[i], grad_b);
      continue;
    }
    const Coefficients c(p, i);
    const Vec across = Vec::fill(c.across), along_a = Vec::fill(c.along_a), along_b = Vec::fill(c.along_b);
    each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE {
      const Vec x = load(a + d, k), y = load(b + d, k);
      if (p.metric == kManhattan) {
        const Vec step = across * Vec::sign(x - y);
        store(Vec::zero() - step, grad_a + d, k);
        store(step, grad_b + d, k);
      } else if (p.metric == kDot) {  // 0 * inf of the own row would make NaN
        store(across * y, grad_a + d, k);
        store(across * x, grad_b + d, k);
      } else {
        store(across * y - along_a * x, grad_a + d, k);
        store(across * x - along_b * y, grad_b + d, k);
      }
    });
  }
}

}  // namespace rows
