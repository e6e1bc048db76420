// The packed encoder: weights, groups of sequences and threads around the loops of linear.inl.h, attention.inl.h and
// layers.inl.h.
//
// A group is some whole sequences. Either each thread carries groups of its own through all layers, with no waiting,
// or, where there are too few for that, all threads share the work of each step of one group.
#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <optional>

#include "profile.h"
#include "tensors.h"

namespace sentfast::cpu {
namespace {

// Tokens of a group: enough to use a panel of weights often, few enough that their activations stay in cache.
constexpr int64_t kGroupTokens = 192;
// Multiply-adds of a layer below which threads cost more than they bring.
constexpr int64_t kWorthSharing = int64_t{2} << 20;
// The threads that share a group must be idle for less than this, else the group is shared step by step.
constexpr double kBalanced = 0.8;

// ---- weights: the tensors of Embedding and Layer in sentfast/reference/encoder.py, in that order ----

enum EmbeddingTensor {
  kPositions,
  kTokenTypes,
  kEmbeddingNormWeight,
  kEmbeddingNormBias,
  kProjectionWeight,
  kProjectionBias,
  kAttentionBias,
  kRotary,
  kFinalNormWeight,
  kFinalNormBias,
  kEmbeddingTensors
};

enum LayerTensor {
  kQkvWeight,
  kKeyWeight,
  kValueWeight,
  kQkvBias,
  kOutputWeight,
  kOutputBias,
  kAttentionNormWeight,
  kAttentionNormBias,
  kUpWeight,
  kUpBias,
  kDownWeight,
  kDownBias,
  kFeedForwardNormWeight,
  kFeedForwardNormBias,
  kLayerTensors
};

// The weight of a linear layer.
struct Weight {
  const void* data = nullptr;                  // nullptr: no such layer
  int64_t columns = 0, depth = 0, stride = 0;  // stride of rows; 0: panels
};

struct Norm {
  const float *weight, *bias;
};

struct Layer {
  Weight query, key, value;  // query alone: its rows, then those of key and value
  Weight output, up, down;
  const float *qkv_bias, *output_bias, *up_bias, *down_bias;
  Norm attention_norm, feed_forward_norm;
  int64_t window;
};

struct Model {
  Dtype dtype;  // of the tables and of the result
  Compute compute;
  int64_t vocabulary, embedding, hidden, intermediate, heads, position_count, type_count;
  const void *words, *positions, *types;
  Norm embedding_norm, final_norm;
  Weight projection;
  const float *projection_bias, *attention_bias, *rotary;
  int64_t bias_reach, rotary_positions;
  std::vector<Layer> layers;
  Activation activation;
  bool pre_norm, gated;
  float eps;

  int64_t up_columns() const { return gated ? 2 * intermediate : intermediate; }
  int64_t element_bytes() const { return compute == Compute::BFloat16 ? 2 : 4; }
  int64_t multiply_adds_per_token() const { return hidden * (4 * hidden + up_columns() + intermediate); }
};

// Reads `weights` and checks each tensor against the sizes that the first ones set.
class Reader {
 public:
  explicit Reader(const std::vector<Tensor>& weights) : weights_(weights) {}

  const Tensor& at(int64_t i) const { return weights_[static_cast<size_t>(i)]; }

  const float* floats(int64_t i, int64_t count, bool required = false) const {
    const Tensor& x = at(i);
    if (x.numel() == 0 && !required) return nullptr;
    STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Float && x.numel() == count,
                    "weights[", i, "]: expected a contiguous float32 CPU tensor of ", count, " elements");
    return static_cast<const float*>(x.const_data_ptr());
  }

  Norm norm(int64_t i, int64_t count) const { return {floats(i, count), floats(i + 1, count)}; }

