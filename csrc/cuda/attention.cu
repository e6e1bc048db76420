// Attention on CUDA: checks the tensors, starts the kernel. Schemas and meaning: sentfast/ops/attention.py.
#include "attention.cuh"

#include <tuple>

#include "tensors.h"

namespace sentfast {
namespace {

// The heads in whole vectors: as they lie, or copied.
Tensor in_vectors(const Tensor& x) {
  const int64_t strides[2] = {x.stride(0), x.stride(1)};
  if (vectors(x.const_data_ptr(), 2, x.stride(2), x.size(2), 2, strides)) return x;
  Tensor copy = new_empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  torch::stable::copy_(copy, x);
  return copy;
}

void check_part(const char* name, const Tensor& x, const Tensor& q) {
  check_device(name, x, q);
  check_type(name, x, q.scalar_type());
  check_dim(name, x, 3);
  check_leading(name, x, q, 3);
}

std::tuple<Tensor, Tensor> varlen_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& cu_seqlens, int64_t max_seqlen,
                                                    const std::optional<Tensor>& bias, double softmax_scale,
                                                    int64_t left, int64_t right, double dropout_p, int64_t, int64_t) {
  const Dtype dtype = dtype_of("q", q);
  STD_TORCH_CHECK(dtype != Dtype::kFloat, "q: expected bfloat16 or float16, got ", q.scalar_type());
  check_part("q", q, q);
  check_part("k", k, q);
  check_part("v", v, q);
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  STD_TORCH_CHECK(dim == 32 || dim == 64, "q: expected heads of 32 or 64, got ", dim);
  STD_TORCH_CHECK(max_seqlen >= 0 && max_seqlen <= kMostKeys, "max_seqlen: expected 0 to ", kMostKeys, ", got ",
                  max_seqlen);
  STD_TORCH_CHECK(left < 0 && right < 0, "left, right: expected no window, got ", left, " and ", right);
  STD_TORCH_CHECK(dropout_p == 0.0, "dropout_p: expected 0, got ", dropout_p);
  check_device("cu_seqlens", cu_seqlens, q);
  check_type("cu_seqlens", cu_seqlens, ScalarType::Int);
  check_dim("cu_seqlens", cu_seqlens, 1);
  STD_TORCH_CHECK(cu_seqlens.size(0) >= 1, "cu_seqlens: expected shape [B + 1], got [0]");

  const Tensor parts[3] = {in_vectors(q), in_vectors(k), in_vectors(v)};
  AttentionArguments a{};
  Tensor table = q;
  if (bias.has_value()) {
    check_device("bias", *bias, q);
    check_type("bias", *bias, ScalarType::Float);
    check_dim("bias", *bias, 2);
    check_size("bias", *bias, 0, heads);
    STD_TORCH_CHECK(bias->size(1) % 2 == 1, "bias: expected an odd number of columns, got ", bias->size(1));
    table = torch::stable::contiguous(*bias);
    a.bias = table.const_data_ptr<float>();
    a.reach = bias->size(1) / 2 + 1;
  }
  Tensor out = new_empty(q, {tokens, heads, dim}, q.scalar_type());
  Tensor lse = new_empty(q, {heads, tokens}, ScalarType::Float);

  const Device device(q);
  a.q = parts[0].const_data_ptr();
  a.k = parts[1].const_data_ptr();
  a.v = parts[2].const_data_ptr();
  int64_t* const strides[3] = {a.q_stride, a.k_stride, a.v_stride};
  for (int part = 0; part < 3; ++part) {
    for (int d = 0; d < 2; ++d) strides[part][d] = parts[part].stride(d);
  }
  a.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
  a.cu_seqlens_stride = cu_seqlens.stride(0);
  a.out = out.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr<float>();
  a.tokens = tokens;
  a.heads = heads;
  a.sequences = cu_seqlens.size(0) - 1;
  a.max_seqlen = max_seqlen;
  a.scale = static_cast<float>(softmax_scale);
  Device::check(run_attention(dtype, dim, a, device.stream()));
  return {out, lse};
}

}  // namespace
}  // namespace sentfast

STABLE_TORCH_LIBRARY_IMPL(sentfast_cuda, CUDA, m) {
  m.impl("varlen_attention_forward", TORCH_BOX(&sentfast::varlen_attention_forward));
}
