// The packed encoder: from token ids to token embeddings or sentence embeddings, group by group.
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>

#include "encoder_forward.h"

namespace sentfast::cpu::packed {
namespace {

// Where the rows of the result go.
struct Output {
  char* data;
  int64_t element;  // bytes
  std::vector<int64_t> modes;
  int64_t prompt_length, padded_length;
  bool normalize;

  bool first_rows_only() const { return modes.size() == 1 && modes[0] == kCls && prompt_length == 0; }
};

void write_pooled(const Model& m, const Group& group, const Forward& forward, const Output& out) {
  Pool p = {};
  p.layout.batch = group.end - group.begin;
  p.layout.length = forward.cu_seqlens().back();
  p.layout.dim = m.hidden;
  p.layout.cu_seqlens = forward.cu_seqlens().data();
  p.layout.prompt_length = out.prompt_length;
  p.mode_count = static_cast<int64_t>(out.modes.size());
  std::copy(out.modes.begin(), out.modes.end(), p.modes);
  p.normalize = out.normalize;
  p.x = forward.x();
  p.stride_token = m.hidden;
  const int64_t width = p.mode_count * m.hidden, count = p.layout.batch * width;
  char* to = out.data + group.begin * width * out.element;
  std::unique_ptr<float[]> floats;
  if (m.dtype != Dtype::Float32) floats.reset(new float[static_cast<size_t>(count)]);
  p.out = m.dtype == Dtype::Float32 ? reinterpret_cast<float*>(to) : floats.get();
  const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(pool_scratch(m.hidden))]);
  kernels().pool[static_cast<int>(Dtype::Float32)](p, 0, p.layout.batch, scratch.get());
  if (floats) kernels().narrow[static_cast<int>(m.dtype)](floats.get(), to, count);
}

void write_tokens(const Model& m, const Batch& b, const Group& group, const Forward& forward, const Output& out) {
  const NarrowFn narrow = kernels().narrow[static_cast<int>(m.dtype)];
  const int64_t row_bytes = m.hidden * out.element;
  for (int64_t i = group.begin; i < group.end; ++i) {
    const int64_t begin = b.cu_seqlens[i], count = b.cu_seqlens[i + 1] - begin;
    const int64_t row = out.padded_length > 0 ? i * out.padded_length : begin;
    narrow(forward.x() + (begin - b.cu_seqlens[group.begin]) * m.hidden, out.data + row * row_bytes, count * m.hidden);
    if (out.padded_length > 0) {
      std::memset(out.data + (row + count) * row_bytes, 0,
                  static_cast<size_t>((out.padded_length - count) * row_bytes));
    }
  }
}

void run_group(const Model& m, const Batch& b, const Group& group, bool shared, const Output& out) {
  Forward forward(m, b, group, shared);
  forward.run(out.first_rows_only());
  const Timed timed(kResult);
  if (out.modes.empty()) {
    write_tokens(m, b, group, forward, out);
  } else {
    write_pooled(m, group, forward, out);
  }
}

void run_plan(const Model& m, const Batch& b, const Plan& plan, const Output& out) {
  const auto count = static_cast<int64_t>(plan.groups.size());
  if (plan.shared || count <= 1) {
    for (const Group& group : plan.groups) run_group(m, b, group, plan.shared, out);
    group_memory.trim();
    return;
  }
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) run_group(m, b, plan.groups[static_cast<size_t>(i)], false, out);
    group_memory.trim();
    scratch_memory.trim();
  });
}

Tensor encoder(const Tensor& word_embeddings, const Tensor& input_ids, const Tensor& cu_seqlens,
               const std::optional<Tensor>& token_type_ids, const std::optional<Tensor>& position_ids,
               const std::vector<Tensor>& weights, int64_t heads, int64_t activation,
               const std::vector<int64_t>& windows, bool pre_norm, bool gated, int64_t position_offset, double eps,
               const std::vector<int64_t>& modes, int64_t prompt_length, bool normalize, int64_t padded_length) {
  const Model m = read_model(word_embeddings, weights, heads, activation, windows, pre_norm, gated, eps);
  const Batch b = read_batch(m, input_ids, cu_seqlens, token_type_ids, position_ids, position_offset);
  STD_TORCH_CHECK(prompt_length >= 0, "prompt_length: expected 0 or more, got ", prompt_length);
  STD_TORCH_CHECK(modes.size() <= kMaxModes, "modes: expected at most ", kMaxModes, " modes, got ", modes.size());
  for (const int64_t mode : modes) {
    STD_TORCH_CHECK(mode >= kMean && mode <= kMeanSqrtLen, "modes: unknown mode ", mode);
  }
  std::vector<int64_t> sizes = {b.tokens, m.hidden};
  if (!modes.empty()) {
    sizes = {b.sequences, times(static_cast<int64_t>(modes.size()), m.hidden)};
  } else if (padded_length > 0) {
    for (int64_t i = 0; i < b.sequences; ++i) {
      STD_TORCH_CHECK(b.cu_seqlens[i + 1] - b.cu_seqlens[i] <= padded_length,
                      "padded_length: expected at least the longest sequence, got ", padded_length);
    }
    sizes = {b.sequences, padded_length, m.hidden};
  }
  Tensor result = new_tensor(sizes, word_embeddings.scalar_type());
  const Output out = {static_cast<char*>(result.mutable_data_ptr()),
                      static_cast<int64_t>(result.element_size()),
                      modes,
                      prompt_length,
                      padded_length,
                      normalize};
  run_plan(m, b, make_plan(m, b), out);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sentfast, CPU, m) { m.impl("encoder", TORCH_BOX(&encoder)); }

}  // namespace sentfast::cpu::packed
