// L2 normalisation and similarity: checks, allocation and threads around the loops of rows.inl.h and matrix.inl.h.
#include <cmath>
#include <memory>
#include <tuple>

#include "tensors.h"

namespace sentfast::cpu {
namespace {

std::vector<int64_t> leading(const Tensor& x) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.pop_back();
  return sizes;
}

void check_same(const Tensor& a, const Tensor& b, const char* name) {
  STD_TORCH_CHECK(sizes_of(a) == sizes_of(b), name, ": expected the shape of the first argument");
}

void check_rank(const Tensor& x, int64_t least, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= least, name, ": expected a CPU tensor of at least ", least, " dimensions");
}

void run(NormalizeFn kernel, const Normalize& p, int64_t rows) {
  torch::stable::parallel_for(0, rows, grain(p.dim), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

bool all_zero(const char* row, int64_t dim, int64_t element) {
  for (int64_t d = 0; d < dim; ++d) {
    uint32_t bits = 0;
    std::memcpy(&bits, row + d * element, static_cast<size_t>(element));
    if (bits << (element == 4 ? 1 : 17) != 0) return false;  // whatever the sign
  }
  return true;
}

// Writes the norms of the rows of x. Whether plain products of these rows, divided by their norms, are their cosines:
// not where a square or a product leaves float32's range.
bool write_norms(const Tensor& x, float* norm) {
  constexpr float least = 1e-15f;
  const RowView view(x);
  const Normalize p = {view.dim, view.get(), nullptr, norm, 0.0f};
  run(kernels().normalize[dtype_index(x, "x")], p, view.rows);
  const int64_t element = static_cast<int64_t>(x.element_size());
  const char* data = static_cast<const char*>(view.get().data);
  for (int64_t i = 0; i < view.rows; ++i) {
    const bool tiny = norm[i] < least && !all_zero(data + i * view.stride * element, view.dim, element);
    if (tiny || norm[i] * norm[i] == HUGE_VALF) return false;
  }
  return true;
}

Tensor normalize_into(const Tensor& x, double eps, float* norm) {
  const int dtype = dtype_index(x, "x");
  const RowView view(x);
  Tensor y = new_tensor(sizes_of(x), x.scalar_type());
  if (view.dim == 0 && norm == nullptr) return y;
  const Normalize p = {view.dim, view.get(), y.mutable_data_ptr(), norm, static_cast<float>(eps)};
  run(kernels().normalize[dtype], p, view.rows);
  return y;
}

Tensor l2_normalize(const Tensor& x, double eps) {
  check_rank(x, 1, "x");
  return normalize_into(x, eps, nullptr);
}

std::tuple<Tensor, Tensor> l2_normalize_forward(const Tensor& x, double eps) {
  check_rank(x, 1, "x");
  Tensor norm = new_tensor(leading(x), ScalarType::Float, Life::Kept);
  return {normalize_into(x, eps, static_cast<float*>(norm.mutable_data_ptr())), norm};
}

Tensor l2_normalize_backward(const Tensor& grad, const Tensor& x, Tensor norm, double eps) {
  check_rank(x, 1, "x");
  check_same(x, grad, "grad");
  const int dtype = dtype_index(x, "x");
  norm = torch::stable::contiguous(norm);
  const RowView x_view(x), grad_view(grad);
  STD_TORCH_CHECK(norm.numel() == x_view.rows && norm.scalar_type() == ScalarType::Float,
                  "norm: expected float32, one per row of x");
  Tensor grad_x = new_tensor(sizes_of(x), x.scalar_type(), Life::Kept);
  const NormalizeBackward p = {x_view.dim,
                               grad_view.get(),
                               x_view.get(),
                               dtype_of(grad, "grad"),
                               static_cast<const float*>(norm.const_data_ptr()),
                               grad_x.mutable_data_ptr(),
                               static_cast<float>(eps)};
  const NormalizeBackwardFn kernel = kernels().normalize_backward[dtype];
  torch::stable::parallel_for(0, x_view.rows, grain(p.dim), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return grad_x;
}

// Rows per task: all of them, unless the columns alone do not make enough tasks for the threads. Each thread has rows
// of its own in a large result: two that touch one new page first both clear it, and one of them in vain.
int64_t rows_per_task(int64_t rows, int64_t columns, int64_t column_tasks) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads()), wanted = 4 * threads;
  const bool large = rows * columns * static_cast<int64_t>(sizeof(float)) >= kLargeBytes;
  int64_t per_task = large && rows >= threads * kBlockRows ? (rows + threads - 1) / threads : rows;
  while (per_task > kBlockRows && column_tasks * ((rows + per_task - 1) / per_task) < wanted) {
    per_task = (per_task / 2 + kBlockRows - 1) / kBlockRows * kBlockRows;
  }
  return per_task > 0 ? per_task : 1;
}

// Offset in elements of matrix `index` of a batch [..., rows, columns].
int64_t batch_offset(const Tensor& x, int64_t index) {
  int64_t offset = 0;
  for (int64_t d = x.dim() - 3; d >= 0; --d) {
    offset += index % x.size(d) * x.stride(d);
    index /= x.size(d);
  }
  return offset;
}

const void* at(const Tensor& x, int64_t offset) {
  return static_cast<const char*>(x.const_data_ptr()) + offset * static_cast<int64_t>(x.element_size());
}

// scores [..., N, M] = a b^T, divided by the norms if they are given.
Tensor matrix(const Tensor& a, const Tensor& b, const float* norm_a, const float* norm_b, float eps) {
  check_rank(a, 2, "a");
  check_rank(b, 2, "b");
  check_size(a);
  check_size(b);
  const MatrixFn kernel = kernels().matrix[dtype_index(a, "a")][dtype_index(b, "b")];
  const int64_t d = a.dim();
  std::vector<int64_t> sizes = sizes_of(a), sizes_b = sizes_of(b);
  bool fits = sizes.size() == sizes_b.size() && sizes.back() == sizes_b.back();
  for (int64_t i = 0; fits && i < d - 2; ++i) fits = sizes[i] == sizes_b[i];
  STD_TORCH_CHECK(fits, "b: expected [..., M, D] with the batch dimensions and D of a");

  const int64_t rows = sizes[d - 2], columns = sizes_b[d - 2];
  Matrix m = {};
  m.rows = rows;
  m.columns = columns;
  m.depth = sizes[d - 1];
  int64_t batch = 1;
  for (int64_t i = 0; i < d - 2; ++i) batch *= sizes[i];
  sizes[d - 1] = columns;
  Tensor scores = new_tensor(sizes, ScalarType::Float);
  if (batch == 0 || rows == 0 || columns == 0) return scores;
  m.stride_c = columns;
  m.eps = eps;

  const int64_t column_tasks = (columns + kBlockColumns - 1) / kBlockColumns;
  const int64_t height = rows_per_task(rows, columns, batch * column_tasks);
  const int64_t row_tasks = (rows + height - 1) / height;
  auto* c = static_cast<float*>(scores.mutable_data_ptr());
  const int64_t per_task = height * (columns < kBlockColumns ? columns : kBlockColumns) * (m.depth + 1);
  torch::stable::parallel_for(
      0, batch * column_tasks * row_tasks, grain(per_task / 16), [&](int64_t begin, int64_t end) {
        const std::unique_ptr<char[]> scratch(new char[kMatrixScratch]);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t i = task / (column_tasks * row_tasks);
          const int64_t row = task / column_tasks % row_tasks * height, column = task % column_tasks * kBlockColumns;
          Matrix one = m;
          one.a = {at(a, batch_offset(a, i)), a.stride(d - 2), a.stride(d - 1)};
          one.b = {at(b, batch_offset(b, i)), b.stride(d - 2), b.stride(d - 1)};
          one.c = c + i * rows * columns;
          one.norm_a = norm_a != nullptr ? norm_a + i * rows : nullptr;
          one.norm_b = norm_b != nullptr ? norm_b + i * columns : nullptr;
          const Block block = {row, row + height < rows ? row + height : rows, column,
                               column + kBlockColumns < columns ? column + kBlockColumns : columns};
          kernel(one, block, scratch.get());
        }
      });
  return scores;
}