  Weight weight(int64_t i, int64_t columns, int64_t depth, Compute compute) const {
    const Tensor& x = at(i);
    const bool pairs = compute == Compute::BFloat16;
    if (!pairs && x.dim() == 2) {
      STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.size(0) == columns && x.size(1) == depth &&
                          x.scalar_type() == ScalarType::Float,
                      "weights[", i, "]: expected a contiguous float32 CPU matrix of ", columns, " by ", depth);
      return {x.const_data_ptr(), columns, depth, depth};
    }
    const int64_t count = (columns + kPanel - 1) / kPanel, steps = pairs ? (depth + 1) / 2 : depth;
    STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.dim() == (pairs ? 4 : 3) && x.size(0) == count &&
                        x.size(1) == steps && x.size(2) == kPanel &&
                        x.scalar_type() == (pairs ? ScalarType::BFloat16 : ScalarType::Float),
                    "weights[", i, "]: expected panels of ", columns, " by ", depth, " features");
    return {x.const_data_ptr(), columns, depth, 0};
  }

  const void* table(int64_t i, int64_t columns, ScalarType dtype, int64_t* rows) const {
    const Tensor& x = at(i);
    *rows = 0;
    if (x.numel() == 0) return nullptr;
    STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.dim() == 2 && x.size(1) == columns && x.scalar_type() == dtype,
                    "weights[", i, "]: expected a contiguous CPU table of ", columns,
                    " columns in the dtype of word_embeddings");
    *rows = x.size(0);
    return x.const_data_ptr();
  }

 private:
  const std::vector<Tensor>& weights_;
};

Layer read_layer(const Model& m, const Reader& r, int64_t first, int64_t window) {
  Layer layer;
  if (r.at(first + kKeyWeight).numel() > 0) {
    layer.query = r.weight(first + kQkvWeight, m.hidden, m.hidden, m.compute);
    layer.key = r.weight(first + kKeyWeight, m.hidden, m.hidden, m.compute);
    layer.value = r.weight(first + kValueWeight, m.hidden, m.hidden, m.compute);
  } else {
    layer.query = r.weight(first + kQkvWeight, 3 * m.hidden, m.hidden, m.compute);
  }
  layer.output = r.weight(first + kOutputWeight, m.hidden, m.hidden, m.compute);
  layer.up = r.weight(first + kUpWeight, m.up_columns(), m.hidden, m.compute);
  layer.down = r.weight(first + kDownWeight, m.hidden, m.intermediate, m.compute);
  layer.qkv_bias = r.floats(first + kQkvBias, 3 * m.hidden);
  layer.output_bias = r.floats(first + kOutputBias, m.hidden);
  layer.up_bias = r.floats(first + kUpBias, m.up_columns());
  layer.down_bias = r.floats(first + kDownBias, m.hidden);
  layer.attention_norm = r.norm(first + kAttentionNormWeight, m.hidden);
  layer.feed_forward_norm = r.norm(first + kFeedForwardNormWeight, m.hidden);
  layer.window = std::min<int64_t>(window, INT32_MAX);  // so that sums of it do not overflow
  return layer;
}

