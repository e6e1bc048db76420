// Pooling, forward: one block per sequence and tile of columns; its order of summation depends on that sequence alone.
#pragma once

#include "normalize.cuh"
#include "tokens.cuh"

namespace sentfast {
namespace {

enum PoolingMode : int32_t { kMean, kMax, kCls, kLastToken, kWeightedMean, kMeanSqrtLenTokens };

constexpr int kMaxModes = 8;
constexpr float kNormalizeEps = 1e-12f;

// A block is kLanes threads across columns times kSlots tokens.
constexpr int kLanes = 16;
constexpr int kSlots = kThreads / kLanes;

struct Modes {
  int count;
  int32_t mode[kMaxModes];

  __host__ __device__ bool has(PoolingMode wanted) const {
    bool found = false;
    for (int i = 0; i < count; ++i) found = found || mode[i] == wanted;
    return found;
  }
  // Whether any of them reads all the tokens.
  __host__ __device__ bool reduces() const {
    bool found = false;
    for (int i = 0; i < count; ++i) found = found || (mode[i] != kCls && mode[i] != kLastToken);
    return found;
  }
};

// 1 / denominator of the three means.
__device__ inline float mean_scale(int32_t mode, const Tokens& tokens) {
  const float total = fmaxf(static_cast<float>(mode == kWeightedMean ? tokens.weight : tokens.count), 1e-9f);
  return 1.0f / (mode == kMeanSqrtLenTokens ? sqrtf(total) : total);
}

struct PoolArguments {
  Batch batch;
  Modes modes;
  int64_t dim;
  const void* x;
  // Of the sequence (0 if packed), the row and the column.
  int64_t x_stride[3];
  // [batch, modes * dim], contiguous: x's dtype, or float32 where it will be normalised.
  void* out;
  bool out_is_float;
  // [batch, dim], contiguous; null without `max`.
  int32_t* argmax;
};

// Whether (value, index) stands before (best, best_index) in `max`: NaN first, then the larger, then the earlier.
__device__ inline bool precedes(float value, int32_t index, float best, int32_t best_index) {
  if (index < 0 || best_index < 0) return best_index < 0 && index >= 0;
  const bool nan = value != value, best_nan = best != best;
  if (nan != best_nan) return nan;
  if (!nan && value != best) return value > best;
  return index < best_index;
}

// What one thread has gathered of N columns.
template <int N, bool kHasMax>
struct Gathered {
  static constexpr int kMaxN = kHasMax ? N : 1;
  float sum[N];
  float weighted[N];
  float top[kMaxN];
  int32_t index[kMaxN];

  __device__ Gathered() {
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = weighted[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < kMaxN; ++i) {
      top[i] = -INFINITY;
      index[i] = -1;
    }
  }

  __device__ void add(const float (&values)[N], float weight, int32_t position) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum[i] += values[i];
      weighted[i] += weight * values[i];
      if constexpr (kHasMax) take(i, values[i], position);
    }
  }

  __device__ void take(int i, float value, int32_t position) {
    if (precedes(value, position, top[i], index[i])) {
      top[i] = value;
      index[i] = position;
    }
  }

  // Joins the two token slots of a warp.
  __device__ void join_slots() {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], kLanes);
      weighted[i] += __shfl_xor_sync(kAllLanes, weighted[i], kLanes);
      if constexpr (kHasMax) {
        const float value = __shfl_xor_sync(kAllLanes, top[i], kLanes);
        const int32_t position = __shfl_xor_sync(kAllLanes, index[i], kLanes);
        take(i, value, position);
      }
    }
  }
};