Tensor dot_similarity(const Tensor& a, const Tensor& b) { return matrix(a, b, nullptr, nullptr, 0.0f); }

Tensor cosine_into(const Tensor& a, const Tensor& b, double eps, float* norm_a, float* norm_b) {
  const bool plain_a = write_norms(a, norm_a), plain_b = write_norms(b, norm_b);
  if (plain_a && plain_b) return matrix(a, b, norm_a, norm_b, static_cast<float>(eps));
  const auto unit = [&](const Tensor& x) { return normalize_into(as(x, ScalarType::Float), eps, nullptr); };
  return matrix(unit(a), unit(b), nullptr, nullptr, 0.0f);
}

int64_t row_count(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i < x.dim() - 1; ++i) rows = times(rows, x.size(i));
  return rows;
}

Tensor cosine_similarity(const Tensor& a, const Tensor& b, double eps) {
  check_rank(a, 2, "a");
  check_rank(b, 2, "b");
  const int64_t rows_a = row_count(a), rows_b = row_count(b);
  const auto norm_a = new_array<float>(rows_a), norm_b = new_array<float>(rows_b);
  return cosine_into(a, b, eps, norm_a.get(), norm_b.get());
}

std::tuple<Tensor, Tensor, Tensor> cosine_similarity_forward(const Tensor& a, const Tensor& b, double eps) {
  check_rank(a, 2, "a");
  check_rank(b, 2, "b");
  Tensor norm_a = new_tensor(leading(a), ScalarType::Float, Life::Kept);
  Tensor norm_b = new_tensor(leading(b), ScalarType::Float, Life::Kept);
  Tensor scores = cosine_into(a, b, eps, static_cast<float*>(norm_a.mutable_data_ptr()),
                              static_cast<float*>(norm_b.mutable_data_ptr()));
  return {scores, norm_a, norm_b};
}

