// Pooling: checks, allocation and threads around the loops of pooling.inl.h.
#include <memory>
#include <optional>
#include <tuple>

#include "tensors.h"

namespace sentfast::cpu {
namespace {

void set_modes(const std::vector<int64_t>& modes, int64_t* out, int64_t* count) {
  STD_TORCH_CHECK(!modes.empty() && modes.size() <= kMaxModes, "modes: expected 1 to ", kMaxModes, " modes, got ",
                  modes.size());
  *count = static_cast<int64_t>(modes.size());
  for (size_t i = 0; i < modes.size(); ++i) {
    STD_TORCH_CHECK(modes[i] >= kMean && modes[i] <= kMeanSqrtLen, "modes: unknown mode ", modes[i]);
    out[i] = modes[i];
  }
}

bool has_max(const std::vector<int64_t>& modes) {
  for (const int64_t mode : modes) {
    if (mode == kMax) return true;
  }
  return false;
}

// Fills everything but batch, length and dim.
void set_layout(Layout& layout, const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens,
                int64_t prompt_length) {
  STD_TORCH_CHECK(prompt_length >= 0, "prompt_length: expected 0 or more, got ", prompt_length);
  layout.prompt_length = prompt_length < layout.length ? prompt_length : layout.length;
  if (mask.has_value()) {
    STD_TORCH_CHECK(!cu_seqlens.has_value(), "attention_mask: expected None with cu_seqlens");
    STD_TORCH_CHECK(
        mask->dim() == 2 && mask->size(0) == layout.batch && mask->size(1) == layout.length && mask->is_cpu(),
        "attention_mask: expected a CPU tensor of shape [", layout.batch, ", ", layout.length, "]");
    const ScalarType dtype = mask->scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Bool || dtype == ScalarType::Byte || dtype == ScalarType::Char ||
                        dtype == ScalarType::Short || dtype == ScalarType::Int || dtype == ScalarType::Long,
                    "attention_mask: expected a bool or integer tensor");
    layout.mask = mask->const_data_ptr();
    layout.mask_bytes = static_cast<int64_t>(mask->element_size());
    layout.mask_stride_batch = mask->stride(0);
    layout.mask_stride_token = mask->stride(1);
  }
  if (cu_seqlens.has_value()) layout.cu_seqlens = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
}

std::optional<Tensor> dense(const std::optional<Tensor>& cu_seqlens) {
  if (!cu_seqlens.has_value()) return cu_seqlens;
  return torch::stable::contiguous(*cu_seqlens);
}

// Elements that one sequence costs: all its tokens, unless the modes only pick rows.
int64_t cost(const Layout& layout, const std::vector<int64_t>& modes) {
  int64_t tokens = 1;
  for (const int64_t mode : modes) {
    if (mode == kCls || mode == kLastToken) continue;
    const bool packed = layout.cu_seqlens != nullptr;
    tokens = packed ? layout.length / (layout.batch > 0 ? layout.batch : 1) + 1 : layout.length;
  }
  return tokens * layout.dim;
}

// Pools x into a new tensor; norm and argmax are made too where they are given and the modes have them.
Tensor pool_into(const Tensor& token_embeddings, const std::optional<Tensor>& attention_mask,
                 const std::optional<Tensor>& lengths, const std::vector<int64_t>& modes, int64_t prompt_length,
                 bool normalize, Tensor* norm, Tensor* argmax) {
  const int dtype = dtype_index(token_embeddings, "token_embeddings");
  const bool packed = lengths.has_value();
  const int64_t token = packed ? 0 : 1;
  STD_TORCH_CHECK(token_embeddings.dim() == token + 2,
                  "token_embeddings: expected [B, L, D], or [T, D] with cu_seqlens");
  check_size(token_embeddings);
  const bool dense_rows = token_embeddings.size(token + 1) <= 1 || token_embeddings.stride(token + 1) == 1;
  const Tensor x = dense_rows ? token_embeddings : torch::stable::contiguous(token_embeddings);
  const std::optional<Tensor> cu_seqlens = dense(lengths);

  Pool p = {};
  set_modes(modes, p.modes, &p.mode_count);
  p.normalize = normalize;
  p.layout.length = x.size(token);
  p.layout.dim = x.size(token + 1);
  if (packed) check_cu_seqlens(*cu_seqlens, p.layout.length);
  p.layout.batch = packed ? cu_seqlens->size(0) - 1 : x.size(0);
  set_layout(p.layout, attention_mask, cu_seqlens, prompt_length);
  p.stride_batch = packed ? 0 : x.stride(0);
  p.stride_token = x.stride(token);
  p.x = x.const_data_ptr();

  const int64_t batch = p.layout.batch, dim = p.layout.dim;
  const Life life = norm == nullptr ? Life::Given : Life::Kept;
  Tensor out = new_tensor({batch, times(p.mode_count, dim)}, x.scalar_type());
  p.out = out.mutable_data_ptr();
  if (norm != nullptr) {
    *norm = new_tensor({normalize ? batch : 0}, ScalarType::Float, life);
    p.norm = static_cast<float*>(norm->mutable_data_ptr());
  }
  if (argmax != nullptr && has_max(modes)) {
    STD_TORCH_CHECK(p.layout.length <= INT32_MAX, "token_embeddings: expected at most 2^31 - 1 tokens with max");
    *argmax = new_tensor({batch, dim}, ScalarType::Int, life);
    p.argmax = static_cast<int32_t*>(argmax->mutable_data_ptr());
  } else if (argmax != nullptr) {
    *argmax = new_tensor({0}, ScalarType::Int);
  }

  const PoolFn kernel = kernels().pool[dtype];
  torch::stable::parallel_for(0, batch, grain(cost(p.layout, modes)), [&](int64_t begin, int64_t end) {
    const auto scratch = new_array<float>(pool_scratch(dim));
    kernel(p, begin, end, scratch.get());
  });
  return out;
}

Tensor pool(const Tensor& x, const std::optional<Tensor>& attention_mask, const std::optional<Tensor>& cu_seqlens,
            const std::vector<int64_t>& modes, int64_t prompt_length, bool normalize) {
  return pool_into(x, attention_mask, cu_seqlens, modes, prompt_length, normalize, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> pool_forward(const Tensor& x, const std::optional<Tensor>& attention_mask,
                                                const std::optional<Tensor>& cu_seqlens,
                                                const std::vector<int64_t>& modes, int64_t prompt_length,
                                                bool normalize) {
  Tensor norm, argmax;
  Tensor out = pool_into(x, attention_mask, cu_seqlens, modes, prompt_length, normalize, &norm, &argmax);
  return {out, norm, argmax};
}

Tensor pool_backward(Tensor grad, Tensor out, Tensor norm, Tensor argmax, const std::optional<Tensor>& attention_mask,
                     const std::optional<Tensor>& lengths, const std::vector<int64_t>& modes, int64_t prompt_length,
                     int64_t length, bool normalize) {
  const int dtype = dtype_index(grad, "grad");
  const bool packed = lengths.has_value();
  const std::optional<Tensor> cu_seqlens = dense(lengths);

  PoolBackward p = {};
  set_modes(modes, p.modes, &p.mode_count);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(1) % p.mode_count == 0, "grad: expected [B, len(modes) * D]");
  STD_TORCH_CHECK(length >= 0, "length: expected 0 or more, got ", length);
  const int64_t batch = grad.size(0), dim = grad.size(1) / p.mode_count;
  p.normalize = normalize;
  p.layout.length = length;
  p.layout.dim = dim;
  p.layout.batch = batch;
  if (packed) {
    check_cu_seqlens(*cu_seqlens, length);
    STD_TORCH_CHECK(cu_seqlens->size(0) == batch + 1, "cu_seqlens: expected shape [", batch + 1, "]");
  }
  set_layout(p.layout, attention_mask, cu_seqlens, prompt_length);

  grad = torch::stable::contiguous(grad);
  out = torch::stable::contiguous(out);
  norm = torch::stable::contiguous(norm);
  argmax = torch::stable::contiguous(argmax);
  if (normalize) {
    STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == batch && out.size(1) == grad.size(1) &&
                        out.scalar_type() == grad.scalar_type(),
                    "out: expected the shape and dtype of grad");
    STD_TORCH_CHECK(norm.numel() == batch && norm.scalar_type() == ScalarType::Float, "norm: expected float32 [B]");
  }
  if (has_max(modes)) {
    STD_TORCH_CHECK(argmax.numel() == times(batch, dim) && argmax.scalar_type() == ScalarType::Int,
                    "argmax: expected int32 [B, D]");
  }

  Tensor grad_x = new_tensor(packed ? std::vector<int64_t>{length, dim} : std::vector<int64_t>{batch, length, dim},
                             grad.scalar_type(), Life::Kept);
  p.grad = grad.const_data_ptr();
  p.out = out.const_data_ptr();
  p.norm = static_cast<const float*>(norm.const_data_ptr());
  p.argmax = static_cast<const int32_t*>(argmax.const_data_ptr());
  p.grad_x = grad_x.mutable_data_ptr();

  const PoolBackwardFn kernel = kernels().pool_backward[dtype];
  const int64_t tokens = packed ? length / (batch > 0 ? batch : 1) + 1 : length;
  torch::stable::parallel_for(0, batch, grain(tokens * dim), [&](int64_t begin, int64_t end) {
    const auto scratch = new_array<float>(pool_backward_scratch(dim, p.mode_count));
    kernel(p, begin, end, scratch.get());
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sentfast, CPU, m) {
  m.impl("pool", TORCH_BOX(&pool));
  m.impl("pool_forward", TORCH_BOX(&pool_forward));
  m.impl("pool_backward", TORCH_BOX(&pool_backward));
}

}  // namespace sentfast::cpu
