// The interpreter's functions for other languages: tests/ptx/interpreter.py and the stand-in for the CUDA runtime.
#pragma once

#include <cstdint>

extern "C" {

// Why the last call in this thread failed, or what a launch has done wrong.
const char* ptx_message();

// Null if the text cannot be parsed.
void* ptx_load(const char* text);
// The names of a module's kernels, one per line.
const char* ptx_kernels(void* module);
// Offset and size of each parameter of a kernel; returns how many there are.
int ptx_parameters(void* module, const char* kernel, uint32_t* offsets_and_sizes, int most);

struct PtxLaunch {
  uint32_t grid[3], threads[3], dynamic_shared;
  uint32_t seed;
  int32_t moment, watch_shared, watch_global, round_to_zero;  // see Options
  const uint8_t* parameters;
  const uint64_t* ranges;  // begin and end of every tensor
  const char* names;       // of the tensors, one per line
  int32_t range_count;
  uint64_t* statistics;  // that are added to, or null
};

// 0: done; 1: done, but the kernel has made mistakes; 2: it could not go on.
int ptx_launch(void* module, const char* kernel, const PtxLaunch* launch);
}
