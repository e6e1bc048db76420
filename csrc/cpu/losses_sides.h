// The two sides of a contrastive loss: embeddings with the norms of their prefixes, and the gradient they gather.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "tensors.h"

namespace sentfast::cpu {

constexpr float kEps = 1e-12f;

using Optional = std::optional<Tensor>;
using Floats = std::unique_ptr<float[]>;

// Embeddings in rows that lie at one distance, with the norms of their prefixes.
struct Embeddings {
  Tensor x;
  int64_t rows, dim, stride;
  int dtype;
  Floats norms, reciprocals;  // [prefixes, rows]; nullptr: not divided by

  Embeddings(const Tensor& given, const std::vector<int64_t>& dims, bool cosine, const char* name)
      : x(given), dtype(dtype_index(given, name)) {
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2, name, ": expected a CPU tensor of two dimensions");
    check_size(x);
    rows = x.size(0);
    dim = x.size(1);
    if (dim > 1 && x.stride(1) != 1) x = torch::stable::contiguous(x);
    stride = x.stride(0);
    if (!cosine) return;
    const int64_t count = static_cast<int64_t>(dims.size());
    norms = new_array<float>(times(count, rows));
    reciprocals = new_array<float>(times(count, rows));
    const NormalizeFn kernel = kernels().normalize[dtype];
    for (int64_t k = 0; k < count; ++k) {
      float *norm = norms.get() + k * rows, *reciprocal = reciprocals.get() + k * rows;
      const Normalize p = {dims[static_cast<size_t>(k)], {x.const_data_ptr(), stride}, nullptr, norm, kEps};
      torch::stable::parallel_for(0, rows, grain(p.dim), [&](int64_t begin, int64_t end) {
        kernel(p, begin, end);
        for (int64_t i = begin; i < end; ++i) reciprocal[i] = 1.0f / (norm[i] < kEps ? kEps : norm[i]);
      });
    }
    clear_beyond_range(dims);
  }
  const float* norm(int64_t prefix, int64_t row) const { return norms ? norms.get() + prefix * rows + row : nullptr; }
  const float* reciprocal(int64_t prefix, int64_t row) const {
    return reciprocals ? reciprocals.get() + prefix * rows + row : nullptr;
  }
  Operand from(int64_t row, int64_t column) const {
    const int64_t element = row * stride + column;
    return {static_cast<const char*>(x.const_data_ptr()) + element * static_cast<int64_t>(x.element_size()), stride, 1};
  }
  // The same seen as [dim, rows].
  Operand turned_from(int64_t row, int64_t column) const { return {from(row, column).data, 1, stride}; }

 private:
  bool finite(int64_t row, int64_t columns) const {
    const uint32_t exponent = dtype == static_cast<int>(Dtype::Float32) ? 0x7f800000u : 0x7f80u;
    for (int64_t d = 0; d < columns; ++d) {
      uint32_t bits = 0;
      std::memcpy(&bits, from(row, d).data, x.element_size());
      if ((bits & exponent) == exponent) return false;
    }
    return true;
  }
  static bool square_beyond_range(float norm) { return norm * norm == HUGE_VALF; }
  // A prefix of one column has a norm even where the square has left float32's range, and its x / |x| is its sign.
  void take_sign(int64_t row) {
    const_cast<float*>(norm(0, row))[0] = const_cast<float*>(reciprocal(0, row))[0] = 1.0f;
    char* element = static_cast<char*>(const_cast<void*>(from(row, 0).data));
    const float sign = (element[x.element_size() - 1] & 0x80) != 0 ? -1.0f : 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &sign, sizeof(bits));
    bits >>= 8 * (sizeof(bits) - x.element_size());  // the upper half of it is its bfloat16
    std::memcpy(element, &bits, x.element_size());
  }
  // x / |x| is zero where float32 cannot hold the norm of a finite x. Its products could not be held either, so from
  // the first prefix of such a norm on a copy has zeros for them. A half has no such norms.
  void clear_beyond_range(const std::vector<int64_t>& dims) {
    const float* longest = norm(static_cast<int64_t>(dims.size()) - 1, 0);
    bool copied = false;
    for (int64_t i = 0; i < rows; ++i) {
      if (!square_beyond_range(longest[i]) || dtype == static_cast<int>(Dtype::Float16)) continue;
      if (!finite(i, dims.back())) continue;
      if (!copied) {
        x = torch::stable::clone(x);
        stride = x.stride(0);
        copied = true;
      }
      if (dims[0] == 1 && square_beyond_range(norm(0, i)[0])) take_sign(i);
      int64_t first = 0;
      for (size_t k = 0; k < dims.size() && norm(static_cast<int64_t>(k), i)[0] < HUGE_VALF; ++k) first = dims[k];
      std::memset(const_cast<void*>(from(i, first).data), 0,
                  static_cast<size_t>(dims.back() - first) * x.element_size());
    }
  }
};

