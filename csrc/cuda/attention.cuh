// Attention of packed sequences of up to 512 tokens, forward, in half precision, on tensor cores.
// A block of four warps has 64 or 128 queries of one head of one sequence, and walks over the keys 64 at a time with a
// running softmax. A warp has 16 or 32 queries; queries, sums and weights stay in its registers. The keys and values of
// the next step are copied into shared memory meanwhile.
// They are not held there all at once: 512 of them with heads of 64 are 128 KiB, more than an sm_86, 89 or 120 gives a
// block; in steps it is 38 KiB, so that several blocks share a multiprocessor and one loads while another computes.
#pragma once

#include "tensor_core.cuh"

namespace sentfast {
namespace {

constexpr int64_t kMostKeys = 512;
constexpr int kAttentionThreads = 128;
// Keys of a step.
constexpr int kKeys = 64;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// q, k, v: [tokens, heads, dim], strides of token and head; heads lie in whole vectors. out: the same, contiguous.
struct AttentionArguments {
  const void* q;
  const void* k;
  const void* v;
  int64_t q_stride[2];
  int64_t k_stride[2];
  int64_t v_stride[2];
  // [sequences + 1].
  const int32_t* cu_seqlens;
  int64_t cu_seqlens_stride;
  // [heads, 2 * reach - 1], added to the scores by key - query + reach - 1; null: none.
  const float* bias;
  int64_t reach;
  void* out;
  // [heads, tokens].
  float* lse;
  int64_t tokens;
  int64_t heads;
  int64_t sequences;
  int64_t max_seqlen;
  float scale;
  // Of queries, for each sequence and head; set by the launcher.
  int64_t blocks;
};

// In shared memory. Rows are padded by a vector, so that eight of them lie in different banks.
template <typename T, int kDim, int kQueries>
struct alignas(16) AttentionTiles {
  // Twice kKeys keys and then as many values. The queries lie in the second half before its first keys come, the
  // results in the first half at the end.
  T rows[4 * kKeys][kDim + kVector<T>];
  // The biases of this block, times log2(e), by key - query + kQueries - 1 with queries counted from its first.
  float bias[kMostKeys + kQueries];
};

// The block of queries that a thread block is at.
struct AttentionBlock {
  int64_t head;
  // Its sequence's, within the tensor whatever cu_seqlens holds.
  int64_t first;
  int length;
  // In its sequence.
  int begin;

  __device__ AttentionBlock(const AttentionArguments& p, int64_t number, int queries) {
    head = number / p.blocks % p.heads;
    const int32_t* ends = p.cu_seqlens + number / p.blocks / p.heads * p.cu_seqlens_stride;
    first = larger(0, smaller(p.tokens, ends[0]));
    length = static_cast<int>(larger(first, smaller(p.tokens, ends[p.cu_seqlens_stride])) - first);
    begin = static_cast<int>(number % p.blocks) * queries;
  }
};

// Starts to copy rows of a sequence, zeros past its end.
template <int kRows, typename T, int kDim, int kQueries>
__device__ inline void copy_rows(AttentionTiles<T, kDim, kQueries>& tiles, int at, const void* data,
                                 const int64_t (&stride)[2], const AttentionBlock& block, int row0) {
  constexpr int kParts = kDim / kVector<T>, kStep = kAttentionThreads / kParts;
  const int row = static_cast<int>(threadIdx.x) / kParts, column = static_cast<int>(threadIdx.x) % kParts * kVector<T>;
  const T* from = static_cast<const T*>(data) + block.first * stride[0] + block.head * stride[1] + column;
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    const int source = row0 + row + i;
    // Past the end the last row's address stands, which is not read.
    copy_async(&tiles.rows[at + row + i][column], from + smaller(source, block.length - 1) * stride[0],
               source < block.length);
  }
}

// The products of a warp's queries with kKeys keys, which start at row `at` of the tiles.
template <int kStrips, typename T, int kDim, int kQueries>
__device__ inline void multiply_keys(const AttentionTiles<T, kDim, kQueries>& tiles, int at,
                                     const uint32_t (&query)[kStrips][kDim / 16][4],
                                     float (&score)[kStrips][kKeys / 8][4]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int keys = 0; keys < kKeys / 16; ++keys) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[s][2 * keys][i] = score[s][2 * keys + 1][i] = 0.0f;
    }
