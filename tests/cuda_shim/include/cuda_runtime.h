// A thin CUDA on the CPU: lets a C++ compiler build the kernels of csrc/cuda unchanged, so that sanitizers see them.
// One block runs at a time; each of its threads is a fibre, switched at barriers and shuffles in a random order.
// Shared arrays are static, so AddressSanitizer guards them.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace cuda_shim {

struct Index {
  unsigned x, y, z;
};
// Runs `body` once per thread of every block.
void run(const cudaLaunchConfig_t& config, const std::function<void()>& body);
void block_barrier();
// Leaves 8 bytes for the other lanes of the warp and returns those of `lane`.
uint64_t exchange(unsigned mask, uint64_t mine, int lane);
int lane_number();

struct Counts {
  int64_t launches, blocks, switches;
};
extern Counts counts;

template <typename V>
V shuffle(unsigned mask, V value, int lane) {
  static_assert(sizeof(V) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(V));
  bits = exchange(mask, bits, lane);
  memcpy(&value, &bits, sizeof(V));
  return value;
}

}  // namespace cuda_shim

extern cuda_shim::Index threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads() { cuda_shim::block_barrier(); }

template <typename V>
V __shfl_xor_sync(unsigned mask, V value, int lanes) {
  return cuda_shim::shuffle(mask, value, cuda_shim::lane_number() ^ lanes);
}

template <typename Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments),
                               const Arguments& arguments) {
  if (config->gridDim.x == 0 || config->gridDim.y == 0) return cudaErrorInvalidConfiguration;
  if (config->gridDim.y > 65535) return cudaErrorInvalidConfiguration;
  cuda_shim::run(*config, [&] { kernel(arguments); });
  return cudaSuccess;
}
