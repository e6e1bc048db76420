// Pooling, backward: every gradient element is written once, by the thread that owns its row and columns.
#pragma once

#include "pooling.cuh"

namespace sentfast {
namespace {

constexpr int kRowsOfBlock = 4 * kSlots;

// What the backward pass must know of a sequence before any of its rows can be written.
struct SequencePlan {
  Tokens tokens;
  // <out, grad>, for the gradient of the normalisation, and the norm.
  float along;
  float norm;
};

struct PoolBackwardArguments {
  Batch batch;
  Modes modes;
  int64_t dim;
  // [batch, modes * dim].
  const void* grad;
  int64_t grad_stride[2];
  // The pooled rows, grad's dtype, and their norms; null unless normalised.
  const void* out;
  int64_t out_stride[2];
  const float* norm;
  int64_t norm_stride;
  // Null without `max`.
  const int32_t* argmax;
  int64_t argmax_stride[2];
  // Scratch [batch]; null where `needs_plans` is false.
  SequencePlan* plans;
  // Contiguous, grad's dtype.
  void* grad_x;

  __host__ __device__ bool normalized() const { return norm != nullptr; }
};

inline bool needs_plans(bool masked, bool normalized) { return masked || normalized; }

template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    pool_plan_kernel(const __grid_constant__ PoolBackwardArguments a) {
  for (int64_t sequence = blockIdx.x; sequence < a.batch.batch; sequence += gridDim.x) {
    SequencePlan plan{tokens_of(a.batch, sequence), 0.0f, 0.0f};
    if (a.normalized()) {
      const T* grad = static_cast<const T*>(a.grad) + sequence * a.grad_stride[0];
      const T* out = static_cast<const T*>(a.out) + sequence * a.out_stride[0];
      for (int64_t c = threadIdx.x; c < a.dim * a.modes.count; c += kThreads) {
        plan.along += to_float(out[c * a.out_stride[1]]) * to_float(grad[c * a.grad_stride[1]]);
      }
      plan.along = reduce_block(plan.along, Sum());
      plan.norm = a.norm[sequence * a.norm_stride];
    }
    if (threadIdx.x == 0) a.plans[sequence] = plan;
  }
}

// The sequence of a row: in a packed batch the first that ends behind it, `batch` where none does.
__device__ inline int64_t sequence_of(const Batch& batch, int64_t row) {
  if (!batch.packed()) return row / batch.length;
  int64_t low = 0, high = batch.batch;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (batch.start(middle + 1) > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// The gradient of N columns to the tokens of one sequence.
template <typename T, int N, bool kHasMax>
struct SequenceGradient {
  static constexpr int kMaxN = kHasMax ? N : 1;
  int64_t sequence = -1;
  int64_t column;
  SequencePlan plan;
  // To each token in use, and to each times its weight.
  float uniform[N];
  float weighted[N];
  // To the position that `max` took.
  float top[kMaxN];
  int32_t index[kMaxN];

  // Of mode number m, before the normalisation.
  __device__ void pooled(const PoolBackwardArguments& a, int m, float (&g)[N]) const {
    const int64_t c = m * a.dim + column;
    load(static_cast<const T*>(a.grad) + sequence * a.grad_stride[0] + c * a.grad_stride[1], g);
    if (!a.normalized()) return;
    float y[N];
    load(static_cast<const T*>(a.out) + sequence * a.out_stride[0] + c * a.out_stride[1], y);
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] = normalize_gradient(g[i], y[i], plan.along, plan.norm, kNormalizeEps);
  }

  __device__ void read(const PoolBackwardArguments& a, int64_t new_sequence, int64_t new_column) {
    sequence = new_sequence;
    column = new_column;
    plan = a.plans != nullptr ? a.plans[sequence] : SequencePlan{unmasked_tokens(a.batch, sequence), 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < N; ++i) uniform[i] = weighted[i] = 0.0f;
    if constexpr (kHasMax) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        top[i] = 0.0f;
        index[i] = a.argmax[sequence * a.argmax_stride[0] + (column + i) * a.argmax_stride[1]];
      }
    }
    for (int m = 0; m < a.modes.count; ++m) read_mode(a, m);
  }

