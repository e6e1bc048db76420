// One group of sequences on its way through the layers: its memory, and the kernels called in turn.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "encoder_batch.h"
#include "profile.h"

namespace sentfast::cpu::packed {

// Grows as needed and stays with its thread, so that its pages are touched once; large ones are given back.
class Memory {
 public:
  void* get(int64_t bytes) {
    if (bytes > size_) {
      data_.reset();
      constexpr int64_t line = 64;
      size_ = (bytes + line - 1) / line * line;
#if defined(_WIN32)
      data_.reset(_aligned_malloc(static_cast<size_t>(size_), line));
#else
      data_.reset(std::aligned_alloc(line, static_cast<size_t>(size_)));
#endif
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
      if (size_ >= kLargePage) advise_huge_pages(data_.get(), size_);
    }
    return data_.get();
  }
  void trim() {
    if (size_ > kMostKept) {
      data_.reset();
      size_ = 0;
    }
  }

 private:
  static constexpr int64_t kLargePage = int64_t{2} << 20, kMostKept = int64_t{32} << 20;
  struct Free {
#if defined(_WIN32)
    void operator()(void* p) const { _aligned_free(p); }
#else
    void operator()(void* p) const { std::free(p); }
#endif
  };
  std::unique_ptr<void, Free> data_;
  int64_t size_ = 0;
};

inline thread_local Memory scratch_memory, group_memory;

// The buffers of one group, a row per token.
struct Buffers {
  float *x, *y;         // the residual stream; the sum that is normalised next
  void* input;          // what the next linear layer reads; x itself where that will do
  void *qkv, *context;  // as elements
  void* up;             // shares its place with qkv and context, which are done by then
  std::vector<int32_t> cu_seqlens;

  Buffers(const Model& m, const Batch& b, const Group& group) {
    const int64_t element = m.element_bytes(), rows = group.tokens;
    const int64_t stream = round(rows * m.hidden * 4), sum = round(rows * std::max(m.hidden, m.embedding) * 4);
    const int64_t low = round(rows * std::max(m.hidden, m.embedding) * element);
    const int64_t qkv_bytes = round(rows * 3 * m.hidden * element), context_bytes = round(rows * m.hidden * element);
    const int64_t inner = std::max(qkv_bytes + context_bytes, round(rows * m.up_columns() * element));
    char* at = static_cast<char*>(group_memory.get(stream + sum + low + inner));
    x = reinterpret_cast<float*>(at);
    y = reinterpret_cast<float*>(at + stream);
    input = at + stream + sum;
    qkv = up = at + stream + sum + low;
    context = at + stream + sum + low + qkv_bytes;
    if (!m.pre_norm && m.compute == Compute::Float32) input = x;
    for (int64_t i = group.begin; i <= group.end; ++i) {
      cu_seqlens.push_back(b.cu_seqlens[i] - b.cu_seqlens[group.begin]);
    }
  }

 private:
  static int64_t round(int64_t bytes) { return (bytes + 63) / 64 * 64; }
};

// ---- forward ----

// Runs f(begin, end) over [0, count): here, or shared among PyTorch's threads.
struct Team {
  bool shared;

  template <class F>
  void run(int64_t count, int64_t grain, F f) const {
    if (shared) {
      torch::stable::parallel_for(0, count, grain, f);
    } else {
      f(0, count);
    }
  }
};

// One group on its way through the layers.
class Forward {
 public:
  Forward(const Model& model, const Batch& batch, const Group& group, bool shared)
      : m_(model),
        batch_(batch),
        group_(group),
        buffers_(model, batch, group),
        team_{shared},
        kernels_(kernels()),
        rows_(group.tokens),
        first_(batch.cu_seqlens[group.begin]) {
    for (int64_t i = group.begin; i < group.end; ++i) {
      longest_ = std::max(longest_, int64_t{batch.cu_seqlens[i + 1]} - batch.cu_seqlens[i]);
      has_empty_ = has_empty_ || batch.cu_seqlens[i + 1] == batch.cu_seqlens[i];
    }
  }

  // first_rows_only: the result is needed for the first token of each sequence alone, and x has only those rows.
  void run(bool first_rows_only) {
    embed();
    for (size_t i = 0; i < m_.layers.size(); ++i) {
      layer(m_.layers[i], i + 1 < m_.layers.size() ? &m_.layers[i + 1] : nullptr, first_rows_only && !has_empty_);
    }
  }

  const float* x() const { return buffers_.x; }
  const std::vector<int32_t>& cu_seqlens() const { return buffers_.cu_seqlens; }

