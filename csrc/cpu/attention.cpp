// Attention over packed sequences: checks, allocation and threads around attention.inl.h and attention_backward.inl.h.
#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "dropout.h"
#include "tensors.h"

namespace sentfast::cpu {
namespace {

// Sums of the bias gradient, one per part, are added in order: they do not depend on the number of threads.
constexpr int64_t kMostParts = 32;

// [T, heads, head_dim] as rows; copied only where a row is not in one piece, and into float32 where there is no kernel:
// for float16, and for bfloat16 that does not come in pairs.
struct HeadRows {
  Tensor tensor;
  int64_t stride;

  explicit HeadRows(const Tensor& x) : tensor(x) {
    check_size(x);
    const int64_t heads = x.size(1), head_dim = x.size(2);
    if (x.scalar_type() == ScalarType::Half || head_dim % 2 != 0) tensor = as(x, ScalarType::Float);
    const bool whole = (head_dim <= 1 || tensor.stride(2) == 1) && (heads <= 1 || tensor.stride(1) == head_dim);
    const bool pairs = tensor.scalar_type() != ScalarType::BFloat16 || tensor.stride(0) % 2 == 0;
    if (!whole || !pairs) tensor = torch::stable::contiguous(tensor);
    stride = tensor.size(0) > 1 ? tensor.stride(0) : times(heads, head_dim);
  }
  Rows get() const { return {tensor.const_data_ptr(), stride}; }
};

struct Sequences {
  Tensor tensor;
  const int32_t* ends;
  int64_t count, tokens, longest = 0;

  Sequences(const Tensor& cu_seqlens, int64_t total) : tensor(torch::stable::contiguous(cu_seqlens)), tokens(total) {
    check_cu_seqlens(tensor, total);
    ends = static_cast<const int32_t*>(tensor.const_data_ptr());
    count = tensor.size(0) - 1;
    for (int64_t i = 0; i < count; ++i) longest = std::max<int64_t>(longest, ends[i + 1] - ends[i]);
  }

  // Where up to kMostParts parts of about as many tokens start, then the number of sequences.
  std::vector<int64_t> parts() const {
    std::vector<int64_t> starts = {0};
    const int64_t size = (tokens + kMostParts - 1) / kMostParts;
    for (int64_t i = 0; i < count; ++i) {
      if (ends[i + 1] - ends[starts.back()] >= size && i + 1 < count) starts.push_back(i + 1);
    }
    starts.push_back(count);
    return starts;
  }
};

const Tensor& checked(const Tensor& x, const Tensor& q, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3, name, ": expected a CPU tensor of shape [T, heads, head_dim]");
  STD_TORCH_CHECK(sizes_of(x) == sizes_of(q) && x.scalar_type() == q.scalar_type(), name,
                  ": expected the shape and dtype of q");
  return x;
}

void check_bias(const Tensor& bias, int64_t heads, int64_t longest) {
  STD_TORCH_CHECK(bias.is_cpu() && bias.dim() == 2 && bias.size(0) == heads && bias.size(1) % 2 == 1 &&
                      bias.scalar_type() == ScalarType::Float && bias.size(1) / 2 + 1 >= longest,
                  "bias: expected float32 [", heads, ", 2 * R - 1] with R of at least ", longest,
                  ", the longest sequence");
}

// What a call holds on to while the kernel runs.
struct Operands {
  HeadRows q, k, v;
  Sequences sequences;
  std::optional<Tensor> bias;
  Attention p = {};

