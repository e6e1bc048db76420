// What the searches share: their tensors, checked; blocks of queries and pieces of the corpus over threads; statistics.
#pragma once

#include <atomic>
#include <optional>

#include "search_scan.h"
#include "tensors.h"

namespace sentfast::cpu {

using Optional = std::optional<Tensor>;

constexpr int64_t kMostQueries = 512;              // of a block: its codes stay in the second cache
constexpr int64_t kBlockBytes = int64_t{4} << 20;  // of a block's queries, and of its results
constexpr int64_t kPieceRows = 8192;               // a smaller piece is not worth its own threshold
constexpr int64_t kQueriesPerThread = 32;          // from here on a thread is worth its own pass over the corpus

inline void check(const Tensor& x, const char* name, ScalarType dtype, int64_t dims) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == dtype && x.dim() == dims, name, ": expected a CPU tensor of ",
                  dtype == ScalarType::Float      ? "float32"
                  : dtype == ScalarType::Long     ? "int64"
                  : dtype == ScalarType::BFloat16 ? "bfloat16"
                                                  : "uint8",
                  " with ", dims, " dimensions");
}

inline const Tensor& checked(const Tensor& rows, const char* name) {
  check(rows, name, ScalarType::Float, 2);
  return rows;
}

struct Inputs {
  RowView query_rows, corpus_rows;
  SearchCorpus corpus;
  SearchRows queries;
  int64_t count;

  Inputs(const Tensor& q, const Tensor& k, const Optional& codes, const Optional& factors, const Optional& center,
         int64_t metric)
      : query_rows(checked(q, "queries")), corpus_rows(checked(k, "corpus")), corpus(), queries(), count(q.size(0)) {
    STD_TORCH_CHECK(metric == kCosine || metric == kDot || metric == kEuclidean, "metric: expected 0 to 2");
    STD_TORCH_CHECK(q.size(1) == k.size(1), "corpus: expected the dimension of queries");
    STD_TORCH_CHECK(k.size(0) <= std::numeric_limits<int32_t>::max(), "corpus: expected at most 2147483647 rows");
    queries = {static_cast<const float*>(query_rows.get().data), query_rows.stride, query_rows.dim};
    corpus.rows = {static_cast<const float*>(corpus_rows.get().data), corpus_rows.stride, corpus_rows.dim};
    corpus.count = k.size(0);
    corpus.metric = metric;
    corpus.format = kSearchFp32;
    if (!codes || !factors || !center) return;
    corpus.format = codes->scalar_type() == ScalarType::BFloat16 ? kSearchBf16 : kSearchInt8;
    check(*codes, "codes", corpus.format == kSearchBf16 ? ScalarType::BFloat16 : ScalarType::Byte, 4);
    check(*factors, "factors", ScalarType::Float, 3);
    check(*center, "center", ScalarType::Float, 1);
    STD_TORCH_CHECK(center->size(0) == queries.dim && center->is_contiguous(), "center: expected ", queries.dim,
                    " contiguous numbers");
    const int64_t panels = (corpus.count + kSearchPanel - 1) / kSearchPanel, group = kSearchGroup[corpus.format];
    STD_TORCH_CHECK(codes->size(0) == panels && codes->size(1) == (queries.dim + group - 1) / group &&
                        codes->size(2) == kSearchPanel && codes->size(3) == group && codes->is_contiguous(),
                    "codes: expected those of corpus, contiguous");
    STD_TORCH_CHECK(factors->size(0) == panels && factors->size(1) == kSearchFactors &&
                        factors->size(2) == kSearchPanel && factors->is_contiguous(),
                    "factors: expected those of corpus, contiguous");
    corpus.codes = static_cast<const uint32_t*>(codes->const_data_ptr());
    corpus.factors = static_cast<const float*>(factors->const_data_ptr());
    corpus.center = static_cast<const float*>(center->const_data_ptr());
  }
  SearchRows queries_from(int64_t first) const {
    return {queries.data + first * queries.stride, queries.stride, queries.dim};
  }
};

inline const float* limits_of(const Optional& x, const char* name, int64_t count) {
  if (!x) return nullptr;
  check(*x, name, ScalarType::Float, 1);
  STD_TORCH_CHECK(x->size(0) == count && x->is_contiguous(), name, ": expected ", count, " contiguous numbers");
  return static_cast<const float*>(x->const_data_ptr());
}

// Calls f(i) for i below count, each on the next thread that is free.
template <class F>
void in_turn(int64_t count, F f) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) f(i);
  };
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  if (threads <= 1) return work(0, 1);
  torch::stable::parallel_for(0, threads, 1, work);
}

// Blocks of queries, and pieces of the corpus where there are few queries.
struct Plan {
  int64_t block, blocks, pieces;

  Plan(const Inputs& in, int64_t bytes_per_query, int64_t most_pieces) {
    const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const int64_t bytes = std::max(bytes_per_query, in.queries.dim * 4);
    const int64_t most = std::max<int64_t>(1, std::min(kMostQueries, kBlockBytes / bytes));
    const bool many = in.count >= kQueriesPerThread * threads;
    const int64_t share = many ? (in.count + threads - 1) / threads : in.count;
    blocks = (share + most - 1) / most * (many ? threads : 1);
    block = blocks == 0 ? 0 : (in.count + blocks - 1) / blocks;
    block = std::min(most, (block + 5) / 6 * 6);  // whole tiles
    blocks = block == 0 ? 0 : (in.count + block - 1) / block;
    pieces = many || threads == 1 ? 1 : std::min({8 * threads, in.corpus.count / kPieceRows, most_pieces});
    pieces = std::max<int64_t>(1, pieces);
  }
  int64_t first(int64_t b) const { return b * block; }
  int64_t size(const Inputs& in, int64_t b) const { return std::min(block, in.count - b * block); }

  // Calls f(b) for each block: blocks share the threads, or one after the other lets its pieces share them.
  template <class F>
  void each_block(F f) const {
    if (pieces == 1) return in_turn(blocks, f);
    for (int64_t b = 0; b < blocks; ++b) f(b);
  }
};

// Where piece n of [begin, end) starts: begin and the borders are multiples of a panel.
inline int64_t piece_start(int64_t begin, int64_t end, int64_t n, int64_t pieces) {
  if (n == pieces) return end;
  return std::min(end, begin + (end - begin) / kSearchPanel * n / pieces * kSearchPanel);
}

struct Total {
  std::atomic<int64_t> pairs{0}, scored{0}, fallbacks{0}, nans{0};
  void add(const SearchStatistics& s) {
    pairs += s.pairs;
    scored += s.scored;
    fallbacks += s.fallbacks;
    nans += s.nans;
  }
  Tensor tensor(int64_t queries) const {
    Tensor result = new_tensor({4}, ScalarType::Long);
    auto* out = static_cast<int64_t*>(result.mutable_data_ptr());
    const int64_t values[4] = {pairs, scored, std::min<int64_t>(fallbacks, queries), nans};
    std::copy_n(values, 4, out);
    return result;
  }
};

template <class Reducer>
SearchStatistics scan(const Inputs& in, int64_t first, int64_t count, int64_t begin, int64_t end, bool small_first,
                      Reducer& reducer) {
  SearchScanner<Reducer> scanner(in.corpus, in.queries_from(first), count, reducer);
  scanner.run(begin, end, small_first);
  return scanner.statistics();
}

}  // namespace sentfast::cpu