Metric metric_of(int64_t metric) {
  STD_TORCH_CHECK(metric >= kCosine && metric <= kManhattan, "metric: expected 0 to 3, got ", metric);
  return static_cast<Metric>(metric);
}

void check_pair(const Tensor& a, const Tensor& b) {
  check_rank(a, 1, "a");
  check_same(a, b, "b");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "b: expected the dtype of a");
}

Tensor pairwise_into(const Tensor& a, const Tensor& b, int64_t metric, double eps, float* norm_a, float* norm_b) {
  const int dtype = dtype_index(a, "a");
  const RowView a_view(a), b_view(b);
  Tensor scores = new_tensor(leading(a), ScalarType::Float);
  const Pairwise p = {a_view.dim,
                      a_view.get(),
                      b_view.get(),
                      metric_of(metric),
                      static_cast<float>(eps),
                      static_cast<float*>(scores.mutable_data_ptr()),
                      norm_a,
                      norm_b};
  const PairwiseFn kernel = kernels().pairwise[dtype];
  torch::stable::parallel_for(0, a_view.rows, grain(2 * p.dim),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return scores;
}

Tensor pairwise_similarity(const Tensor& a, const Tensor& b, int64_t metric, double eps) {
  check_pair(a, b);
  return pairwise_into(a, b, metric, eps, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> pairwise_similarity_forward(const Tensor& a, const Tensor& b, int64_t metric,
                                                               double eps) {
  check_pair(a, b);
  const std::vector<int64_t> sizes = metric_of(metric) == kCosine ? leading(a) : std::vector<int64_t>{0};
  Tensor norm_a = new_tensor(sizes, ScalarType::Float, Life::Kept);
  Tensor norm_b = new_tensor(sizes, ScalarType::Float, Life::Kept);
  Tensor scores = pairwise_into(a, b, metric, eps, static_cast<float*>(norm_a.mutable_data_ptr()),
                                static_cast<float*>(norm_b.mutable_data_ptr()));
  return {scores, norm_a, norm_b};
}

std::tuple<Tensor, Tensor> pairwise_similarity_backward(Tensor grad, const Tensor& a, const Tensor& b, Tensor scores,
                                                        Tensor norm_a, Tensor norm_b, int64_t metric, double eps) {
  check_pair(a, b);
  const int dtype = dtype_index(a, "a");
  const RowView a_view(a), b_view(b);
  grad = torch::stable::contiguous(grad);
  scores = torch::stable::contiguous(scores);
  norm_a = torch::stable::contiguous(norm_a);
  norm_b = torch::stable::contiguous(norm_b);
  STD_TORCH_CHECK(grad.numel() == a_view.rows && grad.scalar_type() == ScalarType::Float,
                  "grad: expected float32, one per row");
  STD_TORCH_CHECK(scores.numel() == a_view.rows && scores.scalar_type() == ScalarType::Float,
                  "scores: expected float32, one per row");
  if (metric_of(metric) == kCosine) {
    STD_TORCH_CHECK(norm_a.numel() == a_view.rows && norm_b.numel() == a_view.rows, "norms: expected one per row");
    STD_TORCH_CHECK(norm_a.scalar_type() == ScalarType::Float && norm_b.scalar_type() == ScalarType::Float,
                    "norms: expected float32");
  }
  Tensor grad_a = new_tensor(sizes_of(a), a.scalar_type(), Life::Kept);
  Tensor grad_b = new_tensor(sizes_of(b), b.scalar_type(), Life::Kept);
  const PairwiseBackward p = {a_view.dim,
                              a_view.get(),
                              b_view.get(),
                              metric_of(metric),
                              static_cast<float>(eps),
                              static_cast<const float*>(grad.const_data_ptr()),
                              static_cast<const float*>(scores.const_data_ptr()),
                              static_cast<const float*>(norm_a.const_data_ptr()),
                              static_cast<const float*>(norm_b.const_data_ptr()),
                              grad_a.mutable_data_ptr(),
                              grad_b.mutable_data_ptr()};
  const PairwiseBackwardFn kernel = kernels().pairwise_backward[dtype];
  torch::stable::parallel_for(0, a_view.rows, grain(4 * p.dim),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {grad_a, grad_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sentfast, CPU, m) {
  m.impl("l2_normalize", TORCH_BOX(&l2_normalize));
  m.impl("l2_normalize_forward", TORCH_BOX(&l2_normalize_forward));
  m.impl("l2_normalize_backward", TORCH_BOX(&l2_normalize_backward));
  m.impl("dot_similarity", TORCH_BOX(&dot_similarity));
  m.impl("cosine_similarity", TORCH_BOX(&cosine_similarity));
  m.impl("cosine_similarity_forward", TORCH_BOX(&cosine_similarity_forward));
  m.impl("pairwise_similarity", TORCH_BOX(&pairwise_similarity));
  m.impl("pairwise_similarity_forward", TORCH_BOX(&pairwise_similarity_forward));
  m.impl("pairwise_similarity_backward", TORCH_BOX(&pairwise_similarity_backward));
}

}  // namespace sentfast::cpu
