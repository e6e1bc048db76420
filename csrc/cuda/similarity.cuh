// Gradient of L2 normalisation, and similarity row by row: one warp per row.
#pragma once

#include "normalize.cuh"

namespace sentfast {
namespace {

enum PairwiseMetric : int32_t { kCosine, kDot, kEuclidean, kManhattan };

// ---- l2_normalize_backward

struct NormalizeBackwardArguments {
  // Of grad, x and norm.
  Rows<3> rows;
  int64_t dim;
  const void* grad;
  int64_t grad_stride;
  const void* x;
  int64_t x_stride;
  const float* norm;
  // Contiguous, x's dtype.
  void* grad_x;
  float eps;
};

template <typename T, typename Grad, int N>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    l2_normalize_backward_kernel(const __grid_constant__ NormalizeBackwardArguments a) {
  for (int64_t row = first_row(); row < a.rows.count; row += row_step()) {
    int64_t offset[3];
    a.rows.offsets(row, offset);
    const Grad* grad = static_cast<const Grad*>(a.grad) + offset[0];
    const T* x = static_cast<const T*>(a.x) + offset[1];
    const float norm = a.norm[offset[2]];
    const float denominator = at_least(norm, a.eps);
    float along = 0.0f;
#pragma unroll 2
    for (int64_t c = lane_of_warp() * N; c < a.dim; c += kWarp * N) {
      float g[N], values[N];
      load(grad + c * a.grad_stride, g);
      load(x + c * a.x_stride, values);
#pragma unroll
      for (int i = 0; i < N; ++i) along += values[i] / denominator * g[i];
    }
    along = reduce_warp(along, Sum());
    T* grad_x = static_cast<T*>(a.grad_x) + row * a.dim;
#pragma unroll 2
    for (int64_t c = lane_of_warp() * N; c < a.dim; c += kWarp * N) {
      float g[N], values[N];
      load(grad + c * a.grad_stride, g);
      load(x + c * a.x_stride, values);
#pragma unroll
      for (int i = 0; i < N; ++i) g[i] = normalize_gradient(g[i], values[i] / denominator, along, norm, a.eps);
      store(grad_x + c, g);
    }
  }
}

inline cudaError_t run_l2_normalize_backward(Dtype dtype, Dtype grad_dtype, const NormalizeBackwardArguments& a,
                                             cudaStream_t stream) {
  if (a.rows.count == 0 || a.dim == 0) return cudaSuccess;
  const int64_t blocks = ceil_divide(a.rows.count, kWarps);
  return dispatch(dtype, [&](auto zero) {
    return dispatch(grad_dtype, [&](auto grad_zero) {
      using T = decltype(zero);
      using Grad = decltype(grad_zero);
      constexpr int N = kVector<T>;
      if (vectors(a.grad, sizeof(Grad), a.grad_stride, a.dim, a.rows.dims, a.rows.stride[0]) &&
          vectors(a.x, sizeof(T), a.x_stride, a.dim, a.rows.dims, a.rows.stride[1])) {
        return launch(l2_normalize_backward_kernel<T, Grad, N>, blocks, 1, stream, a);
      }
      return launch(l2_normalize_backward_kernel<T, Grad, 1>, blocks, 1, stream, a);
    });
  });
}

// ---- pairwise_similarity

struct PairwiseArguments {
  // Of a and b.
  Rows<2> rows;
  int64_t dim;
  PairwiseMetric metric;
  const void* a;
  int64_t a_stride;
  const void* b;
  int64_t b_stride;
  // Contiguous; the norms are null unless the metric is cosine.
  float* scores;
  float* norm_a;
  float* norm_b;
  float eps;
};

// Whether a sum of products of two rows has lost nothing to float32's range, by the product of their norms.
__device__ inline bool in_range(float norms) { return norms >= 1e-30f && norms < INFINITY; }

// <x / divisor_a, y / divisor_b>, each element divided before it is multiplied. Rare: without vectors.
template <typename T>
__device__ inline float unit_product(const PairwiseArguments& p, const T* a, const T* b, float divisor_a,
                                     float divisor_b) {
  float sum = 0.0f;
  for (int64_t c = lane_of_warp(); c < p.dim; c += kWarp) {
    sum += (to_float(a[c * p.a_stride]) / divisor_a) * (to_float(b[c * p.b_stride]) / divisor_b);
  }
  return reduce_warp(sum, Sum());
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kMinBlocks) pairwise_kernel(const __grid_constant__ PairwiseArguments p) {
  const bool squared = p.metric == kEuclidean && p.dim > 1;  // see norm_of
  for (int64_t row = first_row(); row < p.rows.count; row += row_step()) {
    int64_t offset[2];
    p.rows.offsets(row, offset);
    const T* a = static_cast<const T*>(p.a) + offset[0];
    const T* b = static_cast<const T*>(p.b) + offset[1];
    float sum = 0.0f, squares_a = 0.0f, squares_b = 0.0f;
#pragma unroll 2
    for (int64_t c = lane_of_warp() * N; c < p.dim; c += kWarp * N) {
      float x[N], y[N];
      load(a + c * p.a_stride, x);
      load(b + c * p.b_stride, y);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (p.metric <= kDot) {
          sum += x[i] * y[i];
          squares_a += x[i] * x[i];
          squares_b += y[i] * y[i];
        } else {
          const float d = x[i] - y[i];
          sum += squared ? d * d : fabsf(d);
        }
      }
    }
    sum = reduce_warp(sum, Sum());
    if (squared) sum = sqrtf(sum);
    if (p.metric >= kEuclidean) sum = -sum;
    if (p.metric == kCosine) {
      const float norm_a = norm_of(a, p.dim, reduce_warp(squares_a, Sum()));
      const float norm_b = norm_of(b, p.dim, reduce_warp(squares_b, Sum()));
      const float divisor_a = at_least(norm_a, p.eps), divisor_b = at_least(norm_b, p.eps);
      // Of one column it is 1 or -1, which is not left to roundings.
      const bool plain = p.dim > 1 && in_range(norm_a * norm_b);
      sum = plain ? sum / divisor_a / divisor_b : unit_product(p, a, b, divisor_a, divisor_b);
      if (lane_of_warp() == 0) {
        p.norm_a[row] = norm_a;
        p.norm_b[row] = norm_b;
      }
    }
    if (lane_of_warp() == 0) p.scores[row] = sum;
  }
}

inline cudaError_t run_pairwise_similarity(Dtype dtype, const PairwiseArguments& p, cudaStream_t stream) {
  if (p.rows.count == 0) return cudaSuccess;
  const int64_t blocks = ceil_divide(p.rows.count, kWarps);
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (vectors(p.a, sizeof(T), p.a_stride, p.dim, p.rows.dims, p.rows.stride[0]) &&
        vectors(p.b, sizeof(T), p.b_stride, p.dim, p.rows.dims, p.rows.stride[1])) {
      return launch(pairwise_kernel<T, kVector<T>>, blocks, 1, stream, p);
    }
    return launch(pairwise_kernel<T, 1>, blocks, 1, stream, p);
  });
}