#pragma unroll
    for (int columns = 0; columns < kDim / 16; ++columns) {
      uint32_t key[4];
      load_matrices(&tiles.rows[at + 16 * keys + lane / 16 * 8 + lane % 8][16 * columns + lane / 8 % 2 * 8], key);
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        multiply<T>(score[s][2 * keys], query[s][columns], key[0], key[1]);
        multiply<T>(score[s][2 * keys + 1], query[s][columns], key[2], key[3]);
      }
    }
  }
}

// Adds the values, which start at row `at` of the tiles, times the weights.
template <int kStrips, typename T, int kDim, int kQueries>
__device__ inline void add_values(const AttentionTiles<T, kDim, kQueries>& tiles, int at,
                                  const float (&weight)[kStrips][kKeys / 8][4], float (&result)[kStrips][kDim / 8][4]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int keys = 0; keys < kKeys / 16; ++keys) {
    // A sum's parts are those of an operand whose columns are its own.
    uint32_t part[kStrips][4];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&w)[4] = weight[s][2 * keys + i / 2];
        part[s][i] = pack<T>(w[i % 2 * 2], w[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int columns = 0; columns < kDim / 16; ++columns) {
      uint32_t value[4];
      load_transposed(&tiles.rows[at + 16 * keys + lane % 16][16 * columns + lane / 16 * 8], value);
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        multiply<T>(result[s][2 * columns], part[s], value[0], value[1]);
        multiply<T>(result[s][2 * columns + 1], part[s], value[2], value[3]);
      }
    }
  }
}

template <typename V, typename Operation>
__device__ inline V reduce_quad(V value, Operation operation) {
  value = operation(value, __shfl_xor_sync(kAllLanes, value, 1));
  return operation(value, __shfl_xor_sync(kAllLanes, value, 2));
}

struct Maximum {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// A lane has two rows of each strip: the running softmax of one.
struct Softmax {
  // Of the scores times log2(e) so far; the sum over this lane's columns alone.
  float top = -INFINITY;
  float total = 0.0f;

  // Turns the row's scores, of half h of the strip, into weights; returns by what earlier weights shrink.
  __device__ float weigh(float (&score)[kKeys / 8][4], int h) {
    float highest = top;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) highest = fmaxf(highest, fmaxf(score[n][2 * h], score[n][2 * h + 1]));
    highest = reduce_quad(highest, Maximum{});
    // A row that has seen no number yet must not make NaN of -inf - -inf.
    const float shift = highest == -INFINITY ? 0.0f : highest;
    const float shrink = fast_exp2(top - shift);
    top = highest;
    total *= shrink;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; ++i) {
        score[n][i] = fast_exp2(score[n][i] - shift);
        total += score[n][i];
      }
    }
    return shrink;
  }
};

// Scores times log2(e) of a step that starts at key `key0`, for queries that start at `query0` of the block.
template <typename T, int kDim, int kQueries>
__device__ inline void finish_scores(const AttentionArguments& p, const AttentionTiles<T, kDim, kQueries>& tiles,
                                     int keys_left, int key0, int query0, float (&score)[kKeys / 8][4]) {
  const int lane = threadIdx.x % kWarp;
  const float scale = p.scale * kLog2e;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = 8 * n + lane % 4 * 2 + i % 2;
      score[n][i] *= scale;
      if (p.bias != nullptr) {
        score[n][i] += tiles.bias[key0 + key - (query0 + lane / 4 + i / 2 * 8) + kQueries - 1];
      }
      if (key >= keys_left) score[n][i] = -INFINITY;
    }
  }
}

