// Mistakes on purpose: shows that the shim finds what it is there to find. `selftest <name>` must not exit with 0,
// `selftest correct` and `selftest correct_copies` must.
#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>
#include <tensor_core_on_host.h>

#include <vector>

namespace {

constexpr int kThreads = 64;

enum class Wait { kBefore, kAfter, kNever };

struct Arguments {
  int* out;
  const int* in;
  Wait wait;
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

// As `reverse`, of numbers that are copied by themselves.
__global__ void fetch(const Arguments a) {
  __shared__ struct alignas(16) {
    int values[kThreads];
  } numbers;
  const int me = static_cast<int>(threadIdx.x);
  if (me % 4 == 0) sentfast::copy_async(&numbers.values[me], &a.in[me], true);
  if (a.wait == Wait::kBefore) sentfast::copy_wait();
  __syncthreads();
  a.out[me] = numbers.values[kThreads - 1 - me];
  if (a.wait == Wait::kAfter) sentfast::copy_wait();
}

}  // namespace

int main(int count, char** values) {
  const char* name = count > 1 ? values[1] : "correct";
  // One element too few for the mistake "read past the end" of a buffer.
  std::vector<int> out(strcmp(name, "overrun") == 0 ? kThreads - 1 : kThreads, -1);
  alignas(16) int in[kThreads];
  for (int i = 0; i < kThreads; ++i) in[i] = i;
  const auto is = [&](const char* mistake) { return strcmp(name, mistake) == 0; };
  const Wait wait = is("late_wait") ? Wait::kAfter : (is("no_wait") ? Wait::kNever : Wait::kBefore);
  Arguments arguments{out.data(), in, wait, !is("no_barrier"), is("shared_overrun") ? 1 : 0};
  cudaLaunchConfig_t config;
  config.blockDim = dim3(kThreads);
  const bool fetches = is("late_wait") || is("no_wait") || is("correct_copies");
  cudaLaunchKernelEx(&config, fetches ? fetch : (is("diverge") ? diverge : reverse), arguments);
  for (size_t i = 0; i < out.size(); ++i) {
    if (out[i] != static_cast<int>(out.size() - 1 - i)) {
      printf("wrong at %d: %d\n", static_cast<int>(i), out[i]);
      return 1;
    }
  }
  return 0;
}