template <typename T, int N, bool kHasMax>
__device__ inline void gather(const PoolArguments& a, int64_t sequence, const Tokens& tokens, const T* x,
                              Gathered<N, kHasMax>& gathered) {
  constexpr int kUnroll = 4;
  const bool holes = tokens.holes();
  for (int64_t t = tokens.begin + threadIdx.x / kLanes; t < tokens.end; t += kUnroll * kSlots) {
    float values[kUnroll][N];
    bool used[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t position = t + u * kSlots;
      used[u] = position < tokens.end && (!holes || a.batch.token(sequence, position));
      if (used[u]) load(x + position * a.x_stride[1], values[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t position = t + u * kSlots;
      if (used[u]) {
        gathered.add(values[u], static_cast<float>(position - tokens.shift + 1), static_cast<int32_t>(position));
      }
    }
  }
}

// One column of the result: every mode of it.
template <typename T>
__device__ inline void write_column(const PoolArguments& a, int64_t sequence, const Tokens& tokens, const T* x,
                                    int64_t column, float sum, float weighted, float top) {
  for (int m = 0; m < a.modes.count; ++m) {
    const int32_t mode = a.modes.mode[m];
    float value;
    if (mode == kCls || mode == kLastToken) {
      const int64_t position = mode == kCls ? tokens.first : tokens.last;
      value = position < 0 ? 0.0f : to_float(x[position * a.x_stride[1] + column * a.x_stride[2]]);
    } else if (mode == kMax) {
      value = top;
    } else {
      value = (mode == kWeightedMean ? weighted : sum) * mean_scale(mode, tokens);
    }
    const int64_t at = (sequence * a.modes.count + m) * a.dim + column;
    if (a.out_is_float) {
      static_cast<float*>(a.out)[at] = value;
    } else {
      static_cast<T*>(a.out)[at] = from_float<T>(value);
    }
  }
}

template <typename T, int N, bool kHasMax>
__device__ inline void pool_tile(const PoolArguments& a, int64_t sequence, const Tokens& tokens, int64_t tile) {
  constexpr int kColumns = kLanes * N;
  constexpr int kMaxColumns = kHasMax ? kColumns : 1;
  // Column i of lane l stands at [i * kLanes + l]: no bank conflicts.
  __shared__ float sums[kWarps][kColumns], weighteds[kWarps][kColumns], tops[kWarps][kMaxColumns];
  __shared__ int32_t indices[kWarps][kMaxColumns];

  const T* x = static_cast<const T*>(a.x);
  x += a.batch.packed() ? tokens.origin * a.x_stride[1] : sequence * a.x_stride[0];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kWarp;
  const int64_t column = tile + lane * N;
  Gathered<N, kHasMax> gathered;
  if (column < a.dim && a.modes.reduces()) gather(a, sequence, tokens, x + column * a.x_stride[2], gathered);
  gathered.join_slots();
  if (threadIdx.x % kWarp < kLanes) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sums[warp][i * kLanes + lane] = gathered.sum[i];
      weighteds[warp][i * kLanes + lane] = gathered.weighted[i];
      if constexpr (kHasMax) {
        tops[warp][i * kLanes + lane] = gathered.top[i];
        indices[warp][i * kLanes + lane] = gathered.index[i];
      }
    }
  }
  __syncthreads();
  const int j = threadIdx.x;
  if (j < kColumns && tile + j < a.dim) {
    const int slot = j % N * kLanes + j / N;
    Gathered<1, kHasMax> total;
    for (int w = 0; w < kWarps; ++w) {
      total.sum[0] += sums[w][slot];
      total.weighted[0] += weighteds[w][slot];
      if constexpr (kHasMax) total.take(0, tops[w][slot], indices[w][slot]);
    }
    write_column(a, sequence, tokens, x, tile + j, total.sum[0], total.weighted[0], total.top[0]);
    if constexpr (kHasMax) a.argmax[sequence * a.dim + tile + j] = total.index[0];
  }
  // The next tile writes the shared sums again.
  __syncthreads();
}

template <typename T, int N, bool kHasMax>
__global__ void __launch_bounds__(kThreads, kMinBlocks) pool_kernel(const __grid_constant__ PoolArguments a) {
  constexpr int64_t kColumns = kLanes * N;
  for (int64_t sequence = blockIdx.x; sequence < a.batch.batch; sequence += gridDim.x) {
    const Tokens tokens = tokens_of(a.batch, sequence);
    for (int64_t tile = blockIdx.y * kColumns; tile < a.dim; tile += gridDim.y * kColumns) {
      pool_tile<T, N, kHasMax>(a, sequence, tokens, tile);
    }
  }
}

template <typename T, int N>
cudaError_t launch_pool(const PoolArguments& a, cudaStream_t stream) {
  const int64_t tiles = ceil_divide(a.dim, kLanes * N);
  if (a.modes.has(kMax)) return launch(pool_kernel<T, N, true>, a.batch.batch, tiles, stream, a);
  return launch(pool_kernel<T, N, false>, a.batch.batch, tiles, stream, a);
}

// Pools; with `norm` ([batch], not null) also divides each result by its norm, from a.out (float32) into `normalized`.
inline cudaError_t run_pool(Dtype dtype, const PoolArguments& a, void* normalized, float* norm, cudaStream_t stream) {
  if (a.batch.batch == 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  if (a.dim > 0) {
    error = dispatch(dtype, [&](auto zero) {
      using T = decltype(zero);
      if (vectors(a.x, sizeof(T), a.x_stride[2], a.dim, 2, a.x_stride)) {
        return launch_pool<T, kVector<T>>(a, stream);
      }
      return launch_pool<T, 1>(a, stream);
    });
  }
  if (norm == nullptr || error != cudaSuccess) return error;
  NormalizeArguments n{};
  n.dim = a.dim * a.modes.count;
  const int64_t size[1] = {a.batch.batch}, stride[1] = {n.dim};
  collapse<1>(1, size, {stride}, n.rows);
  n.x = a.out;
  n.x_stride = 1;
  n.y = normalized;
  n.norm = norm;
  n.eps = kNormalizeEps;
  return run_l2_normalize(Dtype::kFloat, dtype, n, stream);
}

}  // namespace
}  // namespace sentfast
