// csrc/cuda/tensor_core.cuh for the CUDA shim, by the layouts that the PTX ISA documents. What one lane holds comes
// from the others through the warp's mailboxes, so an operand that is put together wrongly gives a wrong product here
// too.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace sentfast {
namespace {

inline float wide(__half x) { return __half2float(x); }
inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
inline void narrow(float x, __half& y) { y = __float2half_rn(x); }
inline void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }

inline void copy_async(void* shared, const void* global, bool used) { cuda_shim::copy_later(shared, global, used); }
inline void copy_wait() { cuda_shim::copy_now(); }

// Of matrix i, [row][column] and its neighbour to the right, or below it.
inline uint32_t two_of(const void* const* rows, int i, int row, int column, bool below) {
  const uint16_t* first = static_cast<const uint16_t*>(rows[8 * i + row]);
  const uint16_t* second = below ? static_cast<const uint16_t*>(rows[8 * i + row + 1]) : first + 1;
  return first[column] | uint32_t{second[column]} << 16;
}

inline void load_matrices(const void* row, uint32_t (&part)[4]) {
  cuda_shim::check_aligned(row);
  const void* rows[32];
  cuda_shim::gather(row, rows);
  const int lane = cuda_shim::lane_number();
  for (int i = 0; i < 4; ++i) part[i] = two_of(rows, i, lane / 4, 2 * (lane % 4), false);
}

inline void load_transposed(const void* row, uint32_t (&part)[4]) {
  cuda_shim::check_aligned(row);
  const void* rows[32];
  cuda_shim::gather(row, rows);
  const int lane = cuda_shim::lane_number();
  for (int i = 0; i < 4; ++i) part[i] = two_of(rows, i, 2 * (lane % 4), lane / 4, true);
}

// What a lane holds of a (four pairs) and of b (two), made wide.
struct Operands {
  float a[4][2], b[2][2];
};

template <typename T>
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t pairs[6] = {a[0], a[1], a[2], a[3], b0, b1};
  Operands mine, all[32];
  for (int i = 0; i < 6; ++i) {
    T two[2];
    memcpy(two, &pairs[i], 4);
    float (&to)[2] = i < 4 ? mine.a[i] : mine.b[i - 4];
    for (int j = 0; j < 2; ++j) to[j] = wide(two[j]);
  }
  cuda_shim::gather(mine, all);
  const int lane = cuda_shim::lane_number();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    float total = 0;
    for (int k = 0; k < 16; ++k) {
      // Row and k of a: the lane of row % 8 and k / 2 % 4; its pair by row / 8 and k / 8.
      const float x = all[row % 8 * 4 + k / 2 % 4].a[row / 8 + k / 8 * 2][k % 2];
      const float y = all[column * 4 + k / 2 % 4].b[k / 8][k % 2];
      total += x * y;
    }
    sum[i] += total;
  }
}

template <typename T>
uint32_t pack(float low, float high) {
  T two[2];
  narrow(low, two[0]);
  narrow(high, two[1]);
  uint32_t both;
  memcpy(&both, two, 4);
  return both;
}

inline float fast_exp2(float x) { return exp2f(x); }

}  // namespace
}  // namespace sentfast
