// Fibres for the CUDA shim. A fibre stops at each barrier or shuffle until all those it must meet have come.
#include <sanitizer/common_interface_defs.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

cuda_shim::Index threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_shim {

Counts counts{};

namespace {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 * 1024;

// Where threads meet: the generation counts how often all of them have.
struct Meeting {
  int members = 0;
  int arrived = 0;
  uint64_t generation = 0;

  void arrive() {
    if (++arrived == members) {
      arrived = 0;
      ++generation;
    }
  }
};

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  void* fake_stack = nullptr;
  bool done = false;
  Meeting* waits_for = nullptr;
  uint64_t generation = 0;
  // Which of the two sets of mailboxes the next shuffle uses.
  int parity = 0;

  bool ready() const { return !done && (waits_for == nullptr || waits_for->generation != generation); }
};

struct Warp {
  Meeting meeting;
  uint64_t mail[2][kWarpSize];
};

struct Block {
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  Meeting barrier;
  const std::function<void()>* body = nullptr;
  int current = 0;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

Block block;
std::mt19937 random_order(20);

void leave_fibre(bool for_ever) {
  Fibre& fibre = block.fibres[block.current];
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fibre.fake_stack, block.scheduler_stack,
                                 block.scheduler_stack_bytes);
  swapcontext(&fibre.context, &block.scheduler);
  __sanitizer_finish_switch_fiber(fibre.fake_stack, &block.scheduler_stack, &block.scheduler_stack_bytes);
}

void enter_fibre(int number) {
  Fibre& fibre = block.fibres[number];
  block.current = number;
  threadIdx = {static_cast<unsigned>(number), 0, 0};
  ++counts.switches;
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fibre.stack.data(), kStackBytes);
  swapcontext(&block.scheduler, &fibre.context);
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
}

void fibre_main() {
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
  (*block.body)();
  block.fibres[block.current].done = true;
  leave_fibre(true);
}

void wait(Meeting& meeting) {
  Fibre& fibre = block.fibres[block.current];
  fibre.waits_for = &meeting;
  fibre.generation = meeting.generation;
  meeting.arrive();
  leave_fibre(false);
}

void fail(const char* what) {
  fprintf(stderr, "cuda_shim: %s in block (%u, %u), thread %d\n", what, blockIdx.x, blockIdx.y, block.current);
  abort();
}

void start_block(int threads) {
  block.fibres.resize(threads);
  block.warps.assign((threads + kWarpSize - 1) / kWarpSize, {});
  block.barrier = {threads, 0, 0};
  for (int i = 0; i < threads; ++i) {
    ++block.warps[i / kWarpSize].meeting.members;
    Fibre& fibre = block.fibres[i];
    fibre.done = false;
    fibre.waits_for = nullptr;
    fibre.parity = 0;
    fibre.fake_stack = nullptr;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = kStackBytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, fibre_main, 0);
  }
}

void run_block(int threads) {
  start_block(threads);
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  for (bool alive = true; alive;) {
    std::shuffle(order.begin(), order.end(), random_order);
    bool moved = false;
    alive = false;
    for (const int i : order) {
      if (block.fibres[i].ready()) {
        enter_fibre(i);
        moved = true;
      }
      alive = alive || !block.fibres[i].done;
    }
    if (alive && !moved) fail("threads wait for one another at different places");
  }
}

}  // namespace

void run(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  block.body = &body;
  ++counts.launches;
  // The blocks of a grid come in any order.
  const unsigned blocks = gridDim.x * gridDim.y;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_order);
  for (const unsigned number : order) {
    blockIdx = {number % gridDim.x, number / gridDim.x, 0};
    ++counts.blocks;
    run_block(static_cast<int>(blockDim.x));
  }
}

void block_barrier() { wait(block.barrier); }

int lane_number() { return block.current % kWarpSize; }

uint64_t exchange(unsigned mask, uint64_t mine, int lane) {
  if (mask != 0xffffffffu) fail("a shuffle without the whole warp");
  Fibre& fibre = block.fibres[block.current];
  Warp& warp = block.warps[block.current / kWarpSize];
  // Two sets in turn: nobody writes one before all have read it.
  uint64_t (&mail)[kWarpSize] = warp.mail[fibre.parity];
  fibre.parity = 1 - fibre.parity;
  mail[lane_number()] = mine;
  wait(warp.meeting);
  return mail[lane];
}

}  // namespace cuda_shim
