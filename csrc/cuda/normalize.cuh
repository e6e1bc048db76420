// L2 normalisation, forward, and what all kernels with one warp per row share.
#pragma once

#include "rows.cuh"

namespace sentfast {
namespace {

// The warp of this thread among all of them: the first row it takes, and the step to the next.
__device__ inline int64_t first_row() { return int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; }
__device__ inline int64_t row_step() { return int64_t{gridDim.x} * kWarps; }
__device__ inline int lane_of_warp() { return threadIdx.x % kWarp; }

// Unlike fmaxf, keeps NaN.
__device__ inline float at_least(float norm, float eps) { return norm < eps ? eps : norm; }

// The norm of a row by the sum of its squares. A row of one column is not squared, as in PyTorch's vector_norm, so that
// it cannot leave float32's range.
template <typename T>
__device__ inline float norm_of(const T* x, int64_t dim, float squares) {
  return dim == 1 ? fabsf(to_float(x[0])) : sqrtf(squares);
}

// (grad - y * along) / norm; below eps the denominator of the forward pass was a constant.
__device__ inline float normalize_gradient(float grad, float y, float along, float norm, float eps) {
  return norm < eps ? grad / eps : (grad - y * along) / norm;
}

struct NormalizeArguments {
  Rows<1> rows;
  int64_t dim;
  const void* x;
  int64_t x_stride;
  // Contiguous.
  void* y;
  float* norm;
  float eps;
};

template <typename T, typename Out, int N>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    l2_normalize_kernel(const __grid_constant__ NormalizeArguments a) {
  for (int64_t row = first_row(); row < a.rows.count; row += row_step()) {
    int64_t offset[1];
    a.rows.offsets(row, offset);
    const T* x = static_cast<const T*>(a.x) + offset[0];
    float squares = 0.0f;
#pragma unroll 4
    for (int64_t c = lane_of_warp() * N; c < a.dim; c += kWarp * N) {
      float values[N];
      load(x + c * a.x_stride, values);
#pragma unroll
      for (int i = 0; i < N; ++i) squares += values[i] * values[i];
    }
    const float norm = norm_of(x, a.dim, reduce_warp(squares, Sum()));
    const float denominator = at_least(norm, a.eps);
    Out* y = static_cast<Out*>(a.y) + row * a.dim;
#pragma unroll 4
    for (int64_t c = lane_of_warp() * N; c < a.dim; c += kWarp * N) {
      float values[N];
      load(x + c * a.x_stride, values);
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] /= denominator;
      store(y + c, values);
    }
    if (lane_of_warp() == 0) a.norm[row] = norm;
  }
}

// y's dtype is x's, or x is float32.
inline cudaError_t run_l2_normalize(Dtype dtype, Dtype out_dtype, const NormalizeArguments& a, cudaStream_t stream) {
  if (a.rows.count == 0) return cudaSuccess;
  const int64_t blocks = ceil_divide(a.rows.count, kWarps);
  const auto start = [&](auto x_zero, auto y_zero) {
    using T = decltype(x_zero);
    using Out = decltype(y_zero);
    constexpr int N = kVector<Out>;
    if (vectors(a.x, sizeof(T), a.x_stride, a.dim, a.rows.dims, a.rows.stride[0]) && a.dim % N == 0) {
      return launch(l2_normalize_kernel<T, Out, N>, blocks, 1, stream, a);
    }
    return launch(l2_normalize_kernel<T, Out, 1>, blocks, 1, stream, a);
  };
  if (dtype == out_dtype) return dispatch(dtype, [&](auto zero) { return start(zero, zero); });
  return dispatch(out_dtype, [&](auto zero) { return start(float{}, zero); });
}

}  // namespace
}  // namespace sentfast