struct PairwiseBackwardArguments {
  // Of a, b, grad, scores, norm_a and norm_b.
  Rows<6> rows;
  int64_t dim;
  PairwiseMetric metric;
  const void* a;
  int64_t a_stride;
  const void* b;
  int64_t b_stride;
  const void* grad;
  Dtype grad_dtype;
  const float* scores;
  // Read for cosine only.
  const float* norm_a;
  const float* norm_b;
  // Contiguous, a's dtype.
  void* grad_a;
  void* grad_b;
  float eps;
};

struct PairwiseRow {
  float grad, score, norm_a, norm_b;
};

// The gradients of one element x of a and y of b, in place.
__device__ inline void pairwise_gradient(PairwiseMetric metric, const PairwiseRow& r, float eps, float& x, float& y) {
  if (metric == kCosine) {
    const float unit_x = x / at_least(r.norm_a, eps), unit_y = y / at_least(r.norm_b, eps);
    const float along = r.grad * r.score;
    x = normalize_gradient(r.grad * unit_y, unit_x, along, r.norm_a, eps);
    y = normalize_gradient(r.grad * unit_x, unit_y, along, r.norm_b, eps);
  } else if (metric == kDot) {
    const float grad_x = r.grad * y;
    y = r.grad * x;
    x = grad_x;
  } else {
    const float d = x - y;
    if (metric == kEuclidean) {
      x = r.score == 0.0f ? 0.0f : r.grad * d / r.score;
    } else {
      x = -r.grad * (static_cast<float>(d > 0.0f) - static_cast<float>(d < 0.0f));
    }
    y = -x;
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    pairwise_backward_kernel(const __grid_constant__ PairwiseBackwardArguments p) {
  for (int64_t row = first_row(); row < p.rows.count; row += row_step()) {
    int64_t offset[6];
    p.rows.offsets(row, offset);
    PairwiseRow r{load_any(p.grad, p.grad_dtype, offset[2]), 0.0f, 0.0f, 0.0f};
    if (p.metric != kDot) r.score = p.scores[offset[3]];
    if (p.metric == kCosine) {
      r.norm_a = p.norm_a[offset[4]];
      r.norm_b = p.norm_b[offset[5]];
    }
    const T* a = static_cast<const T*>(p.a) + offset[0];
    const T* b = static_cast<const T*>(p.b) + offset[1];
    for (int64_t c = lane_of_warp() * N; c < p.dim; c += kWarp * N) {
      float x[N], y[N];
      load(a + c * p.a_stride, x);
      load(b + c * p.b_stride, y);
#pragma unroll
      for (int i = 0; i < N; ++i) pairwise_gradient(p.metric, r, p.eps, x[i], y[i]);
      store(static_cast<T*>(p.grad_a) + row * p.dim + c, x);
      store(static_cast<T*>(p.grad_b) + row * p.dim + c, y);
    }
  }
}

inline cudaError_t run_pairwise_similarity_backward(Dtype dtype, const PairwiseBackwardArguments& p,
                                                    cudaStream_t stream) {
  if (p.rows.count == 0 || p.dim == 0) return cudaSuccess;
  const int64_t blocks = ceil_divide(p.rows.count, kWarps);
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (vectors(p.a, sizeof(T), p.a_stride, p.dim, p.rows.dims, p.rows.stride[0]) &&
        vectors(p.b, sizeof(T), p.b_stride, p.dim, p.rows.dims, p.rows.stride[1])) {
      return launch(pairwise_backward_kernel<T, kVector<T>>, blocks, 1, stream, p);
    }
    return launch(pairwise_backward_kernel<T, 1>, blocks, 1, stream, p);
  });
}

}  // namespace
}  // namespace sentfast
