// dot_similarity and cosine_similarity against plain loops in double.
#include <algorithm>

#include "arrays.h"
#include "similarity_matrix.cuh"

namespace driver {
namespace {

using namespace sentfast;

constexpr Dtype kDtypes[] = {Dtype::kFloat, Dtype::kBFloat16, Dtype::kHalf};

enum class Tile { kChosen, kSmall, kLarge };

struct Problem {
  int64_t batch, rows_a, rows_b, depth;
  Layout layout_a, layout_b;
};

cudaError_t start(const MatrixArguments& p, Tile tile) {
  if (tile == Tile::kSmall) return launch_matrix<kSmallTile>(p, nullptr);
  if (tile == Tile::kLarge) return launch_matrix<kLargeTile>(p, nullptr);
  return run_similarity_matrix(p, nullptr);
}

void test_problem(const Problem& problem, Dtype dtype_a, Dtype dtype_b, bool cosine, Tile tile) {
  ++cases;
  const int64_t n = problem.rows_a, m = problem.rows_b, depth = problem.depth;
  const double eps = 1e-12;
  const std::string name = std::string(cosine ? "cosine " : "dot ") + name_of(dtype_a) + " " + name_of(dtype_b) + " " +
                           std::to_string(n) + "x" + std::to_string(m) + "x" + std::to_string(depth) + " tile" +
                           std::to_string(static_cast<int>(tile));
  Array a(dtype_a, {problem.batch, n, depth}, problem.layout_a),
      b(dtype_b, {problem.batch, m, depth}, problem.layout_b);
  a.fill_random();
  b.fill_random();
  if (cosine && n > 1 && a.count() > 0) {
    for (int64_t k = 0; k < depth; ++k) a.set({0, 1, k}, 0);
  }
  if (n > 2 && depth > 3 && a.count() > 0) a.set({0, 2, 3}, NAN);
  Array scores(Dtype::kFloat, {problem.batch, n, m});
  Array norm_a(Dtype::kFloat, {problem.batch, n}), norm_b(Dtype::kFloat, {problem.batch, m});
  MatrixArguments p{};
  expect(collapse<2>(1, a.size.data(), {a.stride.data(), b.stride.data()}, p.batch), name + " collapse", 0, 1, 0);
  p.a = operand(a.data(), dtype_a, n, a.stride[1], a.stride[2], p.batch.dims, p.batch.stride[0]);
  p.b = operand(b.data(), dtype_b, m, b.stride[1], b.stride[2], p.batch.dims, p.batch.stride[1]);
  p.depth = depth;
  p.scores = static_cast<float*>(scores.data());
  p.cosine = cosine;
  p.norm_a = cosine ? static_cast<float*>(norm_a.data()) : nullptr;
  p.norm_b = cosine ? static_cast<float*>(norm_b.data()) : nullptr;
  p.eps = static_cast<float>(eps);
  expect_success(name, start(p, tile));

  const auto norms = [&](const Array& x, int64_t rows) {
    std::vector<double> result;
    for (int64_t r = 0; r < problem.batch * rows; ++r) {
      double squares = 0;
      for (int64_t k = 0; k < depth; ++k) squares += x[r * depth + k] * x[r * depth + k];
      result.push_back(sqrt(squares));
    }
    return result;
  };
  // Reading an element through Array is slow: once each.
  std::vector<double> av, bv, want;
  for (int64_t i = 0; i < a.count(); ++i) av.push_back(a[i]);
  for (int64_t i = 0; i < b.count(); ++i) bv.push_back(b[i]);
  const std::vector<double> na = norms(a, n), nb = norms(b, m);
  for (int64_t r = 0; r < problem.batch * n; ++r) {
    for (int64_t c = 0; c < m; ++c) {
      const int64_t column = r / n * m + c;
      double sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += av[r * depth + k] * bv[column * depth + k];
      if (cosine) sum = sum / (na[r] < eps ? eps : na[r]) / (nb[column] < eps ? eps : nb[column]);
      want.push_back(sum);
    }
  }
  expect_near(name + " scores", scores, want, cosine ? 1 : static_cast<double>(std::max<int64_t>(depth, 1)));
  if (cosine) {
    expect_near(name + " norm_a", norm_a, na);
    expect_near(name + " norm_b", norm_b, nb);
  }
}

}  // namespace

void test_matrix() {
  const std::vector<Problem> problems = {
      {1, 1, 1, 1, Layout::kContiguous, Layout::kContiguous},
      {2, 5, 9, 32, Layout::kContiguous, Layout::kContiguous},
      {1, 70, 66, 19, Layout::kOffset, Layout::kContiguous},
      {2, 64, 68, 24, Layout::kTransposed, Layout::kWideRows},
      {1, 33, 65, 40, Layout::kWideRows, Layout::kTransposed},
      {2, 5, 9, 19, Layout::kWideRows, Layout::kWideRows},
      {3, 2, 3, 17, Layout::kTransposed, Layout::kTransposed},
      {1, 130, 140, 20, Layout::kContiguous, Layout::kTransposed},
      {2, 3, 0, 8, Layout::kContiguous, Layout::kContiguous},
      {2, 0, 3, 8, Layout::kContiguous, Layout::kContiguous},
      {0, 2, 3, 8, Layout::kContiguous, Layout::kContiguous},
      {1, 2, 3, 0, Layout::kContiguous, Layout::kContiguous},
  };
  int turn = 0;
  for (const Problem& problem : problems) {
    for (const Dtype dtype : kDtypes) {
      for (const bool cosine : {false, true}) {
        const Dtype other = turn % 2 ? dtype : kDtypes[turn % 3];
        const bool empty = problem.rows_a == 0 || problem.rows_b == 0 || problem.batch == 0;
        test_problem(problem, dtype, other, cosine, empty ? Tile::kChosen : (turn % 3 ? Tile::kSmall : Tile::kLarge));
        ++turn;
      }
    }
  }
  // Enough large tiles for the launcher to choose them.
  test_problem({128, 65, 66, 3, Layout::kContiguous, Layout::kContiguous}, Dtype::kFloat, Dtype::kFloat, true,
               Tile::kChosen);
}

}  // namespace driver