 private:
  int compute() const { return static_cast<int>(m_.compute); }
  int64_t sequences() const { return group_.end - group_.begin; }
  int64_t row_grain() const { return grain(4 * m_.hidden); }

  // y = activation(x w^T + bias); rows of x and y are stride_x and stride_y elements apart.
  void linear(Stage stage, LinearFn kernel, const Weight& w, const void* x, int64_t stride_x, const float* bias,
              Activation activation, void* y, int64_t stride_y) {
    const Timed timed(stage);
    const Linear p = {w.columns, w.depth, x, stride_x, w.data, w.stride, bias, activation, y, stride_y};
    const int64_t count = (w.columns + kPanel - 1) / kPanel;
    team_.run(count, 1, [&](int64_t begin, int64_t end) {
      kernel(p, {0, rows_, begin, end, static_cast<float*>(scratch_memory.get(linear_scratch(rows_, w.depth) * 4))});
    });
  }

  // As elements, for the next linear layer.
  void linear(Stage stage, const Weight& w, const void* x, const float* bias, Activation activation, void* y) {
    linear(stage, kernels_.linear[compute()], w, x, w.depth, bias, activation, y, w.columns);
  }

  // y as floats.
  void linear_sum(Stage stage, const Weight& w, const void* x, int64_t stride, const float* bias) {
    linear(stage, kernels_.linear_float32[compute()], w, x, stride, bias, kIdentity, buffers_.y, w.columns);
  }

  void query_key_value(const Layer& layer) {
    if (layer.key.data == nullptr) {
      linear(kQkv, layer.query, buffers_.input, layer.qkv_bias, kIdentity, buffers_.qkv);
      return;
    }
    int64_t column = 0;
    for (const Weight* w : {&layer.query, &layer.key, &layer.value}) {
      void* y = static_cast<char*>(buffers_.qkv) + column * m_.element_bytes();
      const float* bias = layer.qkv_bias != nullptr ? layer.qkv_bias + column : nullptr;
      linear(kQkv, kernels_.linear[compute()], *w, buffers_.input, w->depth, bias, kIdentity, y, 3 * m_.hidden);
      column += w->columns;
    }
  }

  // x = norm(y + residual), and the next linear layer's input from it.
  void norm_after(const Norm& norm, const float* residual, int64_t dim) {
    const Timed timed(kNorm);
    LayerNorm p = {dim, buffers_.y, residual, norm.weight, norm.bias, m_.eps, nullptr, buffers_.x, nullptr};
    if (m_.compute == Compute::BFloat16) p.normed_bfloat16 = static_cast<BFloat16*>(buffers_.input);
    team_.run(rows_, row_grain(), [&](int64_t begin, int64_t end) { kernels_.layer_norm(p, begin, end); });
  }

  // x = y + residual, and the next linear layer's input = norm(x). Without a norm, the input is x.
  void norm_before(const Norm& norm, const float* y, const float* residual) {
    const Timed timed(kNorm);
    LayerNorm p = {m_.hidden, y, residual, norm.weight, norm.bias, m_.eps, buffers_.x, nullptr, nullptr};
    if (m_.compute == Compute::BFloat16) {
      p.normed_bfloat16 = static_cast<BFloat16*>(buffers_.input);
    } else {
      p.normed = static_cast<float*>(buffers_.input);
    }
    team_.run(rows_, row_grain(), [&](int64_t begin, int64_t end) { kernels_.layer_norm(p, begin, end); });
  }

