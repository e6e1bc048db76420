// Mistakes on purpose: shows that the shim finds what it is there to find. `selftest <name>` must not exit with 0,
// `selftest correct` must.
#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

#include <vector>

namespace {

constexpr int kThreads = 64;

struct Arguments {
  int* out;
  bool barrier;
  int step;
};

// Reverses the thread numbers of a block through shared memory.
__global__ void reverse(const Arguments a) {
  __shared__ int numbers[kThreads];
  const int me = static_cast<int>(threadIdx.x);
  numbers[me + a.step] = me;
  if (a.barrier) __syncthreads();
  a.out[me] = numbers[kThreads - 1 - me];
}

// A barrier that only half of the block reaches.
__global__ void diverge(const Arguments a) {
  if (threadIdx.x < kThreads / 2) __syncthreads();
  if (threadIdx.x == 0) a.out[0] = __shfl_xor_sync(0xffffffffu, 1, 1);
}

}  // namespace

int main(int count, char** values) {
  const char* name = count > 1 ? values[1] : "correct";
  // One element too few for the mistake "read past the end" of a buffer.
  std::vector<int> out(strcmp(name, "overrun") == 0 ? kThreads - 1 : kThreads, -1);
  Arguments arguments{out.data(), strcmp(name, "no_barrier") != 0, strcmp(name, "shared_overrun") == 0 ? 1 : 0};
  cudaLaunchConfig_t config;
  config.blockDim = dim3(kThreads);
  cudaLaunchKernelEx(&config, strcmp(name, "diverge") == 0 ? diverge : reverse, arguments);
  for (size_t i = 0; i < out.size(); ++i) {
    if (out[i] != static_cast<int>(out.size() - 1 - i)) {
      printf("wrong at %d: %d\n", static_cast<int>(i), out[i]);
      return 1;
    }
  }
  return 0;
}
