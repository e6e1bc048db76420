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
int lane_number();
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr size_t kMailBytes = 64;
// Leaves up to kMailBytes for the other lanes of the warp and copies what each of the 32 has left, one after the other.
void exchange(unsigned mask, const void* mine, void* all, size_t bytes);
void warp_barrier();
// A copy of 16 bytes, or of zeros, that runs by itself: at once or when the thread waits for it, as it happens.
void copy_later(void* to, const void* from, bool used);
void copy_now();
void check_aligned(const void* pointer);

struct Counts {
  int64_t launches, blocks, switches;
};
extern Counts counts;

template <typename V>
V shuffle(unsigned mask, V value, int lane) {
  V all[32];
  exchange(mask, &value, all, sizeof(V));
  return all[lane];
}

template <typename V>
void gather(const V& mine, V (&all)[32]) {
  static_assert(sizeof(V) <= kMailBytes);
  exchange(kWholeWarp, &mine, all, sizeof(V));
}

}  // namespace cuda_shim

extern cuda_shim::Index threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads() { cuda_shim::block_barrier(); }
inline void __syncwarp() { cuda_shim::warp_barrier(); }

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
