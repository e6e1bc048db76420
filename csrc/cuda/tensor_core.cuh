// What a warp does with its tensor core: products of 16 x 8 x 16, loads of their operands from shared memory, and
// copies to there that run by themselves (PTX ISA: mma.m16n8k16, ldmatrix, cp.async). For sm_80 and newer. A lane's
// part of an operand, with g = lane / 4 and t = lane % 4; two neighbours in 32 bits:
//   a, 16 x 16: [g][2t] [g + 8][2t] [g][2t + 8] [g + 8][2t + 8]     b, 16 x 8: [2t][g] [2t + 8][g], neighbours below
//   sum, 16 x 8, float32: [g][2t] [g][2t + 1] [g + 8][2t] [g + 8][2t + 1]
#pragma once

#include <type_traits>

#include "common.cuh"

#ifndef __CUDACC__
#include "tensor_core_on_host.h"  // of tests/cuda_shim
#else

namespace sentfast {
namespace {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts to copy 16 bytes, both ends aligned to them; if not `used`, writes zeros and reads nothing.
__device__ inline void copy_async(void* shared, const void* global, bool used) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(used ? 16 : 0)
               : "memory");
}

// Waits for the copies that this thread has started.
__device__ inline void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four matrices of 8 x 8 half numbers. Lanes 8 i to 8 i + 7 point to the rows of matrix i, 16 bytes each. A lane gets
// [g][2t] and its neighbour of each.
__device__ inline void load_matrices(const void* row, uint32_t (&part)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the matrices turned over: [2t][g] and the one below it.
__device__ inline void load_transposed(const void* row, uint32_t (&part)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum += a b.
template <typename T>
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two neighbours of an operand, rounded to the nearest.
template <typename T>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
}

// 2^x to two units in the last place; 0 for -inf.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace
}  // namespace sentfast

#endif
