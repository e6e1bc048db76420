// Layer norm with dropout and residual, activation with bias, dropout: checks, allocation and threads around
// norm.inl.h, activation.inl.h and dropout.inl.h.
#include <optional>
#include <tuple>

#include "dropout.h"
#include "tensors.h"

namespace sentfast::cpu {
namespace {

int64_t blocks_of(int64_t rows) { return (rows + kPartialRows - 1) / kPartialRows; }

// A vector of float32 on the CPU, or nothing.
struct Floats {
  Tensor tensor;
  const float* data = nullptr;

  Floats(const std::optional<Tensor>& x, int64_t count, const char* name) {
    if (!x.has_value()) return;
    STD_TORCH_CHECK(x->is_cpu() && x->numel() == count && x->scalar_type() == ScalarType::Float, name, ": expected ",
                    count, " float32 numbers on the CPU");
    tensor = torch::stable::contiguous(*x);
    data = static_cast<const float*>(tensor.const_data_ptr());
  }
};

void check_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, name, ": expected a CPU tensor of shape [..., D]");
}

float* floats(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

Tensor dropout(const Tensor& x, double p, int64_t seed, int64_t stream) {
  check_rows(x, "x");
  const RowView rows(x);
  Tensor y = new_tensor(sizes_of(x), x.scalar_type(), Life::Kept);
  if (rows.dim == 0) return y;
  const DropoutRows arguments = {rows.dim, rows.get(), y.mutable_data_ptr(), dropout_of(p, seed, stream)};
  const DropoutFn kernel = kernels().dropout[dtype_index(x, "x")];
  torch::stable::parallel_for(0, rows.rows, grain(rows.dim),
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_forward(
    const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, const std::optional<Tensor>& bias,
    double eps, double dropout_p, int64_t seed, int64_t stream) {
  check_rows(x, "x");
  const ScalarType dtype = residual.has_value() ? residual->scalar_type() : x.scalar_type();
  if (residual.has_value()) {
    STD_TORCH_CHECK(residual->is_cpu() && sizes_of(*residual) == sizes_of(x), "residual: expected the shape of x");
    STD_TORCH_CHECK(dtype == x.scalar_type() || dtype == ScalarType::Float,
                    "residual: expected the dtype of x, or float32");
  }
  const RowView rows(x), others(residual.has_value() ? *residual : x);
  const Floats scale(weight, rows.dim, "weight"), shift(bias, rows.dim, "bias");
  auto leading = sizes_of(x);
  leading.pop_back();
  Tensor y = new_tensor(sizes_of(x), dtype, Life::Kept), sum = new_tensor(sizes_of(x), dtype, Life::Kept);
  Tensor mean = new_tensor(leading, ScalarType::Float, Life::Kept);
  Tensor rstd = new_tensor(leading, ScalarType::Float, Life::Kept);
  DropoutAddLayerNorm p = {};
  p.dim = rows.dim;
  p.x = rows.get();
  if (residual.has_value()) p.residual = others.get();
  p.weight = scale.data;
  p.bias = shift.data;
  p.eps = static_cast<float>(eps);
  p.dropout = dropout_of(dropout_p, seed, stream);
  p.y = y.mutable_data_ptr();
  p.sum = sum.mutable_data_ptr();
  p.mean = floats(mean);
  p.rstd = floats(rstd);
  const bool wide = dtype == ScalarType::Float;
  const DropoutAddLayerNormFn kernel = kernels().dropout_add_layer_norm[dtype_index(x, "x")][wide ? 1 : 0];
  torch::stable::parallel_for(0, rows.rows, grain(4 * rows.dim),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {y, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_backward(const Tensor& grad, const Tensor& sum,
                                                                           const Tensor& mean, const Tensor& rstd,
                                                                           const Tensor& weight, const Tensor& like,
                                                                           double dropout_p, int64_t seed,
                                                                           int64_t stream) {
  check_rows(grad, "grad");
  STD_TORCH_CHECK(sum.is_cpu() && sizes_of(sum) == sizes_of(grad) && sum.scalar_type() == grad.scalar_type(),
                  "sum: expected the shape and dtype of grad");
  const RowView rows(grad);
  const Tensor dense = torch::stable::contiguous(sum);
  const Floats scale(weight, rows.dim, "weight"), means(mean, rows.rows, "mean"), rstds(rstd, rows.rows, "rstd");
  const ScalarType dtype = like.scalar_type();
  const bool wide = grad.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(wide || dtype == grad.scalar_type(), "grad: expected the dtype of x, or float32");
  const bool same = dropout_p == 0.0 && dtype == grad.scalar_type();
  const int64_t blocks = blocks_of(rows.rows);
  Tensor grad_sum = new_tensor(sizes_of(grad), grad.scalar_type(), Life::Kept);
  Tensor grad_x = same ? new_tensor({0}, dtype) : new_tensor(sizes_of(grad), dtype, Life::Kept);
  Tensor grad_weight = new_tensor({rows.dim}, ScalarType::Float), grad_bias = new_tensor({rows.dim}, ScalarType::Float);
  Tensor partial = new_tensor({blocks, 2, rows.dim}, ScalarType::Float, Life::Kept);
  DropoutAddLayerNormBackward p = {};
  p.rows = rows.rows;
  p.dim = rows.dim;
  p.grad = rows.get();
  p.sum = dense.const_data_ptr();
  p.mean = means.data;
  p.rstd = rstds.data;
  p.weight = scale.data;
  p.dropout = dropout_of(dropout_p, seed, stream);
  p.grad_sum = grad_sum.mutable_data_ptr();
  p.grad_x = same ? nullptr : grad_x.mutable_data_ptr();
  p.partial = floats(partial);
  const DropoutAddLayerNormBackwardFn kernel =
      kernels().dropout_add_layer_norm_backward[dtype_index(like, "like")][wide ? 1 : 0];
  torch::stable::parallel_for(0, blocks, grain(8 * kPartialRows * rows.dim),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  sum_parts(p.partial, blocks, 2 * rows.dim, rows.dim, floats(grad_weight));
  sum_parts(p.partial + rows.dim, blocks, 2 * rows.dim, rows.dim, floats(grad_bias));
  return {grad_sum, grad_x, grad_weight, grad_bias};
}

Activation activation_of(int64_t activation) {
  STD_TORCH_CHECK(activation >= kGelu && activation < kIdentity, "activation: expected 0 to ", kIdentity - 1, ", got ",
                  activation);
  return static_cast<Activation>(activation);
}

Tensor bias_activation(const Tensor& x, const std::optional<Tensor>& bias, int64_t activation) {
  check_rows(x, "x");
  const RowView rows(x);
  const Floats shift(bias, rows.dim, "bias");
  Tensor y = new_tensor(sizes_of(x), x.scalar_type(), Life::Kept);
  if (rows.dim == 0) return y;
  BiasActivation p = {};
  p.rows = rows.rows;
  p.dim = rows.dim;
  p.x = rows.get();
  p.bias = shift.data;
  p.activation = activation_of(activation);
  p.y = y.mutable_data_ptr();
  const BiasActivationFn kernel = kernels().bias_activation[dtype_index(x, "x")];
  torch::stable::parallel_for(0, rows.rows, grain(8 * rows.dim),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> bias_activation_backward(const Tensor& grad, const Tensor& x,
                                                    const std::optional<Tensor>& bias, int64_t activation) {
  check_rows(grad, "grad");
  STD_TORCH_CHECK(x.is_cpu() && sizes_of(x) == sizes_of(grad) && x.scalar_type() == grad.scalar_type(),
                  "x: expected the shape and dtype of grad");
  const RowView rows(x), gradients(grad);
  const Floats shift(bias, rows.dim, "bias");
  const int64_t blocks = blocks_of(rows.rows);
  Tensor grad_x = new_tensor(sizes_of(x), x.scalar_type(), Life::Kept);
  Tensor partial = new_tensor({bias.has_value() ? blocks : 0, rows.dim}, ScalarType::Float, Life::Kept);
  Tensor grad_bias = new_tensor({bias.has_value() ? rows.dim : 0}, ScalarType::Float);
  BiasActivation p = {};
  p.rows = rows.rows;
  p.dim = rows.dim;
  p.x = rows.get();
  p.grad = gradients.get();
  p.bias = shift.data;
  p.activation = activation_of(activation);
  p.y = grad_x.mutable_data_ptr();
  p.partial = bias.has_value() ? floats(partial) : nullptr;
  const BiasActivationFn kernel = kernels().bias_activation_backward[dtype_index(x, "x")];
  torch::stable::parallel_for(0, blocks, grain(16 * kPartialRows * rows.dim),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  if (bias.has_value()) sum_parts(p.partial, blocks, rows.dim, rows.dim, floats(grad_bias));
  return {grad_x, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sentfast, CPU, m) {
  m.impl("dropout", TORCH_BOX(&dropout));
  m.impl("dropout_add_layer_norm_forward", TORCH_BOX(&dropout_add_layer_norm_forward));
  m.impl("dropout_add_layer_norm_backward", TORCH_BOX(&dropout_add_layer_norm_backward));
  m.impl("bias_activation", TORCH_BOX(&bias_activation));
  m.impl("bias_activation_backward", TORCH_BOX(&bias_activation_backward));
}

}  // namespace sentfast::cpu
