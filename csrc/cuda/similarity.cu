// Normalisation and similarity on CUDA: checks the tensors, starts the kernels. Schemas and meaning:
// sentfast/ops/similarity.py.
#include <tuple>

#include "similarity.cuh"
#include "similarity_matrix.cuh"
#include "tensors.h"

namespace sentfast {
namespace {

void check_columns(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1, name, ": expected [..., D], got a tensor without dimensions");
}

// x has the dtype and the shape of first.
void check_same(const char* name, const Tensor& x, const Tensor& first) {
  check_device(name, x, first);
  check_type(name, x, first.scalar_type());
  check_dim(name, x, first.dim());
  check_leading(name, x, first, first.dim());
}

// x has one number, of dtype `type`, for each row of first.
void check_per_row(const char* name, const Tensor& x, const Tensor& first, ScalarType type) {
  check_device(name, x, first);
  check_type(name, x, type);
  check_dim(name, x, first.dim() - 1);
  check_leading(name, x, first, first.dim() - 1);
}

PairwiseMetric metric_of(int64_t metric) {
  STD_TORCH_CHECK(metric >= kCosine && metric <= kManhattan, "metric: expected a number from 0 to 3, got ", metric);
  return static_cast<PairwiseMetric>(metric);
}

std::tuple<Tensor, Tensor> l2_normalize_forward(const Tensor& x_in, double eps) {
  Tensor x = x_in;
  const Dtype dtype = dtype_of("x", x);
  check_device("x", x, x);
  check_columns("x", x);
  const int64_t dims = x.dim() - 1;
  Tensor y = new_empty(x, leading(x, dims + 1), x.scalar_type());
  Tensor norm = new_empty(x, leading(x, dims), ScalarType::Float);
  if (norm.numel() == 0) return {y, norm};
  const Device device(x);
  NormalizeArguments a{};
  a.rows = rows_of<1>(dims, {&x});
  a.dim = x.size(dims);
  a.x = x.const_data_ptr();
  a.x_stride = x.stride(dims);
  a.y = y.mutable_data_ptr();
  a.norm = norm.mutable_data_ptr<float>();
  a.eps = static_cast<float>(eps);
  Device::check(run_l2_normalize(dtype, dtype, a, device.stream()));
  return {y, norm};
}

Tensor l2_normalize_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& norm_in, double eps) {
  Tensor grad = grad_in, x = x_in, norm = norm_in;
  const Dtype dtype = dtype_of("x", x), grad_dtype = dtype_of("grad", grad);
  check_columns("x", x);
  check_device("x", x, grad);
  check_dim("grad", grad, x.dim());
  check_leading("grad", grad, x, x.dim());
  check_per_row("norm", norm, x, ScalarType::Float);
  const int64_t dims = x.dim() - 1;
  Tensor grad_x = new_empty(x, leading(x, dims + 1), x.scalar_type());
  if (grad_x.numel() == 0) return grad_x;
  const Device device(x);
  NormalizeBackwardArguments a{};
  a.rows = rows_of<3>(dims, {&grad, &x, &norm});
  a.dim = x.size(dims);
  a.grad = grad.const_data_ptr();
  a.grad_stride = grad.stride(dims);
  a.x = x.const_data_ptr();
  a.x_stride = x.stride(dims);
  a.norm = norm.const_data_ptr<float>();
  a.grad_x = grad_x.mutable_data_ptr();
  a.eps = static_cast<float>(eps);
  Device::check(run_l2_normalize_backward(dtype, grad_dtype, a, device.stream()));
  return grad_x;
}

// Every row of a with every row of b: [..., N, D], [..., M, D] -> [..., N, M], and the norms if they are asked for.
std::tuple<Tensor, Tensor, Tensor> matrix(const Tensor& a_in, const Tensor& b_in, bool cosine, double eps) {
  Tensor a = a_in, b = b_in;
  const Dtype dtype_a = dtype_of("a", a), dtype_b = dtype_of("b", b);
  check_device("a", a, a);
  check_device("b", b, a);
  STD_TORCH_CHECK(a.dim() >= 2, "a: expected [..., N, D], got ", a.dim(), " dimensions");
  check_dim("b", b, a.dim());
  const int64_t dims = a.dim() - 2;
  check_leading("b", b, a, dims);
  check_size("b", b, dims + 1, a.size(dims + 1));
  std::vector<int64_t> size = leading(a, dims + 1), size_b = leading(b, dims + 1);
  Tensor norm_a = new_empty(a, cosine ? size : std::vector<int64_t>{0}, ScalarType::Float);
  Tensor norm_b = new_empty(a, cosine ? size_b : std::vector<int64_t>{0}, ScalarType::Float);
  size.push_back(b.size(dims));
  Tensor scores = new_empty(a, size, ScalarType::Float);
  if (scores.numel() == 0 && norm_a.numel() == 0 && norm_b.numel() == 0) return {scores, norm_a, norm_b};

  const Device device(a);
  MatrixArguments p{};
  p.batch = rows_of<2>(dims, {&a, &b});
  p.a = operand(a.const_data_ptr(), dtype_a, a.size(dims), a.stride(dims), a.stride(dims + 1), p.batch.dims,
                p.batch.stride[0]);
  p.b = operand(b.const_data_ptr(), dtype_b, b.size(dims), b.stride(dims), b.stride(dims + 1), p.batch.dims,
                p.batch.stride[1]);
  p.depth = a.size(dims + 1);
  p.cosine = cosine;
  p.scores = scores.mutable_data_ptr<float>();
  p.norm_a = cosine ? norm_a.mutable_data_ptr<float>() : nullptr;
  p.norm_b = cosine ? norm_b.mutable_data_ptr<float>() : nullptr;
  p.eps = static_cast<float>(eps);
  Device::check(run_similarity_matrix(p, device.stream()));
  return {scores, norm_a, norm_b};
}

