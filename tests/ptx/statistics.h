// What an execution costs in units that do not depend on time.
#pragma once

#include <cstdint>

namespace ptx {

// Sums over warps. tests/ptx/interpreter.py has the same names in the same order.
struct Statistics {
  uint64_t instructions = 0, lanes = 0, divergent = 0, barriers = 0;
  uint64_t global_loads = 0, global_load_sectors = 0, global_load_bytes = 0;
  uint64_t global_stores = 0, global_store_sectors = 0, global_store_bytes = 0;
  uint64_t copies = 0, copy_sectors = 0, copy_bytes = 0;
  uint64_t shared_loads = 0, shared_load_wavefronts = 0, shared_stores = 0, shared_store_wavefronts = 0;
  uint64_t tensor_core = 0, special_function = 0, shuffles = 0;
};

constexpr int kLanes = 32;

// Sectors of 32 bytes that the lanes of the mask touch, `bytes` at each address.
int sectors(const uint64_t (&addresses)[kLanes], uint32_t lanes, int bytes);

// Passes through shared memory, whose 32 banks give 4 bytes each per pass; wider accesses go in halves and quarters.
int wavefronts(const uint64_t (&addresses)[kLanes], uint32_t lanes, int bytes);

}  // namespace ptx
