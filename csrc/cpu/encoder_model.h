// The model of the packed encoder: the operator's list of weights, read and checked.
#pragma once

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace sentfast::cpu::packed {

// The tensors of Embedding and Layer in sentfast/reference/encoder.py, in that order.
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
  bool in_rows() const { return !layers.empty() && layers[0].up.stride > 0; }  // weights not in panels
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

inline Layer read_layer(const Model& m, const Reader& r, int64_t first, int64_t window) {
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

inline Model read_model(const Tensor& words, const std::vector<Tensor>& weights, int64_t heads, int64_t activation,
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

}  // namespace sentfast::cpu::packed
