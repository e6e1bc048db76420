// Rows of tensors of any strides, numbered over all leading dimensions.
#pragma once

#include "common.cuh"

namespace sentfast {
namespace {

constexpr int kMaxDims = 8;

// The leading dimensions that kTensors tensors have in common, and the strides of each.
template <int kTensors>
struct Rows {
  int64_t count = 1;
  int dims = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kTensors][kMaxDims] = {};

  __device__ void offsets(int64_t row, int64_t (&offset)[kTensors]) const {
    for (int t = 0; t < kTensors; ++t) offset[t] = 0;
    for (int d = dims - 1; d >= 0; --d) {
      // The outermost index needs no division.
      const int64_t outer = d == 0 ? 0 : row / size[d];
      const int64_t index = row - outer * size[d];
      row = outer;
      for (int t = 0; t < kTensors; ++t) offset[t] += index * stride[t][d];
    }
  }
};

// Joins neighbouring dimensions that every tensor walks with one stride. False where more than kMaxDims remain.
template <int kTensors>
inline bool collapse(int dims, const int64_t* size, const int64_t* const (&stride)[kTensors], Rows<kTensors>& rows) {
  rows = {};
  for (int d = 0; d < dims; ++d) {
    rows.count *= size[d];
    if (size[d] == 1) continue;
    bool joins = rows.dims > 0;
    for (int t = 0; t < kTensors && joins; ++t) joins = rows.stride[t][rows.dims - 1] == size[d] * stride[t][d];
    if (!joins && rows.dims == kMaxDims) return false;
    const int slot = joins ? rows.dims - 1 : rows.dims++;
    rows.size[slot] = joins ? rows.size[slot] * size[d] : size[d];
    for (int t = 0; t < kTensors; ++t) rows.stride[t][slot] = stride[t][d];
  }
  return true;
}

}  // namespace
}  // namespace sentfast
