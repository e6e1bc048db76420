// Contrastive loss: blocks of rows, their scores by matrix products, losses and gradients in place, gradients of the
// embeddings by products again.
//
// Of several prefixes each goes on from the products of the one before, and the gradient of a column of the embeddings
// is one product with the sum over the prefixes that hold it: together as many multiplications as the longest alone.
#include <tuple>

#include "losses_sides.h"

namespace sentfast::cpu {
namespace {

// More rows at a time gain nothing, and fewer keep a block's scores in the caches.
constexpr int64_t kMostRows = 512;
// Multiply-adds below which a product is not worth a second thread.
constexpr int64_t kSmallProduct = 1 << 19;

enum Direction : int64_t { kQueryToDoc, kQueryToQuery, kDocToQuery, kDocToDoc };
enum Hardness : int64_t { kNoHardness, kInBatchNegatives, kHardNegatives, kAllNegatives };

// c = a b^T in tasks of whole panels of columns, or of rows where there are few columns.
void multiply(const Matrix& m, MatrixFn kernel) {
  if (m.rows == 0 || m.columns == 0) return;
  const auto run = [&](const Block& block) {
    const std::unique_ptr<char[]> scratch(new char[kMatrixScratch]);
    kernel(m, block, scratch.get());
  };
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  if (threads == 1 || m.rows * m.columns * m.depth < kSmallProduct) return run({0, m.rows, 0, m.columns});
  const bool by_columns = m.columns >= 2 * threads * kBlockColumns;
  const int64_t size = by_columns ? m.columns : m.rows, unit = by_columns ? kBlockColumns : 6;
  const int64_t step = std::max(unit, (size / (2 * threads) + unit - 1) / unit * unit);
  torch::stable::parallel_for(0, (size + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * step, to = std::min(end * step, size);
    run(by_columns ? Block{0, m.rows, from, to} : Block{from, to, 0, m.columns});
  });
}

struct Settings {
  int64_t offset, query_offset, positives;
  std::vector<int64_t> directions;
  bool per_direction;
  Hardness hardness;
  float scale, strength;
  bool relative;
  float margin;
  std::vector<int64_t> dims;  // ascending
  std::vector<double> dim_weights;
  int64_t workspace;
};

// One direction: rows of `left` against the first `columns` rows of `right`.
struct Part {
  Side *left, *right;
  int64_t left_offset, own, columns;
};

class Loss {
 public:
  Loss(const Settings& settings, Side& queries, Side& documents, Side& all_queries, bool gradient)
      : settings_(settings), rows_(queries.x.rows), guided_(documents.guide) {
    for (const int64_t direction : settings.directions) {
      STD_TORCH_CHECK(direction >= kQueryToDoc && direction <= kDocToDoc, "directions: expected 0 to 3");
      const bool from_query = direction == kQueryToDoc || direction == kQueryToQuery;
      const bool to_query = direction == kQueryToQuery || direction == kDocToQuery;
      Part part = {from_query ? &queries : &documents, to_query ? &all_queries : &documents,
                   from_query ? 0 : settings.offset, to_query ? settings.query_offset : settings.offset, 0};
      // A guide compares positives with positives alone.
      part.columns = direction == kDocToDoc && guided_ ? settings.positives : part.right->x.rows;
      columns_ += part.columns;
      parts_.push_back(part);
    }
    prefixes_ = static_cast<int64_t>(settings.dims.size());
    buffers_ = prefixes_ == 1 ? 1 : 1 + (gradient ? prefixes_ : 1);
    // Two blocks of the same size are better than a full one and a small one.
    const int64_t row_bytes = columns_ * 4 * (buffers_ + (guided_ ? 1 : 0));
    int64_t most = std::min(kMostRows, settings.workspace / std::max<int64_t>(row_bytes, 1));
    most = std::max<int64_t>(most, 1);
    const int64_t blocks = std::max<int64_t>((rows_ + most - 1) / most, 1);
    block_rows_ = (rows_ + blocks - 1) / blocks;
    scores_ = new_tensor({buffers_, block_rows_ * columns_}, ScalarType::Float, Life::Kept);
    if (guided_) guides_ = new_tensor({block_rows_, columns_}, ScalarType::Float, Life::Kept);
    for (std::vector<float>* each : {&part_losses_, &part_slopes_, &part_weights_}) {
      each->resize(static_cast<size_t>(block_rows_));
    }
  }

