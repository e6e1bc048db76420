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

template <class T>
void normalize(const Normalize& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = row<T>(p.x, i);
    const float norm = __builtin_sqrtf(dot(x, x, p.dim));
    if (p.norm != nullptr) p.norm[i] = norm;
    if (p.y == nullptr) continue;
    T* y = static_cast<T*>(p.y) + i * p.dim;
    const Vec scale = Vec::fill(1.0f / at_least(norm, p.eps));
    each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE { store(load(x + d, k) * scale, y + d, k); });
  }
}

// grad / n - x <x, grad> / n^3; below eps only grad / eps.
template <class T, class G>
void normalize_backward_row(const NormalizeBackward& p, int64_t i) {
  const T* x = row<T>(p.x, i);
  const G* grad = row<G>(p.grad, i);
  T* grad_x = static_cast<T*>(p.grad_x) + i * p.dim;
  const float norm = at_least(p.norm[i], p.eps);
  const float along = p.norm[i] < p.eps ? 0.0f : dot(x, grad, p.dim) / norm / norm / norm;
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
  const float norm_a = __builtin_sqrtf(aa.sum()), norm_b = __builtin_sqrtf(bb.sum());
  if (p.norm_a != nullptr) {
    p.norm_a[i] = norm_a;
    p.norm_b[i] = norm_b;
  }
  return ab.sum() / at_least(norm_a, p.eps) / at_least(norm_b, p.eps);
}

template <class T>
float distance(Metric metric, int64_t dim, const T* a, const T* b) {
  Vec sum = Vec::zero();
  each_vector(dim, [&](int64_t d, auto k) SENTFAST_INLINE {
    const Vec difference = load(a + d, k) - load(b + d, k);
    sum = metric == kEuclidean ? Vec::fma(difference, difference, sum) : sum + Vec::abs(difference);
  });
  return metric == kEuclidean ? __builtin_sqrtf(sum.sum()) : sum.sum();
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

// All metrics but manhattan: grad_a = across * b - along_a * a and grad_b = across * a - along_b * b.
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

template <class T>
void pairwise_backward(const PairwiseBackward& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T *a = row<T>(p.a, i), *b = row<T>(p.b, i);
    T* grad_a = static_cast<T*>(p.grad_a) + i * p.dim;
    T* grad_b = static_cast<T*>(p.grad_b) + i * p.dim;
    const Coefficients c(p, i);
    const Vec across = Vec::fill(c.across), along_a = Vec::fill(c.along_a), along_b = Vec::fill(c.along_b);
    each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE {
      const Vec x = load(a + d, k), y = load(b + d, k);
      if (p.metric == kManhattan) {
        const Vec step = across * Vec::sign(x - y);
        store(Vec::zero() - step, grad_a + d, k);
        store(step, grad_b + d, k);
      } else {
        store(across * y - along_a * x, grad_a + d, k);
        store(across * x - along_b * y, grad_b + d, k);
      }
    });
  }
}

}  // namespace rows
