// The border below which PyTorch does not exist: arguments and entry points of every CPU kernel.
//
// Each instruction set ("tier") compiles the same loops (*.inl.h) over its own Vec and fills one table of function
// pointers. All sizes and strides are counted in elements; output rows are dense unless a stride is given.
#pragma once

#include <stddef.h>

#include <cstdint>

#include "search.h"

namespace sentfast::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Four bytes of a row seen as one number, a float32 or two halves, wherever they lie.
using Word = uint32_t __attribute__((may_alias, aligned(2)));
using AliasedFloat = float __attribute__((may_alias, aligned(2)));

enum class Dtype : int { Float32 = 0, BFloat16 = 1, Float16 = 2 };
constexpr int kDtypes = 3;

// ---- pooling ----

enum Mode : int64_t { kMean, kMax, kCls, kLastToken, kWeightedMean, kMeanSqrtLen };
constexpr int kMaxModes = 8;

// Where the rows of each sequence are: [batch, length, dim] with a mask, or [length, dim] cut by cu_seqlens.
struct Layout {
  int64_t batch, length, dim;
  const void* mask;  // nullptr: every position holds a token
  int64_t mask_bytes, mask_stride_batch, mask_stride_token;
  const int32_t* cu_seqlens;  // nullptr: padded
  int64_t prompt_length;
};

struct Pool {
  Layout layout;
  int64_t modes[kMaxModes], mode_count;
  bool normalize;
  const void* x;
  int64_t stride_batch, stride_token;
  void* out;        // [batch, mode_count * dim]
  float* norm;      // [batch], or nullptr; only with normalize
  int32_t* argmax;  // [batch, dim], or nullptr; only with kMax
};

struct PoolBackward {
  Layout layout;
  int64_t modes[kMaxModes], mode_count;
  bool normalize;
  const void *grad, *out;  // [batch, mode_count * dim]
  const float* norm;
  const int32_t* argmax;
  void* grad_x;  // dense, in the shape of x
};

// scratch: floats, at least pool_scratch(...) of them, for one thread.
static inline int64_t pool_scratch(int64_t dim) { return 11 * (dim + 16); }
static inline int64_t pool_backward_scratch(int64_t dim, int64_t mode_count) { return (mode_count + 3) * (dim + 16); }

// ---- rows ----

struct Rows {
  const void* data;
  int64_t stride;
};

struct Normalize {
  int64_t dim;
  Rows x;
  void* y;      // or nullptr
  float* norm;  // or nullptr
  float eps;
};

struct NormalizeBackward {
  int64_t dim;
  Rows grad, x;
  Dtype grad_dtype;
  const float* norm;
  void* grad_x;
  float eps;
};

enum Metric : int64_t { kCosine, kDot, kEuclidean, kManhattan };

struct Pairwise {
  int64_t dim;
  Rows a, b;
  Metric metric;
  float eps;
  float *scores, *norm_a, *norm_b;  // the norms only for kCosine, or nullptr
};

struct PairwiseBackward {
  int64_t dim;
  Rows a, b;
  Metric metric;
  float eps;
  const float *grad, *scores, *norm_a, *norm_b;
  void *grad_a, *grad_b;
};

// ---- matrix ----

struct Operand {
  const void* data;
  int64_t stride_row, stride_column;
};

// c[i, j] = <a_i, b_j>, divided by max(norm_a[i], eps) * max(norm_b[j], eps) if the norms are given.
struct Matrix {
  int64_t rows, columns, depth;
  Operand a, b;
  float* c;
  int64_t stride_c;
  const float *norm_a, *norm_b;
  float eps;
  bool add;  // to what c holds; without norms only
};

// One rectangle of c, the unit of work of a thread.
struct Block {
  int64_t row_begin, row_end, column_begin, column_end;
};

constexpr int64_t kBlockColumns = 256;
constexpr int64_t kBlockRows = 96;
constexpr int64_t kBlockDepth = 512;
// Bytes of scratch of matrix_block: the packed operands (plus alignment).
constexpr int64_t kMatrixScratch =
    (kBlockColumns * kBlockDepth + kBlockRows * (kBlockDepth + 16) + kBlockColumns) * 4 + 64;
// Matrices at most this wide or high may be computed row by row, without packing; narrow rows, whose sums are made one
// by one, only where fewer of them are to be read again.
constexpr int64_t kFewRows = 6;
inline int64_t few_rows(int64_t depth) { return depth / 48 < kFewRows ? depth / 48 : kFewRows; }

// ---- encoder ----