struct Side {
  Embeddings x;
  std::optional<Embeddings> guide;
  std::vector<int64_t> dims;  // of the prefixes, ascending
  std::vector<int32_t> ids;
  Tensor gradient;           // float32, dense; only where one is wanted
  Tensor result;             // in the dtype of x
  std::vector<float> along;  // [prefixes, rows] how much of x is in the gradient, with several prefixes

  Side(const Tensor& given, const std::vector<int64_t>& prefixes, bool cosine, const Optional& guides, const char* name)
      : x(given, prefixes, cosine, name), dims(prefixes) {
    if (!guides) return;
    guide.emplace(*guides, std::vector<int64_t>{guides->size(1)}, true, "guide");
    STD_TORCH_CHECK(guide->rows == x.rows, "guide: expected as many rows as ", name);
  }
  bool one_prefix() const { return dims.size() == 1; }
  float* gradient_from(int64_t row, int64_t column) {
    return static_cast<float*>(gradient.mutable_data_ptr()) + row * x.dim + column;
  }

  void start_gradient() {
    gradient = new_tensor({x.rows, x.dim}, ScalarType::Float, Life::Kept);
    result = x.dtype == 0 ? gradient : new_tensor({x.rows, x.dim}, x.x.scalar_type(), Life::Kept);
    float* data = gradient_from(0, 0);
    torch::stable::parallel_for(0, x.rows, grain(x.dim), [&](int64_t begin, int64_t end) {
      std::fill(data + begin * x.dim, data + end * x.dim, 0.0f);
    });
    if (!one_prefix()) along.assign(dims.size() * static_cast<size_t>(x.rows), 0.0f);
  }
  void finish_gradient() {
    sum_along();
    int64_t begin = 0;
    for (size_t k = 0; k < dims.size(); ++k) {
      const int64_t prefix = static_cast<int64_t>(k);
      finish_columns(begin, dims[k], one_prefix() ? x.norm(0, 0) : nullptr,
                     one_prefix() ? nullptr : along.data() + prefix * x.rows);
      begin = dims[k];
    }
    if (begin < x.dim) finish_columns(begin, x.dim, nullptr, nullptr);
  }

 private:
  // A column is in every prefix that reaches it: from the sums of each prefix to those of it and the longer ones.
  void sum_along() {
    for (int64_t k = static_cast<int64_t>(dims.size()) - 1; !along.empty() && k >= 0; --k) {
      float* sums = along.data() + k * x.rows;
      const float* norm = x.norm(k, 0);
      for (int64_t i = 0; i < x.rows; ++i) {
        sums[i] = norm[i] < kEps ? 0.0f : sums[i] / norm[i] / norm[i];
        if (k + 1 < static_cast<int64_t>(dims.size())) sums[i] += sums[x.rows + i];
      }
    }
  }
  void finish_columns(int64_t begin, int64_t end, const float* norm, const float* parts) {
    const Project p = {end - begin,
                       {x.from(0, begin).data, x.stride},
                       norm,
                       parts,
                       {gradient_from(0, begin), x.dim},
                       static_cast<char*>(result.mutable_data_ptr()) + begin * element_bytes(result.scalar_type()),
                       x.dim,
                       kEps};
    const ProjectFn kernel = kernels().project[x.dtype];
    torch::stable::parallel_for(0, x.rows, grain(2 * p.dim), [&](int64_t from, int64_t to) { kernel(p, from, to); });
  }
};

// Small numbers that are equal where the ids are.
inline std::vector<int32_t> numbered(const Tensor& given, int64_t count, const char* name) {
  const Tensor ids = torch::stable::contiguous(given);
  const bool wide = ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || ids.scalar_type() == ScalarType::Int, name, ": expected int64 or int32");
  STD_TORCH_CHECK(ids.is_cpu() && ids.dim() == 1 && ids.size(0) == count, name, ": expected ", count, " ids");
  std::vector<int64_t> values(count);
  for (int64_t i = 0; i < count; ++i) {
    values[i] = wide ? static_cast<const int64_t*>(ids.const_data_ptr())[i]
                     : static_cast<const int32_t*>(ids.const_data_ptr())[i];
  }
  std::vector<int64_t> known = values;
  std::sort(known.begin(), known.end());
  known.erase(std::unique(known.begin(), known.end()), known.end());
  std::vector<int32_t> numbers(count);
  for (int64_t i = 0; i < count; ++i) {
    numbers[i] = static_cast<int32_t>(std::lower_bound(known.begin(), known.end(), values[i]) - known.begin());
  }
  return numbers;
}

}  // namespace sentfast::cpu