Model read_model(const Tensor& words, const std::vector<Tensor>& weights, int64_t heads, int64_t activation,
                 const std::vector<int64_t>& windows, bool pre_norm, bool gated, double eps) {
  const auto count = static_cast<int64_t>(weights.size());
  STD_TORCH_CHECK(count > kEmbeddingTensors && (count - kEmbeddingTensors) % kLayerTensors == 0, "weights: expected ",
                  int{kEmbeddingTensors}, " tensors and ", int{kLayerTensors}, " for each layer, got ", count);
  const int64_t layers = (count - kEmbeddingTensors) / kLayerTensors;
  STD_TORCH_CHECK(windows.empty() || static_cast<int64_t>(windows.size()) == layers,
                  "windows: expected none or one per layer");
  STD_TORCH_CHECK(activation >= kGelu && activation <= kSilu, "activation: expected 0 to 3, got ", activation);
  STD_TORCH_CHECK(words.dim() == 2 && words.is_contiguous(), "word_embeddings: expected a contiguous [V, E]");
  const Reader r(weights);
  Model m = {};
  m.dtype = dtype_of(words, "word_embeddings");
  m.words = words.const_data_ptr();
  m.vocabulary = words.size(0);
  m.embedding = words.size(1);
  m.heads = heads;
  m.activation = static_cast<Activation>(activation);
  m.pre_norm = pre_norm;
  m.gated = gated;
  m.eps = static_cast<float>(eps);
  const Tensor& down = r.at(kEmbeddingTensors + kDownWeight);
  m.compute = down.scalar_type() == ScalarType::BFloat16 ? Compute::BFloat16 : Compute::Float32;
  const bool pairs = m.compute == Compute::BFloat16;
  STD_TORCH_CHECK(pairs ? down.dim() == 4 : down.dim() == 2 || down.dim() == 3,
                  "weights: expected the down projection as a matrix or as panels");
  m.intermediate = down.size(1) * (pairs ? 2 : 1);
  const Tensor& projection = r.at(kProjectionWeight);
  m.hidden = m.embedding;
  if (projection.numel() > 0) {
    m.hidden = r.at(kProjectionBias).numel();
    m.projection = r.weight(kProjectionWeight, m.hidden, m.embedding, m.compute);
    m.projection_bias = r.floats(kProjectionBias, m.hidden, true);
  }
  STD_TORCH_CHECK(heads > 0 && m.hidden % heads == 0 && m.hidden / heads % 8 == 0,
                  "heads: expected heads of a multiple of 8 columns, got ", heads, " for ", m.hidden, " columns");
  STD_TORCH_CHECK(m.projection.data == nullptr || !pairs || m.embedding % 2 == 0,
                  "word_embeddings: expected an even number of columns with bfloat16 weights");
  m.positions = r.table(kPositions, m.embedding, words.scalar_type(), &m.position_count);
  m.types = r.table(kTokenTypes, m.embedding, words.scalar_type(), &m.type_count);
  m.embedding_norm = r.norm(kEmbeddingNormWeight, m.embedding);
  m.final_norm = r.norm(kFinalNormWeight, m.hidden);
  if (r.at(kAttentionBias).numel() > 0) {
    STD_TORCH_CHECK(r.at(kAttentionBias).dim() == 2, "weights: expected attention_bias of shape [heads, 2 * R - 1]");
    m.bias_reach = (r.at(kAttentionBias).size(1) + 1) / 2;
    m.attention_bias = r.floats(kAttentionBias, heads * (2 * m.bias_reach - 1));
  }
  if (r.at(kRotary).numel() > 0) {
    STD_TORCH_CHECK(r.at(kRotary).dim() == 3, "weights: expected rotary of shape [2, P, head size]");
    m.rotary_positions = r.at(kRotary).size(1);
    m.rotary = r.floats(kRotary, 2 * m.rotary_positions * (m.hidden / heads));
  }
  for (int64_t i = 0; i < layers; ++i) {
    m.layers.push_back(read_layer(m, r, kEmbeddingTensors + i * kLayerTensors,
                                  windows.empty() ? -1 : windows[static_cast<size_t>(i)]));
  }
  return m;
}

// ---- batch ----

struct Batch {
  const int32_t *ids, *types, *cu_seqlens;  // types may be nullptr
  const int32_t* position_ids;
  std::vector<int32_t> made_position_ids;
  int64_t tokens, sequences;
};

const int32_t* read_ids(const Tensor& x, const char* name, int64_t count, int64_t limit) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.dim() == 1 && x.scalar_type() == ScalarType::Int, name,
                  ": expected a contiguous int32 CPU tensor of one dimension");
  STD_TORCH_CHECK(count < 0 || x.numel() == count, name, ": expected ", count, " elements, got ", x.numel());
  const auto* ids = static_cast<const int32_t*>(x.const_data_ptr());
  for (int64_t i = 0; limit >= 0 && i < x.numel(); ++i) {
    STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < limit, name, ": expected 0 to ", limit - 1, ", got ", ids[i]);
  }
  return ids;
}

Batch read_batch(const Model& m, const Tensor& input_ids, const Tensor& cu_seqlens,
                 const std::optional<Tensor>& token_type_ids, const std::optional<Tensor>& position_ids,
                 int64_t position_offset) {
  Batch b = {};
  b.ids = read_ids(input_ids, "input_ids", -1, m.vocabulary);
  b.tokens = input_ids.numel();
  STD_TORCH_CHECK(cu_seqlens.numel() >= 1, "cu_seqlens: expected shape [B + 1]");
  b.cu_seqlens = read_ids(cu_seqlens, "cu_seqlens", -1, -1);
  b.sequences = cu_seqlens.numel() - 1;
  int64_t longest = 0;
  bool rising = b.cu_seqlens[0] == 0 && b.cu_seqlens[b.sequences] == b.tokens;
  for (int64_t i = 0; i < b.sequences; ++i) {
    const int64_t length = int64_t{b.cu_seqlens[i + 1]} - b.cu_seqlens[i];
    rising = rising && length >= 0;
    longest = std::max(longest, length);
  }
  STD_TORCH_CHECK(rising, "cu_seqlens: expected to rise from 0 to ", b.tokens, " (the number of tokens)");
  STD_TORCH_CHECK(m.attention_bias == nullptr || longest <= m.bias_reach, "input_ids: expected sequences of at most ",
                  m.bias_reach, " tokens, got ", longest);
  if (token_type_ids.has_value() && m.types != nullptr) {
    b.types = read_ids(*token_type_ids, "token_type_ids", b.tokens, m.type_count);
  }
  int64_t limit = INT32_MAX;
  if (m.positions != nullptr) limit = m.position_count;
  if (m.rotary != nullptr) limit = std::min(limit, m.rotary_positions);
  if (position_ids.has_value()) {
    b.position_ids = read_ids(*position_ids, "position_ids", b.tokens, limit);
    return b;
  }
  STD_TORCH_CHECK(position_offset >= 0 && position_offset <= limit - longest,
                  "input_ids: expected sequences of at most ", limit - position_offset, " tokens, got ", longest);
  b.made_position_ids.resize(static_cast<size_t>(b.tokens));
  for (int64_t i = 0; i < b.sequences; ++i) {
    const auto begin = b.made_position_ids.begin();
    std::iota(begin + b.cu_seqlens[i], begin + b.cu_seqlens[i + 1], static_cast<int32_t>(position_offset));
  }
  b.position_ids = b.made_position_ids.data();
  return b;
}