  // Losses [B]; with weights [B] also the gradients of weights @ losses, that by the scale added to `by_scale`.
  void run(float* losses, const float* weights, double* by_scale) {
    std::fill_n(losses, rows_, 0.0f);
    for (int64_t begin = 0; begin < rows_; begin += block_rows_) {
      const int64_t count = std::min(block_rows_, rows_ - begin);
      Contrastive p = describe(begin, count);
      for (int64_t k = 0; k < prefixes_; ++k) {
        score(p, k, begin, count);
        run_rows(p, k, count, losses + begin, weights == nullptr ? nullptr : weights + begin, by_scale);
        if (weights != nullptr && prefixes_ > 1) add_moments(p, k, begin, count);
      }
      if (weights == nullptr) continue;
      for (int64_t k = prefixes_ - 1; k >= 0; --k) add_gradients(k, begin, count);
    }
  }

 private:
  float* buffer(int64_t n) { return static_cast<float*>(scores_.mutable_data_ptr()) + n * block_rows_ * columns_; }
  float* products() { return buffer(buffers_ - 1); }
  float* scores(int64_t prefix) { return buffer(std::min(prefix, std::max<int64_t>(buffers_ - 2, 0))); }
  int64_t first_column(int64_t prefix) const { return prefix == 0 ? 0 : settings_.dims[prefix - 1]; }

  // Says what `count` rows are, and fills in what the guide makes of them.
  Contrastive describe(int64_t begin, int64_t count) {
    Contrastive p = {};
    p.segment_count = static_cast<int64_t>(parts_.size());
    p.group_count = settings_.per_direction ? p.segment_count : 1;
    p.scale = settings_.scale;
    p.relative = settings_.relative;
    p.margin = settings_.margin;
    float* guides = guided_ ? static_cast<float*>(guides_.mutable_data_ptr()) : nullptr;
    for (int64_t n = 0; n < p.segment_count; ++n) {
      const Part& part = parts_[n];
      ContrastiveSegment& s = p.segments[n];
      s.columns = part.columns;
      if (guided_) {
        const Embeddings &left = *part.left->guide, &right = *part.right->guide;
        s.guide = guides;
        const Matrix m = similarities(left, part.left_offset + begin, count, right, part.columns, 0, left.dim, guides);
        multiply(m, kernels().matrix[left.dtype][right.dtype]);
        guides += count * part.columns;
      }
      s.ids = part.right->ids.empty() ? nullptr : part.right->ids.data();
      s.own = part.own + begin;
      set_direction(s, n);
    }
    return p;
  }

  // The scores of one prefix; of several, those before it have left their products.
  void score(Contrastive& p, int64_t prefix, int64_t begin, int64_t count) {
    float *to = scores(prefix), *plain = products();
    for (int64_t n = 0; n < p.segment_count; ++n) {
      const Part& part = parts_[n];
      const Embeddings &x = part.left->x, &y = part.right->x;
      const int64_t left = part.left_offset + begin;
      ContrastiveSegment& s = p.segments[n];
      s.scores = to;
      s.row_scale = x.reciprocal(prefix, left);
      s.column_scale = y.reciprocal(prefix, 0);
      Matrix m = similarities(x, left, count, y, part.columns, first_column(prefix), settings_.dims[prefix], to);
      if (prefixes_ > 1) {
        s.products = m.c = plain;
        m.add = prefix > 0;
        m.norm_a = m.norm_b = nullptr;
      }
      multiply(m, kernels().matrix[x.dtype][y.dtype]);
      to += count * part.columns;
      plain += count * part.columns;
    }
  }

