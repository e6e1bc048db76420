// Which rows of a padded or packed batch a sequence's tokens are.
#pragma once

#include "common.cuh"

namespace sentfast {
namespace {

// A batch as the kernels see it: padded [batch, length] with or without a mask, or packed [length] with cu_seqlens.
struct Batch {
  int64_t batch;
  int64_t length;
  // At most length.
  int64_t prompt_length;
  // Integers of mask_bytes each, non-zero where there is a token; null: everywhere.
  const void* attention_mask;
  int32_t mask_bytes;
  int64_t mask_stride[2];
  // Null: padded.
  const int32_t* cu_seqlens;
  int64_t cu_seqlens_stride;

  __host__ __device__ bool packed() const { return cu_seqlens != nullptr; }

  __device__ bool token(int64_t sequence, int64_t position) const {
    const int64_t i = sequence * mask_stride[0] + position * mask_stride[1];
    if (mask_bytes == 1) return static_cast<const int8_t*>(attention_mask)[i] != 0;
    if (mask_bytes == 8) return static_cast<const int64_t*>(attention_mask)[i] != 0;
    if (mask_bytes == 4) return static_cast<const int32_t*>(attention_mask)[i] != 0;
    return static_cast<const int16_t*>(attention_mask)[i] != 0;
  }

  // Whatever cu_seqlens holds, no row outside the tensor is touched.
  __device__ int64_t start(int64_t sequence) const {
    return larger(0, smaller(length, cu_seqlens[sequence * cu_seqlens_stride]));
  }
};

// One sequence. Positions count from `origin`, its first row; those in use lie in [begin, end).
struct Tokens {
  int64_t origin;
  int64_t begin;
  int64_t end;
  // Left padding: the first token's position.
  int64_t shift;
  // The positions of `cls` and `lasttoken`, -1 where the result is the zero vector.
  int64_t first;
  int64_t last;
  int64_t count;
  // Sum of the weights of `weightedmean`.
  int64_t weight;

  __device__ bool holes() const { return count != end - begin; }
};

__device__ inline Tokens unmasked_tokens(const Batch& batch, int64_t sequence) {
  int64_t length = batch.length;
  Tokens tokens{};
  tokens.origin = sequence * length;
  if (batch.packed()) {
    tokens.origin = batch.start(sequence);
    length = larger(0, batch.start(sequence + 1) - tokens.origin);
  }
  const int64_t begin = smaller(batch.prompt_length, length);
  tokens.begin = begin;
  tokens.end = length;
  tokens.count = length - begin;
  tokens.weight = (length * (length + 1) - begin * (begin + 1)) / 2;
  // With nothing but a prompt, `cls` is the first row; `lasttoken` is the last one if packed, else zero.
  const bool none = tokens.count == 0;
  tokens.first = length == 0 ? -1 : (none ? 0 : begin);
  tokens.last = none && !batch.packed() ? -1 : length - 1;
  return tokens;
}

// All threads of the block together.
__device__ inline Tokens masked_tokens(const Batch& batch, int64_t sequence) {
  const int64_t length = batch.length;
  int64_t shift = length;
  for (int64_t t = threadIdx.x; t < length; t += kThreads) {
    if (batch.token(sequence, t)) {
      shift = t;
      break;
    }
  }
  shift = reduce_block(shift, Smallest());
  Tokens tokens{};
  tokens.origin = sequence * length;
  tokens.shift = shift == length ? 0 : shift;
  int64_t first = length, last = -1, count = 0, weight = 0;
  for (int64_t t = shift + batch.prompt_length + threadIdx.x; t < length; t += kThreads) {
    if (!batch.token(sequence, t)) continue;
    first = smaller(first, t);
    last = t;
    ++count;
    weight += t - shift + 1;
  }
  tokens.last = reduce_block(last, Largest());
  tokens.count = reduce_block(count, Sum());
  tokens.weight = reduce_block(weight, Sum());
  tokens.begin = reduce_block(first, Smallest());
  if (tokens.count == 0) tokens.begin = 0;
  tokens.end = tokens.last + 1;
  tokens.first = length == 0 ? -1 : tokens.begin;
  return tokens;
}

__device__ inline Tokens tokens_of(const Batch& batch, int64_t sequence) {
  return batch.attention_mask == nullptr ? unmasked_tokens(batch, sequence) : masked_tokens(batch, sequence);
}

}  // namespace
}  // namespace sentfast