// Output features in a panel of packed weights (`PANEL` in sentfast/reference/encoder.py).
constexpr int64_t kPanel = 64;

// In the order of `ACTIVATIONS` in sentfast/reference/encoder.py.
enum Activation : int64_t { kGelu, kGeluTanh, kRelu, kSilu, kIdentity };

// A linear layer's products run in float32 or, two at a time, in bfloat16 with float32 sums. Its rows are then floats
// or BFloat16s, an even number of them.
enum class Compute : int { Float32 = 0, BFloat16 = 1 };
constexpr int kComputes = 2;

// y = activation(x w^T + bias)
struct Linear {
  int64_t columns, depth;  // output and input features
  const void* x;
  int64_t stride_x;
  const void* weight;
  int64_t stride_weight;  // 0: panels; else the weight is float32 rows of input features, this far apart
  const float* bias;      // or nullptr
  Activation activation;
  void* y;
  int64_t stride_y;
};

// Up to kPanel rows of a weight as one panel; missing rows and the second half of an odd last pair are zero.
struct PackPanel {
  int64_t rows, columns;
  const void* weight;
  int64_t stride;
  void* panel;
};

// Steps of a panel that are multiplied at a time.
constexpr int64_t kBlockSteps = 256;

// Rows and panels of y, the unit of work of a thread.
struct LinearBlock {
  int64_t row_begin, row_end, panel_begin, panel_end;
  float* scratch;  // linear_scratch(...) floats
};

// Rows of x and features of a weight in rows that are multiplied at a time (linear_in_place.inl.h): whole tiles.
constexpr int64_t kInPlaceRows = 128, kInPlaceFeatures = 96;

static inline int64_t linear_scratch(int64_t rows, int64_t depth) {
  constexpr int64_t widest = 16;  // floats of a vector
  const int64_t panels = (rows + 7) / 8 * 8 * kPanel;
  const int64_t turned = (rows < kInPlaceRows ? (rows + widest - 1) / widest * widest : kInPlaceRows) * depth;
  const int64_t in_place = kInPlaceFeatures * 3 * widest + turned;
  return in_place > panels ? in_place : panels;
}

// Which elements dropout sets to zero, as a function of their place: see dropout.inl.h.
struct Dropout {
  uint64_t seed;
  uint32_t stream;     // tells the places of one seed's uses apart
  uint32_t threshold;  // of 2^32: what is dropped; 0: nothing
  float scale;         // 1 / (1 - p)
};

// Attention of each sequence to itself, head by head; a task is one head of one sequence.
struct Attention {
  int64_t heads, head_dim;
  const int32_t* cu_seqlens;  // rows of q, k and v
  Rows q, k, v;               // rows of heads * head_dim
  float scale;
  const float* bias;  // [heads, 2 * bias_reach - 1] or nullptr: added at column bias_reach - 1 + key - query
  int64_t bias_reach;
  int64_t left, right;  // keys further before or after are not seen; negative: all are
  bool first_row_only;  // only the first query of each sequence; out then has one row per sequence
  void* out;            // rows of heads * head_dim
  float* lse;           // [heads, lse_stride]: log of the sum of a query's exponentials; or nullptr
  int64_t lse_stride;
  Dropout dropout;  // of the weights
};

// Bytes of scratch for sequences of at most `length` tokens.
static inline int64_t attention_scratch(int64_t length, int64_t head_dim) {
  const int64_t keys = (length + kPanel - 1) / kPanel * kPanel;
  return (keys * (head_dim + (head_dim + 15) / 16 * 16) + 2 * 8 * (keys + 16)) * 4 + 64;
}

// A task is one head of the sequences [sequence_begin, sequence_end) of one part of the batch.
struct AttentionBackward {
  Attention forward;               // out and lse are not read: the softmax is made again
  Rows grad;                       // of out
  void *grad_q, *grad_k, *grad_v;  // rows of heads * head_dim
  int64_t grad_stride;
  const int64_t* parts;  // where each part of the batch starts, and its sequences' number
  float* grad_bias;      // [parts, heads, 2 * bias_reach - 1], added to; nullptr without bias
};

// Queries whose scores are held at a time.
constexpr int64_t kBackwardQueries = 64;

static inline int64_t attention_backward_scratch(int64_t length, int64_t head_dim) {
  const int64_t keys = (length + kPanel - 1) / kPanel * kPanel, width = (head_dim + 15) / 16 * 16;
  const int64_t tokens = keys * (2 * head_dim + 5 * width + 2 * kPanel);
  return (tokens + kBackwardQueries * (3 * (keys + 16) + width)) * 4 + 64;
}