  void run_rows(Contrastive& p, int64_t prefix, int64_t count, float* losses, const float* weights, double* by_scale) {
    const float factor = static_cast<float>(settings_.dim_weights[prefix]);
    p.losses = part_losses_.data();
    if (weights != nullptr) {
      p.slopes = part_slopes_.data();
      p.weights = part_weights_.data();
      for (int64_t i = 0; i < count; ++i) part_weights_[i] = weights[i] * factor;
    }
    const ContrastiveFn kernel = kernels().contrastive;
    torch::stable::parallel_for(0, count, grain(8 * columns_), [&](int64_t from, int64_t to) { kernel(p, from, to); });
    for (int64_t i = 0; i < count; ++i) losses[i] += factor * part_losses_[i];
    if (weights == nullptr) return;
    for (int64_t i = 0; i < count; ++i) *by_scale += static_cast<double>(part_weights_[i]) * part_slopes_[i];
  }

  void set_direction(ContrastiveSegment& s, int64_t n) const {
    const int64_t direction = settings_.directions[n];
    const bool to_query = direction == kQueryToQuery || direction == kDocToQuery;
    s.period = to_query ? s.columns : settings_.positives;
    s.positive = direction == kQueryToDoc || direction == kDocToQuery;
    s.group = settings_.per_direction ? n : 0;
    const float plain = settings_.scale, hard = plain + settings_.strength;
    const Hardness mode = direction == kQueryToDoc ? settings_.hardness : kNoHardness;
    s.factor = mode == kInBatchNegatives || mode == kAllNegatives ? hard : plain;
    s.negatives_factor = mode == kHardNegatives || mode == kAllNegatives ? hard : plain;
    s.positive_factor = plain;
  }

  // By the elements [first, last) of both sides.
  static Matrix similarities(const Embeddings& left, int64_t begin, int64_t count, const Embeddings& right,
                             int64_t columns, int64_t first, int64_t last, float* out) {
    Matrix m = {};
    m.rows = count;
    m.columns = columns;
    m.depth = last - first;
    m.a = left.from(begin, first);
    m.b = right.from(0, first);
    m.c = out;
    m.stride_c = columns;
    m.norm_a = left.norm(0, begin);
    m.norm_b = right.norm(0, 0);
    m.eps = kEps;
    return m;
  }

  // What of one prefix's gradient lies along the embeddings of both sides: the plain products, weighted by it.
  void add_moments(const Contrastive& p, int64_t prefix, int64_t begin, int64_t count) {
    const MomentsFn kernel = kernels().moments;
    for (int64_t n = 0; n < p.segment_count; ++n) {
      const Part& part = parts_[n];
      const int64_t panels = (part.columns + kMomentColumns - 1) / kMomentColumns;
      std::vector<float> of_rows(static_cast<size_t>(panels * count)), of_columns(static_cast<size_t>(part.columns));
      const Moments m = {count,          part.columns,     p.segments[n].products, p.segments[n].scores,
                         of_rows.data(), of_columns.data()};
      torch::stable::parallel_for(0, panels, grain(count * kMomentColumns),
                                  [&](int64_t from, int64_t to) { kernel(m, from, to); });
      float* left = part.left->along.data() + prefix * part.left->x.rows + part.left_offset + begin;
      for (int64_t i = 0; i < panels * count; ++i) left[i % count] += of_rows[i];
      float* right = part.right->along.data() + prefix * part.right->x.rows;
      for (int64_t j = 0; j < part.columns; ++j) right[j] += of_columns[j];
    }
  }

  // Adds the block's gradient to the columns of both sides that are new in the prefix, through the scores' and the
  // other side; the longer prefixes, which hold these columns too, have added theirs to the scores' before.
  void add_gradients(int64_t prefix, int64_t begin, int64_t count) {
    float* gradient = scores(prefix);
    if (prefix + 1 < prefixes_) add(scores(prefix + 1), gradient, count * columns_);
    const int64_t column = first_column(prefix);
    for (const Part& part : parts_) {
      const int64_t left = part.left_offset + begin;
      Matrix m = {};
      m.add = true;
      m.columns = settings_.dims[prefix] - column;
      m.stride_c = part.left->x.dim;
      m.rows = count;
      m.depth = part.columns;
      m.a = {gradient, part.columns, 1};
      m.b = part.right->x.turned_from(0, column);
      m.c = part.left->gradient_from(left, column);
      multiply(m, kernels().matrix[0][part.right->x.dtype]);
      m.rows = part.columns;
      m.depth = count;
      m.a = {gradient, 1, part.columns};
      m.b = part.left->x.turned_from(left, column);
      m.c = part.right->gradient_from(0, column);
      multiply(m, kernels().matrix[0][part.left->x.dtype]);
      gradient += count * part.columns;
    }
  }