Tensor dot_similarity(const Tensor& a, const Tensor& b) { return std::get<0>(matrix(a, b, false, 0.0)); }

std::tuple<Tensor, Tensor, Tensor> cosine_similarity_forward(const Tensor& a, const Tensor& b, double eps) {
  return matrix(a, b, true, eps);
}

std::tuple<Tensor, Tensor, Tensor> pairwise_similarity_forward(const Tensor& a_in, const Tensor& b_in, int64_t metric,
                                                               double eps) {
  Tensor a = a_in, b = b_in;
  const Dtype dtype = dtype_of("a", a);
  check_device("a", a, a);
  check_columns("a", a);
  check_same("b", b, a);
  const int64_t dims = a.dim() - 1;
  PairwiseArguments p{};
  p.metric = metric_of(metric);
  const std::vector<int64_t> size = leading(a, dims);
  const std::vector<int64_t> norm_size = p.metric == kCosine ? size : std::vector<int64_t>{0};
  Tensor scores = new_empty(a, size, ScalarType::Float);
  Tensor norm_a = new_empty(a, norm_size, ScalarType::Float), norm_b = new_empty(a, norm_size, ScalarType::Float);
  if (scores.numel() == 0) return {scores, norm_a, norm_b};
  const Device device(a);
  p.rows = rows_of<2>(dims, {&a, &b});
  p.dim = a.size(dims);
  p.a = a.const_data_ptr();
  p.a_stride = a.stride(dims);
  p.b = b.const_data_ptr();
  p.b_stride = b.stride(dims);
  p.scores = scores.mutable_data_ptr<float>();
  if (p.metric == kCosine) {
    p.norm_a = norm_a.mutable_data_ptr<float>();
    p.norm_b = norm_b.mutable_data_ptr<float>();
  }
  p.eps = static_cast<float>(eps);
  Device::check(run_pairwise_similarity(dtype, p, device.stream()));
  return {scores, norm_a, norm_b};
}

std::tuple<Tensor, Tensor> pairwise_similarity_backward(const Tensor& grad_in, const Tensor& a_in, const Tensor& b_in,
                                                        const Tensor& scores_in, const Tensor& norm_a_in,
                                                        const Tensor& norm_b_in, int64_t metric, double eps) {
  Tensor grad = grad_in, a = a_in, b = b_in, scores = scores_in, norm_a = norm_a_in, norm_b = norm_b_in;
  const Dtype dtype = dtype_of("a", a);
  PairwiseBackwardArguments p{};
  p.metric = metric_of(metric);
  p.grad_dtype = dtype_of("grad", grad);
  check_columns("a", a);
  check_device("a", a, grad);
  check_same("b", b, a);
  check_per_row("grad", grad, a, grad.scalar_type());
  check_per_row("scores", scores, a, ScalarType::Float);
  const bool cosine = p.metric == kCosine;
  if (cosine) {
    check_per_row("norm_a", norm_a, a, ScalarType::Float);
    check_per_row("norm_b", norm_b, a, ScalarType::Float);
  }
  const int64_t dims = a.dim() - 1;
  Tensor grad_a = new_empty(a, leading(a, dims + 1), a.scalar_type());
  Tensor grad_b = new_empty(a, leading(a, dims + 1), a.scalar_type());
  if (grad_a.numel() == 0) return {grad_a, grad_b};
  const Device device(a);
  // Without cosine there are no norms; the scores' strides stand in.
  p.rows = rows_of<6>(dims, {&a, &b, &grad, &scores, cosine ? &norm_a : &scores, cosine ? &norm_b : &scores});
  p.dim = a.size(dims);
  p.a = a.const_data_ptr();
  p.a_stride = a.stride(dims);
  p.b = b.const_data_ptr();
  p.b_stride = b.stride(dims);
  p.grad = grad.const_data_ptr();
  p.scores = scores.const_data_ptr<float>();
  p.norm_a = cosine ? norm_a.const_data_ptr<float>() : nullptr;
  p.norm_b = cosine ? norm_b.const_data_ptr<float>() : nullptr;
  p.grad_a = grad_a.mutable_data_ptr();
  p.grad_b = grad_b.mutable_data_ptr();
  p.eps = static_cast<float>(eps);
  Device::check(run_pairwise_similarity_backward(dtype, p, device.stream()));
  return {grad_a, grad_b};
}

}  // namespace
}  // namespace sentfast

STABLE_TORCH_LIBRARY_IMPL(sentfast_cuda, CUDA, m) {
  m.impl("l2_normalize_forward", TORCH_BOX(&sentfast::l2_normalize_forward));
  m.impl("l2_normalize_backward", TORCH_BOX(&sentfast::l2_normalize_backward));
  m.impl("dot_similarity", TORCH_BOX(&sentfast::dot_similarity));
  m.impl("cosine_similarity_forward", TORCH_BOX(&sentfast::cosine_similarity_forward));
  m.impl("pairwise_similarity_forward", TORCH_BOX(&sentfast::pairwise_similarity_forward));
  m.impl("pairwise_similarity_backward", TORCH_BOX(&sentfast::pairwise_similarity_backward));
}