  __device__ void read_mode(const PoolBackwardArguments& a, int m) {
    const int32_t mode = a.modes.mode[m];
    if (mode == kCls || mode == kLastToken) return;
    float g[N];
    pooled(a, m, g);
    const float scale = mode == kMax ? 1.0f : mean_scale(mode, plan.tokens);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (mode == kMax) {
        if constexpr (kHasMax) top[i] += g[i];
      } else if (mode == kWeightedMean) {
        weighted[i] += g[i] * scale;
      } else {
        uniform[i] += g[i] * scale;
      }
    }
  }

  __device__ void add_single(const PoolBackwardArguments& a, PoolingMode mode, float (&values)[N]) const {
    for (int m = 0; m < a.modes.count; ++m) {
      if (a.modes.mode[m] != mode) continue;
      float g[N];
      pooled(a, m, g);
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] += g[i];
    }
  }

  // The gradient at `position`, added to values. A position in front of the sequence belongs to none.
  __device__ void add(const PoolBackwardArguments& a, int64_t position, float (&values)[N]) const {
    const Tokens& tokens = plan.tokens;
    if (position < 0) return;
    if (position >= tokens.begin && position < tokens.end && (!tokens.holes() || a.batch.token(sequence, position))) {
      const float weight = static_cast<float>(position - tokens.shift + 1);
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] += uniform[i] + weighted[i] * weight;
    }
    if (position == tokens.first) add_single(a, kCls, values);
    if (position == tokens.last) add_single(a, kLastToken, values);
    if constexpr (kHasMax) {
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] += index[i] == position ? top[i] : 0.0f;
    }
  }
};

template <typename T, int N, bool kHasMax>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    pool_backward_kernel(const __grid_constant__ PoolBackwardArguments a) {
  constexpr int64_t kColumns = kLanes * N;
  const int64_t rows = a.batch.packed() ? a.batch.length : a.batch.batch * a.batch.length;
  const int lane = threadIdx.x % kLanes, slot = threadIdx.x / kLanes;
  for (int64_t block = blockIdx.x * int64_t{kRowsOfBlock}; block < rows; block += int64_t{gridDim.x} * kRowsOfBlock) {
    for (int64_t column = blockIdx.y * kColumns + lane * N; column < a.dim; column += gridDim.y * kColumns) {
      SequenceGradient<T, N, kHasMax> gradient;
      for (int64_t row = block + slot; row < smaller(rows, block + kRowsOfBlock); row += kSlots) {
        float values[N] = {};
        const int64_t sequence = sequence_of(a.batch, row);
        if (sequence < a.batch.batch) {
          if (sequence != gradient.sequence) gradient.read(a, sequence, column);
          gradient.add(a, row - gradient.plan.tokens.origin, values);
        }
        store(static_cast<T*>(a.grad_x) + row * a.dim + column, values);
      }
    }
  }
}

template <typename T, int N>
cudaError_t launch_pool_backward(const PoolBackwardArguments& a, int64_t rows, cudaStream_t stream) {
  const int64_t blocks = ceil_divide(rows, kRowsOfBlock), tiles = ceil_divide(a.dim, kLanes * N);
  if (a.modes.has(kMax)) return launch(pool_backward_kernel<T, N, true>, blocks, tiles, stream, a);
  return launch(pool_backward_kernel<T, N, false>, blocks, tiles, stream, a);
}

inline cudaError_t run_pool_backward(Dtype dtype, const PoolBackwardArguments& a, cudaStream_t stream) {
  const int64_t rows = a.batch.packed() ? a.batch.length : a.batch.batch * a.batch.length;
  if (rows == 0 || a.dim == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.plans != nullptr && a.batch.batch > 0) {
      const cudaError_t error = launch(pool_plan_kernel<T>, a.batch.batch, 1, stream, a);
      if (error != cudaSuccess) return error;
    }
    if (vectors(a.grad, sizeof(T), a.grad_stride[1], a.dim, 1, a.grad_stride) &&
        (!a.normalized() || vectors(a.out, sizeof(T), a.out_stride[1], a.dim, 1, a.out_stride))) {
      return launch_pool_backward<T, kVector<T>>(a, rows, stream);
    }
    return launch_pool_backward<T, 1>(a, rows, stream);
  });
}

}  // namespace
}  // namespace sentfast
