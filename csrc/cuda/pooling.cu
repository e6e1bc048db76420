// Pooling on CUDA: checks the tensors, starts the kernels. Schemas and meaning: sentfast/ops/pooling.py.
#include <limits>
#include <tuple>

#include "pooling.cuh"
#include "pooling_backward.cuh"
#include "tensors.h"

namespace sentfast {
namespace {

Modes modes_of(const std::vector<int64_t>& modes) {
  STD_TORCH_CHECK(!modes.empty() && modes.size() <= kMaxModes, "modes: expected 1 to ", kMaxModes, ", got ",
                  modes.size());
  Modes result{static_cast<int>(modes.size()), {}};
  for (size_t i = 0; i < modes.size(); ++i) {
    STD_TORCH_CHECK(modes[i] >= kMean && modes[i] <= kMeanSqrtLenTokens, "modes: expected numbers from 0 to 5, got ",
                    modes[i]);
    result.mode[i] = static_cast<int32_t>(modes[i]);
  }
  return result;
}

int32_t mask_bytes(const Tensor& mask) {
  const ScalarType type = mask.scalar_type();
  const bool integer = type == ScalarType::Bool || type == ScalarType::Byte || type == ScalarType::Char ||
                       type == ScalarType::Short || type == ScalarType::Int || type == ScalarType::Long ||
                       type == ScalarType::UInt16 || type == ScalarType::UInt32 || type == ScalarType::UInt64;
  STD_TORCH_CHECK(integer, "attention_mask: expected a bool or integer tensor, got ", type);
  return static_cast<int32_t>(mask.element_size());
}

// `padded_batch` is the number of sequences without cu_seqlens; `first` a tensor on the wanted device.
Batch batch_of(const Tensor& first, int64_t padded_batch, int64_t length, const std::optional<Tensor>& attention_mask,
               const std::optional<Tensor>& cu_seqlens, int64_t prompt_length) {
  STD_TORCH_CHECK(prompt_length >= 0, "prompt_length: expected 0 or more, got ", prompt_length);
  Batch batch{};
  batch.batch = padded_batch;
  batch.length = length;
  batch.prompt_length = smaller(prompt_length, length);
  if (cu_seqlens.has_value()) {
    STD_TORCH_CHECK(!attention_mask.has_value(), "attention_mask: expected None with cu_seqlens, got both");
    check_device("cu_seqlens", *cu_seqlens, first);
    check_type("cu_seqlens", *cu_seqlens, ScalarType::Int);
    check_dim("cu_seqlens", *cu_seqlens, 1);
    STD_TORCH_CHECK(cu_seqlens->size(0) >= 1, "cu_seqlens: expected shape [B + 1], got [0]");
    batch.batch = cu_seqlens->size(0) - 1;
    batch.cu_seqlens = cu_seqlens->const_data_ptr<int32_t>();
    batch.cu_seqlens_stride = cu_seqlens->stride(0);
  } else if (attention_mask.has_value()) {
    check_device("attention_mask", *attention_mask, first);
    check_dim("attention_mask", *attention_mask, 2);
    check_size("attention_mask", *attention_mask, 0, padded_batch);
    check_size("attention_mask", *attention_mask, 1, length);
    batch.mask_bytes = mask_bytes(*attention_mask);
    batch.attention_mask = attention_mask->const_data_ptr();
    batch.mask_stride[0] = attention_mask->stride(0);
    batch.mask_stride[1] = attention_mask->stride(1);
  }
  return batch;
}

std::tuple<Tensor, Tensor, Tensor> pool_forward(const Tensor& x, const std::optional<Tensor>& attention_mask,
                                                const std::optional<Tensor>& cu_seqlens,
                                                const std::vector<int64_t>& modes, int64_t prompt_length,
                                                bool normalize) {
  const bool packed = cu_seqlens.has_value();
  const Dtype dtype = dtype_of("x", x);
  check_device("x", x, x);
  check_dim("x", x, packed ? 2 : 3);
  PoolArguments a{};
  a.modes = modes_of(modes);
  a.dim = x.size(packed ? 1 : 2);
  a.batch = batch_of(x, x.size(0), x.size(packed ? 0 : 1), attention_mask, cu_seqlens, prompt_length);
  const bool has_max = a.modes.has(kMax);
  STD_TORCH_CHECK(!has_max || a.batch.length <= std::numeric_limits<int32_t>::max(),
                  "x: expected fewer than 2^31 tokens for the mode max, got ", a.batch.length);

  const int64_t batch = a.batch.batch, columns = a.modes.count * a.dim;
  Tensor out = new_empty(x, {batch, columns}, x.scalar_type());
  Tensor norm = new_empty(x, {normalize ? batch : 0}, ScalarType::Float);
  Tensor argmax = new_empty(x, has_max ? std::vector<int64_t>{batch, a.dim} : std::vector<int64_t>{0}, ScalarType::Int);
  Tensor pooled = normalize && dtype != Dtype::kFloat ? new_empty(x, {batch, columns}, ScalarType::Float) : out;

  const Device device(x);
  a.x = x.const_data_ptr();
  a.x_stride[0] = packed ? 0 : x.stride(0);
  a.x_stride[1] = x.stride(packed ? 0 : 1);
  a.x_stride[2] = x.stride(packed ? 1 : 2);
  a.out = pooled.mutable_data_ptr();
  a.out_is_float = normalize;
  a.argmax = has_max ? argmax.mutable_data_ptr<int32_t>() : nullptr;
  Device::check(run_pool(dtype, a, out.mutable_data_ptr(), normalize ? norm.mutable_data_ptr<float>() : nullptr,
                         device.stream()));
  return {out, norm, argmax};
}

Tensor pool_backward(const Tensor& grad, const Tensor& out, const Tensor& norm, const Tensor& argmax,
                     const std::optional<Tensor>& attention_mask, const std::optional<Tensor>& cu_seqlens,
                     const std::vector<int64_t>& modes, int64_t prompt_length, int64_t length, bool normalize) {
  const bool packed = cu_seqlens.has_value();
  const Dtype dtype = dtype_of("grad", grad);
  check_device("grad", grad, grad);
  check_dim("grad", grad, 2);
  STD_TORCH_CHECK(length >= 0, "length: expected 0 or more, got ", length);
  PoolBackwardArguments a{};
  a.modes = modes_of(modes);
  a.dim = grad.size(1) / a.modes.count;
  check_size("grad", grad, 1, a.dim * a.modes.count);
  a.batch = batch_of(grad, grad.size(0), length, attention_mask, cu_seqlens, prompt_length);
  const int64_t batch = a.batch.batch;
  check_size("grad", grad, 0, batch);
  a.grad = grad.const_data_ptr();
  a.grad_stride[0] = grad.stride(0);
  a.grad_stride[1] = grad.stride(1);
  if (normalize) {
    check_device("out", out, grad);
    check_type("out", out, grad.scalar_type());
    check_dim("out", out, 2);
    check_leading("out", out, grad, 2);
    check_device("norm", norm, grad);
    check_type("norm", norm, ScalarType::Float);
    check_dim("norm", norm, 1);
    check_size("norm", norm, 0, batch);
    a.out = out.const_data_ptr();
    a.out_stride[0] = out.stride(0);
    a.out_stride[1] = out.stride(1);
    a.norm = norm.const_data_ptr<float>();
    a.norm_stride = norm.stride(0);
  }
  if (a.modes.has(kMax)) {
    check_device("argmax", argmax, grad);
    check_type("argmax", argmax, ScalarType::Int);
    check_dim("argmax", argmax, 2);
    check_size("argmax", argmax, 0, batch);
    check_size("argmax", argmax, 1, a.dim);
    a.argmax = argmax.const_data_ptr<int32_t>();
    a.argmax_stride[0] = argmax.stride(0);
    a.argmax_stride[1] = argmax.stride(1);
  }
  Tensor grad_x =
      new_empty(grad, packed ? std::vector<int64_t>{length, a.dim} : std::vector<int64_t>{batch, length, a.dim},
                grad.scalar_type());
  const bool planned = needs_plans(attention_mask.has_value(), normalize);
  const int64_t plan_bytes = planned ? batch * static_cast<int64_t>(sizeof(SequencePlan)) : 0;
  Tensor plans = new_empty(grad, {plan_bytes}, ScalarType::Byte);

  const Device device(grad);
  a.plans = planned ? static_cast<SequencePlan*>(plans.mutable_data_ptr()) : nullptr;
  a.grad_x = grad_x.mutable_data_ptr();
  Device::check(run_pool_backward(dtype, a, device.stream()));
  return grad_x;
}

}  // namespace
}  // namespace sentfast

STABLE_TORCH_LIBRARY_IMPL(sentfast_cuda, CUDA, m) {
  m.impl("pool_forward", TORCH_BOX(&sentfast::pool_forward));
  m.impl("pool_backward", TORCH_BOX(&sentfast::pool_backward));
}