  static void add(const float* from, float* to, int64_t count) {
    torch::stable::parallel_for(0, count, grain(1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] += from[i];
    });
  }

  const Settings& settings_;
  int64_t rows_, columns_ = 0, block_rows_ = 1;
  int64_t prefixes_ = 1, buffers_ = 1;  // buffers: scores of each prefix, and behind them the products they go on from
  bool guided_;
  std::vector<Part> parts_;
  Tensor scores_, guides_;
  std::vector<float> part_losses_, part_slopes_, part_weights_;  // [block_rows] of one prefix
};

struct Inputs {
  Side queries, documents;
  std::optional<Side> all_queries;
  Settings settings;

  Side& everyone() { return all_queries ? *all_queries : queries; }
};

void check_dims(const std::vector<int64_t>& dims, const std::vector<double>& dim_weights, bool cosine,
                const Tensor& queries) {
  STD_TORCH_CHECK(!dims.empty() && dim_weights.size() == dims.size(), "dims: expected one or more, with a weight each");
  STD_TORCH_CHECK(cosine || dims.size() == 1, "dims: expected one without norms");
  int64_t before = -1;
  for (const int64_t dim : dims) {
    STD_TORCH_CHECK(dim > before, "dims: expected ascending lengths");
    before = dim;
  }
  STD_TORCH_CHECK(queries.dim() == 2 && before <= queries.size(1), "dims: expected at most the columns of queries");
}

Inputs inputs(const Tensor& queries, const Tensor& documents, const Optional& all_queries, const Optional& scale_tensor,
              double scale, bool cosine, int64_t offset, int64_t positives, const std::vector<int64_t>& directions,
              bool per_direction, int64_t hardness, double strength, const Optional& query_ids,
              const Optional& document_ids, const Optional& guide_queries, const Optional& guide_documents,
              const Optional& guide_all_queries, bool relative, double margin, const std::vector<int64_t>& dims,
              const std::vector<double>& dim_weights, int64_t workspace) {
  check_dims(dims, dim_weights, cosine, queries);
  Inputs in = {Side(queries, dims, cosine, guide_queries, "queries"),
               Side(documents, dims, cosine, guide_documents, "documents"), std::nullopt, Settings{}};
  if (all_queries) in.all_queries.emplace(*all_queries, dims, cosine, guide_all_queries, "all_queries");
  Side& everyone = in.everyone();
  for (Side* side : {&in.documents, &everyone}) {
    STD_TORCH_CHECK(side->x.dim == in.queries.x.dim && side->x.dtype == in.queries.x.dtype,
                    "documents, all_queries: expected the columns and the dtype of queries");
    STD_TORCH_CHECK(side->guide.has_value() == in.queries.guide.has_value(), "guide: expected one for each matrix");
  }
  const int64_t rows = in.queries.x.rows, query_offset = all_queries ? offset : 0;
  STD_TORCH_CHECK(positives >= 0 && positives <= in.documents.x.rows, "positives: expected at most the documents");
  STD_TORCH_CHECK(offset >= 0 && offset + rows <= positives && query_offset + rows <= everyone.x.rows,
                  "offset: expected the rows to be among positives and all_queries");
  STD_TORCH_CHECK(!directions.empty() && directions[0] == kQueryToDoc && directions.size() <= kContrastiveSegments,
                  "directions: expected one to four, query_to_doc first");
  STD_TORCH_CHECK(hardness >= kNoHardness && hardness <= kAllNegatives, "hardness: expected 0 to 3, got ", hardness);
  float factor = static_cast<float>(scale);
  if (scale_tensor) {
    STD_TORCH_CHECK(
        scale_tensor->is_cpu() && scale_tensor->numel() == 1 && scale_tensor->scalar_type() == ScalarType::Float,
        "scale_tensor: expected one float32");
    factor *= *static_cast<const float*>(scale_tensor->const_data_ptr());
  }
  if (query_ids) everyone.ids = numbered(*query_ids, everyone.x.rows, "query_ids");
  if (document_ids) in.documents.ids = numbered(*document_ids, in.documents.x.rows, "document_ids");
  in.settings = {offset,        query_offset,
                 positives,     directions,
                 per_direction, static_cast<Hardness>(hardness),
                 factor,        static_cast<float>(strength),
                 relative,      static_cast<float>(margin),
                 dims,          dim_weights,
                 workspace};
  return in;
}

#define SENTFAST_LOSS_PARAMETERS                                                                                      \
  const Tensor &queries, const Tensor &documents, const Optional &all_queries, const Optional &scale_tensor,          \
      double scale, bool cosine, int64_t offset, int64_t positives, const std::vector<int64_t>&directions,            \
      bool per_direction, int64_t hardness, double strength, const Optional &query_ids, const Optional &document_ids, \
      const Optional &guide_queries, const Optional &guide_documents, const Optional &guide_all_queries,              \
      bool relative, double margin, const std::vector<int64_t>&dims, const std::vector<double>&dim_weights,           \
      int64_t workspace
#define SENTFAST_LOSS_ARGUMENTS                                                                                 \
  queries, documents, all_queries, scale_tensor, scale, cosine, offset, positives, directions, per_direction,   \
      hardness, strength, query_ids, document_ids, guide_queries, guide_documents, guide_all_queries, relative, \
      margin, dims, dim_weights, workspace

Tensor contrastive_loss(SENTFAST_LOSS_PARAMETERS) {
  Inputs in = inputs(SENTFAST_LOSS_ARGUMENTS);
  Tensor losses = new_tensor({in.queries.x.rows}, ScalarType::Float);
  Loss(in.settings, in.queries, in.documents, in.everyone(), false)
      .run(static_cast<float*>(losses.mutable_data_ptr()), nullptr, nullptr);
  return losses;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_loss_forward(SENTFAST_LOSS_PARAMETERS,
                                                                            const Optional& weights) {
  Inputs in = inputs(SENTFAST_LOSS_ARGUMENTS);
  const int64_t rows = in.queries.x.rows;
  Tensor losses = new_tensor({rows}, ScalarType::Float);
  const Floats weight(new float[rows]);
  if (weights) {
    STD_TORCH_CHECK(weights->is_cpu() && weights->numel() == rows && weights->scalar_type() == ScalarType::Float,
                    "weights: expected float32, one per row");
    const Tensor dense = torch::stable::contiguous(*weights);
    std::copy_n(static_cast<const float*>(dense.const_data_ptr()), rows, weight.get());
  } else {
    std::fill_n(weight.get(), rows, 1.0f / static_cast<float>(rows));
  }
  in.queries.start_gradient();
  in.documents.start_gradient();
  if (in.all_queries) in.all_queries->start_gradient();
  double by_scale = 0;
  Loss(in.settings, in.queries, in.documents, in.everyone(), true)
      .run(static_cast<float*>(losses.mutable_data_ptr()), weight.get(), &by_scale);
  in.queries.finish_gradient();
  in.documents.finish_gradient();
  if (in.all_queries) in.all_queries->finish_gradient();
  Tensor grad_scale = new_tensor({}, ScalarType::Float);
  *static_cast<float*>(grad_scale.mutable_data_ptr()) = static_cast<float>(by_scale);
  Tensor grad_all_queries = in.all_queries ? in.all_queries->result : new_tensor({0}, queries.scalar_type());
  return {losses, in.queries.result, in.documents.result, grad_all_queries, grad_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sentfast, CPU, m) {
  m.impl("contrastive_loss", TORCH_BOX(&contrastive_loss));
  m.impl("contrastive_loss_forward", TORCH_BOX(&contrastive_loss_forward));
}

}  // namespace sentfast::cpu
