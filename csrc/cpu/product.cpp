// The products of training: checks, allocation and threads around product.inl.h.
#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>

#include "tensors.h"

namespace sentfast::cpu {
namespace {

// A matrix of which one stride is 1; copied where none is.
Tensor straight(const Tensor& x) {
  const bool rows = x.stride(1) == 1 || x.size(1) <= 1, columns = x.stride(0) == 1 || x.size(0) <= 1;
  return rows || columns ? x : torch::stable::contiguous(x);
}

// Blocks of rows, and groups of columns where that gives each thread as much to do. With few rows, every part of b is
// then made ready by one thread only.
struct Tasks {
  int64_t rows, columns, per_row;  // of one task; tasks side by side

  Tasks(const Product& p) {
    const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
    const int64_t blocks = (p.rows + kProductRows - 1) / kProductRows, panels = (p.columns + kPanel - 1) / kPanel;
    const int64_t groups = std::min(threads / std::gcd(blocks, threads), panels);
    rows = (p.rows + blocks - 1) / blocks;
    columns = (panels + groups - 1) / groups * kPanel;
    per_row = (p.columns + columns - 1) / columns;
  }
  int64_t count(const Product& p) const { return (p.rows + rows - 1) / rows * per_row; }
};

Tensor product(const Tensor& left, const Tensor& right, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(left.is_cpu() && right.is_cpu() && left.dim() == 2 && right.dim() == 2 &&
                      left.scalar_type() == ScalarType::Float && right.scalar_type() == ScalarType::Float,
                  "a, b: expected float32 matrices on the CPU");
  STD_TORCH_CHECK(left.size(1) == right.size(0), "b: expected ", left.size(1), " rows, got ", right.size(0));
  check_size(left);
  check_size(right);
  const Tensor a = straight(left), b = straight(right);
  Product p = {};
  p.rows = a.size(0);
  p.columns = b.size(1);
  p.depth = a.size(1);
  p.a = static_cast<const float*>(a.const_data_ptr());
  p.a_row = a.stride(0);
  p.a_step = a.stride(1);
  p.b = static_cast<const float*>(b.const_data_ptr());
  p.b_step = b.stride(0);
  p.b_column = b.stride(1);
  if (p.depth == 1) p.a_step = p.b_step = 1;  // the steps of one are not apart, whatever their stride says
  Tensor shift, c = new_tensor({p.rows, p.columns}, ScalarType::Float, Life::Kept);
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->numel() == p.columns && bias->scalar_type() == ScalarType::Float,
                    "bias: expected ", p.columns, " float32 numbers on the CPU");
    shift = torch::stable::contiguous(*bias);
    p.bias = static_cast<const float*>(shift.const_data_ptr());
  }
  p.c = static_cast<float*>(c.mutable_data_ptr());
  p.stride_c = p.columns;
  if (p.rows == 0 || p.columns == 0) return c;
  const Tasks tasks(p);
  const ProductFn kernel = kernels().product;
  const int64_t work = grain(tasks.rows * tasks.columns * p.depth / 64);
  torch::stable::parallel_for(0, tasks.count(p), work, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[kProductScratch]);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / tasks.per_row * tasks.rows, column = task % tasks.per_row * tasks.columns;
      kernel(p, {row, std::min(row + tasks.rows, p.rows), column, std::min(column + tasks.columns, p.columns)},
             scratch.get());
    }
  });
  return c;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sentfast, CPU, m) { m.impl("product", TORCH_BOX(&product)); }

}  // namespace sentfast::cpu