template <typename T, int kDim, int kQueries>
__device__ inline void load_bias(const AttentionArguments& p, const AttentionBlock& block,
                                 AttentionTiles<T, kDim, kQueries>& tiles) {
  const float* zero = p.bias + block.head * (2 * p.reach - 1) + p.reach - 1;
  for (int i = static_cast<int>(threadIdx.x); i < ceil_divide(block.length, kKeys) * kKeys + kQueries - 1;
       i += kAttentionThreads) {
    const int64_t distance = i - kQueries + 1 - block.begin;
    // Queries and keys past the end of the sequence may lie farther apart than the table reaches.
    tiles.bias[i] = distance > -p.reach && distance < p.reach ? zero[distance] * kLog2e : 0.0f;
  }
}

// A stale max_seqlen, for a sequence that is longer: the queries that have a block show it.
template <typename T, int kDim>
__device__ inline void fill_nan(const AttentionArguments& p, const AttentionBlock& block, int queries) {
  const int64_t rows = smaller(queries, block.length - block.begin);
  for (int64_t i = threadIdx.x; i < rows * kDim; i += kAttentionThreads) {
    const int64_t row = block.first + block.begin + i / kDim;
    static_cast<T*>(p.out)[(row * p.heads + block.head) * kDim + i % kDim] = from_float<T>(NAN);
    if (i % kDim == 0) p.lse[block.head * p.tokens + row] = NAN;
  }
}

// Divides a warp's rows by the sums of their weights, and writes them through shared memory in whole vectors.
template <int kStrips, typename T, int kDim, int kQueries>
__device__ inline void write_results(const AttentionArguments& p, const AttentionBlock& block,
                                     AttentionTiles<T, kDim, kQueries>& tiles, Softmax (&softmax)[kStrips][2],
                                     const float (&result)[kStrips][kDim / 8][4]) {
  const int lane = threadIdx.x % kWarp, row0 = threadIdx.x / kWarp * 16 * kStrips;
  const int left = block.length - block.begin;
  const int64_t token = block.first + block.begin;
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = reduce_quad(softmax[s][h].total, Sum{});
      const float inverse = 1.0f / total;
      const int row = row0 + 16 * s + 8 * h + lane / 4;
      if (lane % 4 == 0 && row < left) {
        p.lse[block.head * p.tokens + token + row] = (softmax[s][h].top + log2f(total)) * kLn2;
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const uint32_t two = pack<T>(result[s][n][2 * h] * inverse, result[s][n][2 * h + 1] * inverse);
        *reinterpret_cast<uint32_t*>(&tiles.rows[row][8 * n + lane % 4 * 2]) = two;
      }
    }
  }
  __syncwarp();
  constexpr int kParts = kDim / kVector<T>;
#pragma unroll
  for (int i = 0; i < 16 * kStrips * kParts / kWarp; ++i) {
    const int part = i * kWarp + lane, row = row0 + part / kParts, column = part % kParts * kVector<T>;
    if (row < left) {
      T* to = static_cast<T*>(p.out) + ((token + row) * p.heads + block.head) * kDim + column;
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&tiles.rows[row][column]);
    }
  }
}

