// What the CUDA kernels share: dtypes, vector loads and stores, reductions, launching. Knows no torch.
// tests/cuda_shim compiles this and the kernels with a plain C++ compiler.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sentfast {

enum class Dtype : int32_t { kFloat, kBFloat16, kHalf };

namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Blocks per multiprocessor: left to itself, ptxas spills a little to fit in more.
constexpr int kMinBlocks = 2;
constexpr unsigned kAllLanes = 0xffffffffu;

// The most blocks in x (tests make it small): kernels loop over what a grid does not cover.
#ifndef SENTFAST_GRID_LIMIT
#define SENTFAST_GRID_LIMIT 2147483647
#endif
constexpr int64_t kGridLimit = SENTFAST_GRID_LIMIT;
constexpr int64_t kGridLimitY = kGridLimit < 65535 ? kGridLimit : 65535;

// Elements of T in a 128-bit vector.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

__host__ __device__ constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- elements

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <int kBytes>
struct Bits;
template <>
struct Bits<8> {
  using Type = uint2;
};
template <>
struct Bits<16> {
  using Type = uint4;
};

// N neighbouring elements, in vectors of up to 128 bits: the pointer is aligned to them (see `vectors`).
template <int N, typename T>
__device__ inline void load(const T* pointer, float (&values)[N]) {
  if constexpr (N == 1) {
    values[0] = to_float(*pointer);
  } else {
    constexpr int kBytes = N * static_cast<int>(sizeof(T));
    constexpr int kPart = kBytes < 16 ? kBytes : 16;
    using Part = typename Bits<kPart>::Type;
    alignas(16) T raw[N];
#pragma unroll
    for (int i = 0; i < kBytes / kPart; ++i) {
      reinterpret_cast<Part*>(raw)[i] = reinterpret_cast<const Part*>(pointer)[i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = to_float(raw[i]);
  }
}

template <int N, typename T>
__device__ inline void store(T* pointer, const float (&values)[N]) {
  if constexpr (N == 1) {
    *pointer = from_float<T>(values[0]);
  } else {
    constexpr int kBytes = N * static_cast<int>(sizeof(T));
    constexpr int kPart = kBytes < 16 ? kBytes : 16;
    using Part = typename Bits<kPart>::Type;
    alignas(16) T raw[N];
#pragma unroll
    for (int i = 0; i < N; ++i) raw[i] = from_float<T>(values[i]);
#pragma unroll
    for (int i = 0; i < kBytes / kPart; ++i) {
      reinterpret_cast<Part*>(pointer)[i] = reinterpret_cast<const Part*>(raw)[i];
    }
  }
}

// One element of a dtype that is known at run time only.
__device__ inline float load_any(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::kFloat) return static_cast<const float*>(data)[index];
  if (dtype == Dtype::kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
  return to_float(static_cast<const __half*>(data)[index]);
}

// Whether rows of `bytes`-wide elements can be read in 128-bit vectors: unit column stride, all starts aligned.
inline bool vectors(const void* data, int64_t bytes, int64_t column_stride, int64_t columns, int dims,
                    const int64_t* strides) {
  bool fits = column_stride == 1 && columns * bytes % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int i = 0; i < dims; ++i) fits = fits && strides[i] * bytes % 16 == 0;
  return fits;
}

// ---- reductions

struct Sum {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Smallest {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return smaller(a, b); }
};
struct Largest {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return larger(a, b); }
};

// The same result in every lane, in a fixed order.
template <typename V, typename Operation>
__device__ inline V reduce_warp(V value, Operation operation) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    value = operation(value, __shfl_xor_sync(kAllLanes, value, lane));
  }
  return value;
}

// The same result in every thread of a block of kThreads, in a fixed order.
template <typename V, typename Operation>
__device__ inline V reduce_block(V value, Operation operation) {
  __shared__ V partial[kWarps];
  value = reduce_warp(value, operation);
  // Nobody may still be reading the last result.
  __syncthreads();
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = partial[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = operation(value, partial[warp]);
  return value;
}

// ---- launching

template <typename Arguments>
inline cudaError_t launch(void (*kernel)(Arguments), int64_t blocks_x, int64_t blocks_y, cudaStream_t stream,
                          const Arguments& arguments, int threads = kThreads) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(smaller(blocks_x, kGridLimit)),
                        static_cast<unsigned>(smaller(blocks_y, kGridLimitY)), 1);
  config.blockDim = dim3(static_cast<unsigned>(threads), 1, 1);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

// Calls `function` with a value of the element type.
template <typename Function>
inline cudaError_t dispatch(Dtype dtype, Function&& function) {
  if (dtype == Dtype::kFloat) return function(float{});
  if (dtype == Dtype::kBFloat16) return function(__nv_bfloat16{});
  return function(__half{});
}

}  // namespace
}  // namespace sentfast