// Adds a residual and normalises: sum = y + residual; sum_out = sum; normed = (sum - mean) / sqrt(var + eps) * weight +
// bias.
struct LayerNorm {
  int64_t dim;
  const float* y;
  const float* residual;       // or nullptr
  const float *weight, *bias;  // weight nullptr: normed = sum; bias may be nullptr
  float eps;
  float* sum_out;             // or nullptr
  float* normed;              // or nullptr
  BFloat16* normed_bfloat16;  // or nullptr
};

// Sums of table rows; dtype of the tables by entry.
struct Embed {
  int64_t dim;
  const int32_t *ids, *position_ids, *token_type_ids;  // token_type_ids nullptr: all 0
  const void *words, *positions, *token_types;         // the last two may be nullptr
  float* out;
};

// Turns the halves of each head of query and key, as real and imaginary parts, by the angles of their positions.
struct Rotate {
  int64_t heads, head_dim;
  const float* table;  // [positions, head_dim], cosines then sines
  const int32_t* position_ids;
  void* qkv;
  int64_t stride;
};

// First half of each row = activation(first half) * second half.
struct Gate {
  int64_t dim;  // of a half
  Activation activation;
  void* x;
  int64_t stride;
};

// ---- training ----

// Rows whose part of a sum over all rows is made by itself, so that the sum does not depend on the threads.
constexpr int64_t kPartialRows = 64;

struct DropoutRows {
  int64_t dim;
  Rows x;
  void* y;
  Dropout dropout;
};

// sum = dropout(x) + residual; y = (sum - mean) * rstd * weight + bias.
struct DropoutAddLayerNorm {
  int64_t dim;
  Rows x, residual;            // residual.data may be nullptr
  const float *weight, *bias;  // bias may be nullptr
  float eps;
  Dropout dropout;
  void *y, *sum;
  float *mean, *rstd;
};

struct DropoutAddLayerNormBackward {
  int64_t rows, dim;
  Rows grad;
  const void* sum;
  const float *mean, *rstd, *weight;
  Dropout dropout;
  void *grad_sum, *grad_x;  // grad_x nullptr: the same as grad_sum
  float* partial;           // [blocks of rows, 2, dim]: of the gradients of weight and bias
};

// y = activation(x + bias), or with grad: y = grad * activation'(x + bias).
struct BiasActivation {
  int64_t rows, dim;
  Rows x, grad;
  const float* bias;  // or nullptr
  Activation activation;
  void* y;
  float* partial;  // [blocks of rows, dim]: of the gradient of bias, or nullptr
};

// c = a b, all of them float32, one of the strides of a and of b being 1.
struct Product {
  int64_t rows, columns, depth;
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_step, b_column;
  const float* bias;  // [columns] or nullptr
  float* c;
  int64_t stride_c;
};

// Steps that are multiplied at a time, and the most rows of a task.
constexpr int64_t kProductSteps = 256, kProductRows = 192;

// Floats of scratch of one thread.
constexpr int64_t kProductScratch = kProductSteps * kPanel + kProductRows * (kProductSteps + 16) + 16;

// ---- losses ----

// The directions of a contrastive loss.
constexpr int kContrastiveSegments = 4;

// Scores of a block's rows with the columns of one direction. Row i has its own columns at own + i + k * period.
struct ContrastiveSegment {
  int64_t columns;
  float* scores;                          // [rows, columns] similarities, which become the gradient
  const float* products;                  // [rows, columns] plain products to make similarities of, or nullptr
  const float* guide;                     // [rows, columns] similarities by the guide, or nullptr
  const float *row_scale, *column_scale;  // 1 / norms, or nullptr
  const int32_t* ids;                     // [columns] equal for duplicates, or nullptr
  int64_t own, period;
  bool positive;                                    // the first own column stays; else all own columns are left out
  float factor, positive_factor, negatives_factor;  // of logits: of other columns, of the first own, of further own
  int64_t group;                                    // columns of one group share a log-sum-exp
};

// loss = mean of the groups' log-sum-exps - logit of the first segment's first own column
struct Contrastive {
  ContrastiveSegment segments[kContrastiveSegments];
  int64_t segment_count, group_count;
  float scale;
  bool relative;  // the guide's margin is a part of its score, or absolute
  float margin;
  const float* weights;    // [rows] of the losses in the gradient; nullptr: none is wanted
  float *losses, *slopes;  // [rows]; slopes: derivatives by the scale, only with weights
};

// Sums of the products of two matrices, element by element, over rows and over columns.
struct Moments {
  int64_t rows, columns;
  const float *a, *b;  // dense
  float* row_sums;     // [panels, rows]: those of each panel of columns
  float* column_sums;  // [columns]
};