// kStrips: of 16 queries, for each warp.
template <typename T, int kDim, int kStrips>
__device__ inline void attend(const AttentionArguments& p, const AttentionBlock& block) {
  constexpr int kQueries = kAttentionThreads / kWarp * 16 * kStrips;
  __shared__ AttentionTiles<T, kDim, kQueries> tiles;
  const int lane = threadIdx.x % kWarp, query0 = threadIdx.x / kWarp * 16 * kStrips;
  // The block before may still be reading.
  __syncthreads();
  copy_rows<kKeys>(tiles, 0, p.k, p.k_stride, block, 0);
  copy_rows<kKeys>(tiles, kKeys, p.v, p.v_stride, block, 0);
  copy_rows<kQueries>(tiles, 2 * kKeys, p.q, p.q_stride, block, block.begin);
  if (p.bias != nullptr) load_bias(p, block, tiles);
  copy_wait();
  __syncthreads();
  uint32_t query[kStrips][kDim / 16][4];
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
#pragma unroll
    for (int columns = 0; columns < kDim / 16; ++columns) {
      load_matrices(&tiles.rows[2 * kKeys + query0 + 16 * s + lane % 16][16 * columns + lane / 16 * 8],
                    query[s][columns]);
    }
  }
  float result[kStrips][kDim / 8][4] = {};
  Softmax softmax[kStrips][2];
  for (int key0 = 0; key0 < block.length; key0 += kKeys) {
    const int now = key0 / kKeys % 2 * 2 * kKeys, next = 2 * kKeys - now;
    copy_wait();
    // Everybody's copies are there, and everybody has read what the next ones overwrite.
    __syncthreads();
    if (key0 + kKeys < block.length) {
      copy_rows<kKeys>(tiles, next, p.k, p.k_stride, block, key0 + kKeys);
      copy_rows<kKeys>(tiles, next + kKeys, p.v, p.v_stride, block, key0 + kKeys);
    }
    float score[kStrips][kKeys / 8][4];
    multiply_keys<kStrips>(tiles, now, query, score);
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      finish_scores(p, tiles, block.length - key0, key0, query0 + 16 * s, score[s]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float shrink = softmax[s][h].weigh(score[s], h);
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          result[s][n][2 * h] *= shrink;
          result[s][n][2 * h + 1] *= shrink;
        }
      }
    }
    add_values<kStrips>(tiles, now + kKeys, score, result);
  }
  // The results go where others may still be reading.
  __syncthreads();
  write_results<kStrips>(p, block, tiles, softmax, result);
}

// Blocks per multiprocessor: 168 registers a thread, or 255 with twice the queries. With one more they spill.
template <int kStrips>
constexpr int kAttentionBlocks = kStrips == 1 ? 3 : 2;

template <typename T, int kDim, int kStrips>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocks<kStrips>)
    attention_kernel(const __grid_constant__ AttentionArguments p) {
  constexpr int kQueries = kAttentionThreads / kWarp * 16 * kStrips;
  for (int64_t i = blockIdx.x; i < p.blocks * p.heads * p.sequences; i += gridDim.x) {
    const AttentionBlock block(p, i, kQueries);
    if (block.begin >= block.length) continue;
    if (block.length > p.blocks * kQueries) {
      fill_nan<T, kDim>(p, block, kQueries);
    } else {
      attend<T, kDim, kStrips>(p, block);
    }
  }
}

template <typename T, int kDim>
cudaError_t launch_attention(AttentionArguments p, cudaStream_t stream) {
  // Longer sequences take twice as many queries a block, for which keys are read half as often.
  const bool wide = p.max_seqlen > 128;
  p.blocks = ceil_divide(p.max_seqlen, wide ? 128 : 64);
  const int64_t blocks = p.blocks * p.heads * p.sequences;
  if (blocks == 0) return cudaSuccess;
  const auto kernel = wide ? attention_kernel<T, kDim, 2> : attention_kernel<T, kDim, 1>;
  return launch(kernel, blocks, 1, stream, p, kAttentionThreads);
}

// dtype: kBFloat16 or kHalf; dim: 32 or 64; p.max_seqlen: up to kMostKeys.
inline cudaError_t run_attention(Dtype dtype, int64_t dim, const AttentionArguments& p, cudaStream_t stream) {
  if (dtype == Dtype::kHalf) {
    return dim == 32 ? launch_attention<__half, 32>(p, stream) : launch_attention<__half, 64>(p, stream);
  }
  return dim == 32 ? launch_attention<__nv_bfloat16, 32>(p, stream) : launch_attention<__nv_bfloat16, 64>(p, stream);
}

}  // namespace
}  // namespace sentfast
