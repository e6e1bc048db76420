// Dropout, residual and layer norm of training in one pass over a row, and their gradient in another.

namespace norm {

// sum = dropout(x) + residual; y = (sum - mean) * rstd * weight + bias. X: dtype of x; R: of the others.
template <class X, class R>
void forward_row(const DropoutAddLayerNorm& p, int64_t row) {
  const X* x = static_cast<const X*>(p.x.data) + row * p.x.stride;
  const R* residual =
      p.residual.data != nullptr ? static_cast<const R*>(p.residual.data) + row * p.residual.stride : nullptr;
  R* sum = static_cast<R*>(p.sum) + row * p.dim;
  Vec total = Vec::zero(), squares = Vec::zero();
  dropout::each_kept(p.dropout, row, p.dim, [&](int64_t d, auto k, auto kept) SENTFAST_INLINE {
    Vec value = kept(load(x + d, k));
    if (residual != nullptr) value = value + load(residual + d, k);
    store(value, sum + d, k);
    total = total + only(load(sum + d, k), k);  // as it is rounded, which is what the gradient will read
  });
  const float n = static_cast<float>(p.dim), mean = total.sum() / n;
  const Vec middle = Vec::fill(mean);
  each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE {
    const Vec value = only(load(sum + d, k) - middle, k);
    squares = Vec::fma(value, value, squares);
  });
  const float rstd = 1.0f / __builtin_sqrtf(squares.sum() / n + p.eps);
  p.mean[row] = mean;
  p.rstd[row] = rstd;
  const Vec scale = Vec::fill(rstd);
  R* y = static_cast<R*>(p.y) + row * p.dim;
  each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE {
    const Vec value = (load(sum + d, k) - middle) * scale, weight = load(p.weight + d, k);
    store(p.bias != nullptr ? Vec::fma(value, weight, load(p.bias + d, k)) : value * weight, y + d, k);
  });
}

template <class X, class R>
void forward(const DropoutAddLayerNorm& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) forward_row<X, R>(p, i);
}

// With g = grad * weight and z = (sum - mean) * rstd: grad_sum = rstd (g - mean(g) - z mean(g z)), which goes to the
// residual as it is and to x through the mask.
template <class X, class R>
void backward_row(const DropoutAddLayerNormBackward& p, int64_t row, float* grad_weight, float* grad_bias) {
  const R* grad = static_cast<const R*>(p.grad.data) + row * p.grad.stride;
  const R* sum = static_cast<const R*>(p.sum) + row * p.dim;
  const Vec middle = Vec::fill(p.mean[row]), scale = Vec::fill(p.rstd[row]);
  Vec total = Vec::zero(), along = Vec::zero();
  each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE {
    const Vec g = load(grad + d, k), z = (load(sum + d, k) - middle) * scale, gz = g * z;
    const Vec weight = load(p.weight + d, k);
    store(load(grad_weight + d, k) + gz, grad_weight + d, k);
    store(load(grad_bias + d, k) + g, grad_bias + d, k);
    total = Vec::fma(only(g, k), only(weight, k), total);
    along = Vec::fma(only(gz, k), only(weight, k), along);
  });
  const float n = static_cast<float>(p.dim);
  const Vec mean = Vec::fill(total.sum() / n), tangent = Vec::fill(along.sum() / n);
  R* grad_sum = static_cast<R*>(p.grad_sum) + row * p.dim;
  X* grad_x = p.grad_x != nullptr ? static_cast<X*>(p.grad_x) + row * p.dim : nullptr;
  dropout::each_kept(p.dropout, row, p.dim, [&](int64_t d, auto k, auto kept) SENTFAST_INLINE {
    const Vec z = (load(sum + d, k) - middle) * scale;
    const Vec value = (load(grad + d, k) * load(p.weight + d, k) - mean - z * tangent) * scale;
    store(value, grad_sum + d, k);
    if (grad_x != nullptr) store(kept(value), grad_x + d, k);
  });
}

// A block of rows adds its part of the gradients of weight and bias to one row of `partial`.
template <class X, class R>
void backward(const DropoutAddLayerNormBackward& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    float* partial = p.partial + block * 2 * p.dim;
    fill(partial, 2 * p.dim, 0.0f);
    const int64_t first = block * kPartialRows, last = first + kPartialRows < p.rows ? first + kPartialRows : p.rows;
    for (int64_t i = first; i < last; ++i) backward_row<X, R>(p, i, partial, partial + p.dim);
  }
}

}  // namespace norm