constexpr int64_t kMomentColumns = 512;  // of a panel

struct Project {
  int64_t dim;
  Rows x;
  const float* norm;   // taken away is what lies along x; nullptr: see below
  const float* along;  // taken away is x times this, [rows]; nullptr as well: nothing
  Rows gradient;       // float32
  void* out;           // may be the gradient
  int64_t stride_out;
  float eps;
};

// ---- the table ----

using PoolFn = void (*)(const Pool&, int64_t begin, int64_t end, float* scratch);
using PoolBackwardFn = void (*)(const PoolBackward&, int64_t begin, int64_t end, float* scratch);
using NormalizeFn = void (*)(const Normalize&, int64_t begin, int64_t end);
using NormalizeBackwardFn = void (*)(const NormalizeBackward&, int64_t begin, int64_t end);
using PairwiseFn = void (*)(const Pairwise&, int64_t begin, int64_t end);
using PairwiseBackwardFn = void (*)(const PairwiseBackward&, int64_t begin, int64_t end);
using MatrixFn = void (*)(const Matrix&, const Block&, void* scratch);

using LinearFn = void (*)(const Linear&, const LinearBlock&);
using PackPanelFn = void (*)(const PackPanel&);
using AttentionFn = void (*)(const Attention&, int64_t begin, int64_t end, void* scratch);
using LayerNormFn = void (*)(const LayerNorm&, int64_t begin, int64_t end);
using EmbedFn = void (*)(const Embed&, int64_t begin, int64_t end);
using RotateFn = void (*)(const Rotate&, int64_t begin, int64_t end);
using GateFn = void (*)(const Gate&, int64_t begin, int64_t end);
using NarrowFn = void (*)(const float* from, void* to, int64_t count);
using AttentionBackwardFn = void (*)(const AttentionBackward&, int64_t begin, int64_t end, void* scratch);
using ProductFn = void (*)(const Product&, const Block&, float* scratch);
using DropoutFn = void (*)(const DropoutRows&, int64_t begin, int64_t end);
using DropoutAddLayerNormFn = void (*)(const DropoutAddLayerNorm&, int64_t begin, int64_t end);
using DropoutAddLayerNormBackwardFn = void (*)(const DropoutAddLayerNormBackward&, int64_t begin, int64_t end);
using BiasActivationFn = void (*)(const BiasActivation&, int64_t begin, int64_t end);
using ContrastiveFn = void (*)(const Contrastive&, int64_t begin, int64_t end);
using MomentsFn = void (*)(const Moments&, int64_t panel_begin, int64_t panel_end);
using ProjectFn = void (*)(const Project&, int64_t begin, int64_t end);

// Indexed by Dtype; a matrix by the dtypes of a and b.
struct Kernels {
  PoolFn pool[kDtypes];
  PoolBackwardFn pool_backward[kDtypes];
  NormalizeFn normalize[kDtypes];
  NormalizeBackwardFn normalize_backward[kDtypes];
  PairwiseFn pairwise[kDtypes];
  PairwiseBackwardFn pairwise_backward[kDtypes];
  MatrixFn matrix[kDtypes][kDtypes];
  LayerNormFn layer_norm;
  EmbedFn embed[kDtypes];
  NarrowFn narrow[kDtypes];
  // Indexed by Compute; rows of y are as those of x, or float32.
  LinearFn linear[kComputes], linear_float32[kComputes];
  AttentionFn attention[kComputes];
  PackPanelFn pack_panel[kComputes][kDtypes];  // by what the panel is for, and the dtype of the weight
  RotateFn rotate[kComputes];
  GateFn gate[kComputes];
  AttentionBackwardFn attention_backward[kComputes];
  DropoutFn dropout[kDtypes];
  // By the dtype of x and whether the residual, and what follows from it, is float32 too.
  DropoutAddLayerNormFn dropout_add_layer_norm[kDtypes][2];
  DropoutAddLayerNormBackwardFn dropout_add_layer_norm_backward[kDtypes][2];
  BiasActivationFn bias_activation[kDtypes], bias_activation_backward[kDtypes];
  ProductFn product;
  // Multiply-adds in registers only: floating-point operations done by `rounds` rounds; nullptr: no such instruction.
  double (*peak_float32)(int64_t rounds);
  double (*peak_bfloat16)(int64_t rounds);
  ContrastiveFn contrastive;
  MomentsFn moments;
  ProjectFn project[kDtypes];
  SearchKernels search;
};

}  // namespace sentfast::cpu
