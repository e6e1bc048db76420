// Fibres for the CUDA shim. A fibre stops at each barrier or shuffle until all those it must meet have come.
#include <sanitizer/common_interface_defs.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
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

struct Copy {
  void* to;
  const void* from;
  bool used;

  void run() const {
    if (used) {
      memcpy(to, from, 16);
    } else {
      memset(to, 0, 16);
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
  std::vector<Copy> copies;

  bool ready() const { return !done && (waits_for == nullptr || waits_for->generation != generation); }
};

struct Warp {
  Meeting meeting;
  alignas(16) char mail[2][kWarpSize * kMailBytes];
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

void fail(const char* what) {
  fprintf(stderr, "cuda_shim: %s in block (%u, %u), thread %d\n", what, blockIdx.x, blockIdx.y, block.current);
  abort();
}

void fibre_main() {
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
  (*block.body)();
  if (!block.fibres[block.current].copies.empty()) fail("copies that nobody waits for");
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

void warp_barrier() { wait(block.warps[block.current / kWarpSize].meeting); }

void exchange(unsigned mask, const void* mine, void* all, size_t bytes) {
  if (mask != kWholeWarp) fail("a shuffle without the whole warp");
  Fibre& fibre = block.fibres[block.current];
  Warp& warp = block.warps[block.current / kWarpSize];
  // Two sets in turn: nobody writes one before all have read it.
  char* mail = warp.mail[fibre.parity];
  fibre.parity = 1 - fibre.parity;
  memcpy(mail + lane_number() * bytes, mine, bytes);
  wait(warp.meeting);
  memcpy(all, mail, kWarpSize * bytes);
}

void check_aligned(const void* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) fail("a vector off its alignment");
}

void copy_later(void* to, const void* from, bool used) {
  check_aligned(to);
  check_aligned(from);
  const Copy copy{to, from, used};
  if (random_order() % 2 == 0) {
    copy.run();
  } else {
    block.fibres[block.current].copies.push_back(copy);
  }
}

void copy_now() {
  std::vector<Copy>& copies = block.fibres[block.current].copies;
  for (const Copy& copy : copies) copy.run();
  copies.clear();
}

}  // namespace cuda_shim