  void embed() {
    const Embed p = {m_.embedding,
                     batch_.ids + first_,
                     batch_.position_ids + first_,
                     batch_.types != nullptr ? batch_.types + first_ : nullptr,
                     m_.words,
                     m_.positions,
                     m_.types,
                     buffers_.y};
    const EmbedFn kernel = kernels_.embed[static_cast<int>(m_.dtype)];
    {
      const Timed timed(kEmbedding);
      team_.run(rows_, row_grain(), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
    }
    if (m_.projection.data != nullptr) {
      project();
    } else {
      norm_after(m_.embedding_norm, nullptr, m_.embedding);
    }
    if (m_.pre_norm) norm_before(m_.layers[0].attention_norm, buffers_.x, nullptr);
  }

  // The normalised embeddings become the input of a projection to the hidden size.
  void project() {
    LayerNorm p = {m_.embedding, buffers_.y, nullptr, m_.embedding_norm.weight, m_.embedding_norm.bias, m_.eps,
                   nullptr,      nullptr,    nullptr};
    void* input = buffers_.qkv;  // free until the first layer
    if (m_.compute == Compute::BFloat16) {
      p.normed_bfloat16 = static_cast<BFloat16*>(input);
    } else {
      p.normed = static_cast<float*>(input);
    }
    team_.run(rows_, row_grain(), [&](int64_t begin, int64_t end) { kernels_.layer_norm(p, begin, end); });
    linear_sum(kEmbedding, m_.projection, input, m_.embedding, m_.projection_bias);
    norm_after({nullptr, nullptr}, nullptr, m_.hidden);
  }

  void attention(const Layer& layer, bool first_row_only) {
    const Timed timed(kAttend);
    const int64_t head_dim = m_.hidden / m_.heads;
    if (m_.rotary != nullptr) {
      const float* table = m_.rotary + (layer.window >= 0 ? m_.rotary_positions * head_dim : 0);
      const Rotate p = {m_.heads, head_dim, table, batch_.position_ids + first_, buffers_.qkv, 3 * m_.hidden};
      team_.run(rows_, row_grain(), [&](int64_t begin, int64_t end) { kernels_.rotate[compute()](p, begin, end); });
    }
    const auto* qkv = static_cast<const char*>(buffers_.qkv);
    const int64_t part = m_.hidden * m_.element_bytes();
    Attention p = {};
    p.heads = m_.heads;
    p.head_dim = head_dim;
    p.cu_seqlens = buffers_.cu_seqlens.data();
    p.q = {qkv, 3 * m_.hidden};
    p.k = {qkv + part, 3 * m_.hidden};
    p.v = {qkv + 2 * part, 3 * m_.hidden};
    p.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    p.bias = m_.attention_bias;
    p.bias_reach = m_.bias_reach;
    p.left = p.right = layer.window;
    p.first_row_only = first_row_only;
    p.out = buffers_.context;
    const int64_t bytes = attention_scratch(longest_, head_dim);
    team_.run(sequences() * m_.heads, grain(rows_ / sequences() * head_dim * 8), [&](int64_t begin, int64_t end) {
      kernels_.attention[compute()](p, begin, end, scratch_memory.get(bytes));
    });
  }

  // The rest of the layer, and of the model, concerns the first row of each sequence.
  void keep_first_rows() {
    for (int64_t i = 0; i < sequences(); ++i) {
      const float* from = buffers_.x + buffers_.cu_seqlens[static_cast<size_t>(i)] * m_.hidden;
      std::memmove(buffers_.x + i * m_.hidden, from, static_cast<size_t>(m_.hidden) * 4);
    }
    std::iota(buffers_.cu_seqlens.begin(), buffers_.cu_seqlens.end(), 0);
    rows_ = sequences();
  }

  void layer(const Layer& layer, const Layer* next, bool first_rows_only) {
    query_key_value(layer);
    const bool shorten = first_rows_only && next == nullptr;
    attention(layer, shorten);
    if (shorten) keep_first_rows();
    linear_sum(kOutput, layer.output, buffers_.context, m_.hidden, layer.output_bias);
    if (m_.pre_norm) {
      norm_before(layer.feed_forward_norm, buffers_.y, buffers_.x);
    } else {
      norm_after(layer.attention_norm, buffers_.x, m_.hidden);
    }
    feed_forward(layer);
    if (!m_.pre_norm) {
      norm_after(layer.feed_forward_norm, buffers_.x, m_.hidden);
    } else if (next != nullptr) {
      norm_before(next->attention_norm, buffers_.y, buffers_.x);
    } else {
      norm_after(m_.final_norm, buffers_.x, m_.hidden);
    }
  }

  void feed_forward(const Layer& layer) {
    const Activation activation = m_.gated ? kIdentity : m_.activation;
    linear(kUp, layer.up, buffers_.input, layer.up_bias, activation, buffers_.up);
    if (m_.gated) {
      const Timed timed(kUp);
      const Gate p = {m_.intermediate, m_.activation, buffers_.up, m_.up_columns()};
      team_.run(rows_, row_grain(), [&](int64_t begin, int64_t end) { kernels_.gate[compute()](p, begin, end); });
    }
    linear_sum(kDown, layer.down, buffers_.up, m_.up_columns(), layer.down_bias);
  }

  const Model& m_;
  const Batch& batch_;
  const Group& group_;
  Buffers buffers_;
  Team team_;
  const Kernels& kernels_;
  int64_t rows_, first_, longest_ = 0;
  bool has_empty_ = false;
};

}  // namespace sentfast::cpu::packed
