// Every pair of query and row above a threshold, and how many there are.
#include <tuple>

#include "search_plan.h"

namespace sentfast::cpu {
namespace {

// What pairs and counts have in common: a fixed limit, and perhaps only rows after the query's own.
struct Above {
  static constexpr bool rises = false;
  const float* lowest;  // of the block
  int64_t own;          // the row that the block's first query is, or far below 0
  float exclusive(uint32_t q) const { return below(lowest[q]); }
  bool open(uint32_t q) const { return exclusive(q) == -kInfinity; }
  bool considers(uint32_t q, int64_t row) const { return row > own + q; }
};

constexpr int64_t kNoRow = -(int64_t{1} << 40);

struct FoundPair {
  uint32_t query, row;
  float score;
};
struct PairsBlock : Above {
  std::vector<FoundPair> found;
  void offer(uint32_t q, int64_t row, float score) {
    if (score >= lowest[q]) found.push_back({q, static_cast<uint32_t>(row), score});
  }
};
struct CountBlock : Above {
  std::vector<int64_t> counts;
  void offer(uint32_t q, int64_t, float score) { counts[q] += score >= lowest[q]; }
};

// Scans block b in pieces: calls make(first, count) for each piece's reducer; they are in the order of the rows.
template <class Reducer, class Make>
std::vector<Reducer> scan_block(const Inputs& in, const Plan& plan, int64_t b, int64_t own, Total& total, Make make) {
  const int64_t first = plan.first(b), count = plan.size(in, b);
  const int64_t begin = own < 0 ? 0 : (own + 1) / kSearchPanel * kSearchPanel;
  std::vector<Reducer> reducers;
  for (int64_t n = 0; n < plan.pieces; ++n) reducers.push_back(make(first, count));
  const auto piece = [&](int64_t n) {
    const int64_t from = piece_start(begin, in.corpus.count, n, plan.pieces);
    const int64_t to = piece_start(begin, in.corpus.count, n + 1, plan.pieces);
    if (from < to) total.add(scan(in, first, count, from, to, false, reducers[n]));
  };
  in_turn(plan.pieces, piece);
  return reducers;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pairs(const Tensor& queries, const Tensor& corpus, const Optional& codes,
                                                 const Optional& factors, const Optional& center, const Tensor& lowest,
                                                 int64_t metric, int64_t first_row) {
  const Inputs in(queries, corpus, codes, factors, center, metric);
  const float* limits = limits_of(lowest, "lowest", in.count);
  const Plan plan(in, 1, in.corpus.count);
  Total total;
  std::vector<std::vector<PairsBlock>> found(plan.blocks);
  const auto one_block = [&](int64_t b) {
    const int64_t own = first_row < 0 ? kNoRow : first_row + plan.first(b);
    found[b] = scan_block<PairsBlock>(in, plan, b, own, total, [&](int64_t first, int64_t) {
      PairsBlock block;
      block.lowest = limits + first;
      block.own = own;
      return block;
    });
  };
  plan.each_block(one_block);
  Tensor offsets = new_tensor({in.count + 1}, ScalarType::Long);
  auto* ends = static_cast<int64_t*>(offsets.mutable_data_ptr());
  std::fill_n(ends, in.count + 1, int64_t{0});
  for (int64_t b = 0; b < plan.blocks; ++b) {
    for (const PairsBlock& piece : found[b]) {
      for (const FoundPair& pair : piece.found) ++ends[plan.first(b) + pair.query + 1];
    }
  }
  for (int64_t i = 0; i < in.count; ++i) ends[i + 1] += ends[i];
  Tensor ids = new_tensor({ends[in.count]}, ScalarType::Long), scores = new_tensor({ends[in.count]}, ScalarType::Float);
  auto* id = static_cast<int64_t*>(ids.mutable_data_ptr());
  auto* score = static_cast<float*>(scores.mutable_data_ptr());
  in_turn(plan.blocks, [&](int64_t b) {
    std::vector<int64_t> next(ends + plan.first(b), ends + plan.first(b) + plan.size(in, b));
    for (PairsBlock& piece : found[b]) {
      for (const FoundPair& pair : piece.found) {
        const int64_t at = next[pair.query]++;
        id[at] = pair.row;
        score[at] = pair.score;
      }
      std::vector<FoundPair>().swap(piece.found);
    }
  });
  return {offsets, ids, scores, total.tensor(in.count)};
}

std::tuple<Tensor, Tensor> count(const Tensor& queries, const Tensor& corpus, const Optional& codes,
                                 const Optional& factors, const Optional& center, const Tensor& lowest,
                                 int64_t metric) {
  const Inputs in(queries, corpus, codes, factors, center, metric);
  const float* limits = limits_of(lowest, "lowest", in.count);
  const Plan plan(in, 8, in.corpus.count);
  Total total;
  Tensor counts = new_tensor({in.count}, ScalarType::Long);
  auto* out = static_cast<int64_t*>(counts.mutable_data_ptr());
  const auto one_block = [&](int64_t b) {
    const auto blocks = scan_block<CountBlock>(in, plan, b, kNoRow, total, [&](int64_t first, int64_t size) {
      CountBlock block;
      block.lowest = limits + first;
      block.own = kNoRow;
      block.counts.resize(size);
      return block;
    });
    for (int64_t i = 0; i < plan.size(in, b); ++i) {
      int64_t sum = 0;
      for (const CountBlock& piece : blocks) sum += piece.counts[i];
      out[plan.first(b) + i] = sum;
    }
  };
  plan.each_block(one_block);
  return {counts, total.tensor(in.count)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sentfast, CPU, m) {
  m.impl("search_pairs", TORCH_BOX(&pairs));
  m.impl("search_count", TORCH_BOX(&count));
}

}  // namespace sentfast::cpu