// ---- groups ----

struct Group {
  int64_t begin, end, tokens;  // sequences
};

struct Plan {
  std::vector<Group> groups;  // largest first
  bool shared;                // all threads work on one group at a time
};

// Cuts the sequences into `count` groups of about as many tokens each; fewer where sequences are long.
std::vector<Group> cut(const Batch& b, int64_t count) {
  std::vector<Group> groups;
  int64_t begin = 0;
  for (int64_t i = 0; i < count && begin < b.sequences; ++i) {
    const int64_t target = b.tokens * (i + 1) / count;
    int64_t end = begin + 1;
    // Up to the sequence whose end is nearest to the target.
    while (end < b.sequences && 2 * target > int64_t{b.cu_seqlens[end]} + b.cu_seqlens[end + 1]) ++end;
    if (i + 1 == count) end = b.sequences;
    groups.push_back({begin, end, int64_t{b.cu_seqlens[end]} - b.cu_seqlens[begin]});
    begin = end;
  }
  if (begin < b.sequences) groups.push_back({begin, b.sequences, b.tokens - b.cu_seqlens[begin]});
  std::stable_sort(groups.begin(), groups.end(), [](const Group& x, const Group& y) { return x.tokens > y.tokens; });
  return groups;
}

// The share of the threads' time in which they have something to do, if each takes the next group when it is free.
double balance(const std::vector<Group>& groups, int64_t threads, int64_t tokens) {
  std::vector<int64_t> load(static_cast<size_t>(threads));
  for (const Group& group : groups) *std::min_element(load.begin(), load.end()) += group.tokens;
  const int64_t longest = *std::max_element(load.begin(), load.end());
  return static_cast<double>(tokens) / static_cast<double>(std::max<int64_t>(longest, 1) * threads);
}

Plan make_plan(const Model& m, const Batch& b) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || b.tokens * m.multiply_adds_per_token() < kWorthSharing) {
    return {cut(b, (b.tokens + kGroupTokens - 1) / kGroupTokens), false};
  }
  const int64_t rounds = (b.tokens + threads * kGroupTokens - 1) / (threads * kGroupTokens);
  std::vector<Group> groups = cut(b, threads * rounds);
  const bool shared = balance(groups, threads, b.tokens) < kBalanced;
  if (shared) groups = cut(b, (b.tokens + threads * kGroupTokens - 1) / (threads * kGroupTokens));
  return {groups, shared};
}

// ---- memory ----

// Grows as needed and stays with its thread, so that its pages are touched once; large ones are given back.
class Memory {
 public:
  void* get(int64_t bytes) {
    if (bytes > size_) {
      data_.reset();
      constexpr int64_t line = 64;
      size_ = (bytes + line - 1) / line * line;
      data_.reset(std::aligned_alloc(line, static_cast<size_t>(size_)));
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
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  int64_t size_ = 0;
};

thread_local Memory scratch_memory, group_memory;

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
      kernel(p, {0, rows_, begin, end, static_cast<float*>(scratch_memory.get(linear_scratch(rows_) * 4))});
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

// ---- results ----

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
    sizes = {b.sequences, static_cast<int64_t>(modes.size()) * m.hidden};
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

}  // namespace sentfast::cpu