  Operands(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens,
           const std::optional<Tensor>& biases, double scale, int64_t left, int64_t right, double dropout_p,
           int64_t seed, int64_t stream)
      : q(checked(query, query, "q")),
        k(checked(key, query, "k")),
        v(checked(value, query, "v")),
        sequences(cu_seqlens, query.size(0)),
        bias(biases) {
    if (bias.has_value()) check_bias(*bias, query.size(1), sequences.longest);
    p.heads = query.size(1);
    p.head_dim = query.size(2);
    p.cu_seqlens = sequences.ends;
    p.q = q.get();
    p.k = k.get();
    p.v = v.get();
    p.scale = static_cast<float>(scale);
    if (bias.has_value()) {
      *bias = torch::stable::contiguous(*bias);
      p.bias = static_cast<const float*>(bias->const_data_ptr());
      p.bias_reach = bias->size(1) / 2 + 1;
    }
    p.left = std::min<int64_t>(left, INT32_MAX);
    p.right = std::min<int64_t>(right, INT32_MAX);
    p.lse_stride = sequences.tokens;
    p.dropout = dropout_of(dropout_p, seed, stream);
  }
  int compute() const { return q.tensor.scalar_type() == ScalarType::BFloat16 ? 1 : 0; }
  // Of a head of one sequence, in what a task is measured in.
  int64_t work() const { return sequences.tokens / std::max<int64_t>(sequences.count, 1) * p.head_dim * 8; }
};

Tensor attend(Operands& o, ScalarType dtype, Tensor* lse) {
  Attention& p = o.p;
  const Life life = lse == nullptr ? Life::Given : Life::Kept;
  Tensor out = new_tensor({o.sequences.tokens, p.heads, p.head_dim}, o.q.tensor.scalar_type(), life);
  p.out = out.mutable_data_ptr();
  if (lse != nullptr) {
    *lse = new_tensor({p.heads, o.sequences.tokens}, ScalarType::Float, life);
    p.lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  const int64_t bytes = attention_scratch(o.sequences.longest, p.head_dim);
  const AttentionFn kernel = kernels().attention[o.compute()];
  torch::stable::parallel_for(0, o.sequences.count * p.heads, grain(o.work()), [&](int64_t begin, int64_t end) {
    const auto scratch = new_array<char>(bytes);
    kernel(p, begin, end, scratch.get());
  });
  return as(out, dtype);
}

Tensor varlen_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, int64_t,
                        const std::optional<Tensor>& bias, double scale, int64_t left, int64_t right, double dropout_p,
                        int64_t seed, int64_t stream) {
  Operands o(q, k, v, cu_seqlens, bias, scale, left, right, dropout_p, seed, stream);
  return attend(o, q.scalar_type(), nullptr);
}

std::tuple<Tensor, Tensor> varlen_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& cu_seqlens, int64_t,
                                                    const std::optional<Tensor>& bias, double scale, int64_t left,
                                                    int64_t right, double dropout_p, int64_t seed, int64_t stream) {
  Operands o(q, k, v, cu_seqlens, bias, scale, left, right, dropout_p, seed, stream);
  Tensor lse;
  Tensor out = attend(o, q.scalar_type(), &lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor> varlen_attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                     const Tensor& v, const Tensor&, const Tensor&,
                                                     const Tensor& cu_seqlens, int64_t,
                                                     const std::optional<Tensor>& bias, double scale, int64_t left,
                                                     int64_t right, double dropout_p, int64_t seed, int64_t stream) {
  Operands o(q, k, v, cu_seqlens, bias, scale, left, right, dropout_p, seed, stream);
  const int64_t tokens = o.sequences.tokens, heads = o.p.heads, head_dim = o.p.head_dim, hidden = heads * head_dim;
  const HeadRows gradient(checked(grad, q, "grad"));
  const ScalarType dtype = o.q.tensor.scalar_type();
  Tensor grad_qkv = new_tensor({tokens, 3, heads, head_dim}, dtype, Life::Kept);
  auto* data = static_cast<char*>(grad_qkv.mutable_data_ptr());
  const int64_t bytes = hidden * static_cast<int64_t>(grad_qkv.element_size());
  const std::vector<int64_t> parts = o.sequences.parts();
  const auto count = static_cast<int64_t>(parts.size()) - 1;
  const int64_t columns = o.p.bias != nullptr ? 2 * o.p.bias_reach - 1 : 0;
  std::vector<float> grad_bias(static_cast<size_t>(count * heads * columns), 0.0f);

  AttentionBackward p = {};
  p.forward = o.p;
  p.grad = gradient.get();
  p.grad_q = data;
  p.grad_k = data + bytes;
  p.grad_v = data + 2 * bytes;
  p.grad_stride = 3 * hidden;
  p.parts = parts.data();
  p.grad_bias = columns > 0 ? grad_bias.data() : nullptr;
  const int64_t scratch_bytes = attention_backward_scratch(o.sequences.longest, head_dim);
  const AttentionBackwardFn kernel = kernels().attention_backward[o.compute()];
  torch::stable::parallel_for(0, count * heads, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = new_array<char>(scratch_bytes);
    kernel(p, begin, end, scratch.get());
  });
  Tensor sum = new_tensor({columns > 0 ? heads : 0, columns}, ScalarType::Float);
  sum_parts(grad_bias.data(), count, heads * columns, heads * columns, static_cast<float*>(sum.mutable_data_ptr()));
  return {as(grad_qkv, q.scalar_type()), sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sentfast, CPU, m) {
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention));
  m.impl("varlen_attention_forward", TORCH_BOX(&varlen_attention_forward));
  m.impl("varlen_attention_backward", TORCH_BOX(&varlen_attention_backward));
}

}  // namespace sentfast::cpu
