// Exact search: tensors, blocks of queries and pieces of the corpus over threads, and what is kept of the scores.
#include <atomic>
#include <optional>
#include <tuple>

#include "search_scan.h"
#include "tensors.h"

namespace sentfast::cpu {
namespace {

using Optional = std::optional<Tensor>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kMostQueries = 512;               // of a block: its codes stay in the second cache
constexpr int64_t kBlockBytes = int64_t{4} << 20;   // of a block's queries, and of its results
constexpr int64_t kPieceBytes = int64_t{16} << 20;  // of the results of all pieces
constexpr int64_t kPieceRows = 8192;                // a smaller piece is not worth its own threshold
constexpr int64_t kQueriesPerThread = 32;           // from here on a thread is worth its own pass over the corpus

void check(const Tensor& x, const char* name, ScalarType dtype, int64_t dims) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == dtype && x.dim() == dims, name, ": expected a CPU tensor of ",
                  dtype == ScalarType::Float      ? "float32"
                  : dtype == ScalarType::Long     ? "int64"
                  : dtype == ScalarType::BFloat16 ? "bfloat16"
                                                  : "uint8",
                  " with ", dims, " dimensions");
}

struct Inputs {
  RowView query_rows, corpus_rows;
  SearchCorpus corpus;
  SearchRows queries;
  int64_t count;

  Inputs(const Tensor& q, const Tensor& k, const Optional& codes, const Optional& factors, const Optional& center,
         int64_t metric)
      : query_rows(q), corpus_rows(k), corpus(), queries(), count(q.size(0)) {
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

const float* limits_of(const Optional& x, const char* name, int64_t count) {
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
};

// Where piece n of [begin, end) starts: begin and the borders are multiples of a panel.
int64_t piece_start(int64_t begin, int64_t end, int64_t n, int64_t pieces) {
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

float below(float x) { return std::nextafter(x, -kInfinity); }

// ---- top k ----

struct Entry {
  float score;
  uint32_t row;
};
bool better(const Entry& a, const Entry& b) { return a.score > b.score || (a.score == b.score && a.row < b.row); }

struct TopKWishes {
  int64_t k;
  const float *lowest, *highest;            // [Q], or nullptr
  const int64_t *excluded_ends, *excluded;  // [Q + 1] and ids, or nullptr
};

// The best of a block of queries from `first` on: a heap each, the worst in front.
class TopKBlock {
 public:
  TopKBlock(const TopKWishes& wishes, int64_t first, int64_t count, int64_t rows)
      : wishes_(wishes), first_(first), room_(std::min(wishes.k, rows)), entries_(count * room_), sizes_(count, 0) {
    for (int64_t i = 0; i < count; ++i) {
      floor_.push_back(wishes.lowest != nullptr ? below(wishes.lowest[first + i]) : -kInfinity);
    }
  }
  float exclusive(uint32_t q) const {
    return sizes_[q] == room_ ? std::max(floor_[q], entries_[q * room_].score) : floor_[q];
  }
  bool open(uint32_t q) const { return exclusive(q) == -kInfinity; }
  bool considers(uint32_t q, int64_t row) const {
    if (wishes_.excluded == nullptr) return true;
    const int64_t* ends = wishes_.excluded_ends + first_ + q;
    return !std::binary_search(wishes_.excluded + ends[0], wishes_.excluded + ends[1], row);
  }
  void offer(uint32_t q, int64_t row, float score) {
    if (wishes_.lowest != nullptr && !(score >= wishes_.lowest[first_ + q])) return;
    if (wishes_.highest != nullptr && !(score <= wishes_.highest[first_ + q])) return;
    const Entry entry = {score, static_cast<uint32_t>(row)};
    Entry* heap = &entries_[q * room_];
    int64_t& size = sizes_[q];
    if (size < room_) {
      heap[size++] = entry;
      std::push_heap(heap, heap + size, better);
    } else if (better(entry, heap[0])) {
      std::pop_heap(heap, heap + size, better);
      heap[size - 1] = entry;
      std::push_heap(heap, heap + size, better);
    }
  }
  // Only what is above the k-th best of earlier rows can enter a later piece.
  void start_after(const TopKBlock& earlier) {
    for (size_t q = 0; q < floor_.size(); ++q) {
      if (earlier.sizes_[q] == wishes_.k) floor_[q] = earlier.exclusive(static_cast<uint32_t>(q));
    }
  }
  void append(uint32_t q, std::vector<Entry>& to) const {
    to.insert(to.end(), entries_.begin() + q * room_, entries_.begin() + q * room_ + sizes_[q]);
  }

 private:
  const TopKWishes& wishes_;
  int64_t first_, room_;
  std::vector<Entry> entries_;
  std::vector<int64_t> sizes_;
  std::vector<float> floor_;
};

void write(std::vector<Entry>& entries, int64_t k, float* scores, int64_t* ids) {
  std::sort(entries.begin(), entries.end(), better);
  const auto size = static_cast<int64_t>(entries.size());
  for (int64_t i = 0; i < k; ++i) {
    scores[i] = i < size ? entries[i].score : -kInfinity;
    ids[i] = i < size ? static_cast<int64_t>(entries[i].row) : -1;
  }
}

template <class Reducer>
SearchStatistics scan(const Inputs& in, int64_t first, int64_t count, int64_t begin, int64_t end, bool small_first,
                      Reducer& reducer) {
  SearchScanner<Reducer> scanner(in.corpus, in.queries_from(first), count, reducer);
  scanner.run(begin, end, small_first);
  return scanner.statistics();
}

std::tuple<Tensor, Tensor, Tensor> topk(const Tensor& queries, const Tensor& corpus, const Optional& codes,
                                        const Optional& factors, const Optional& center, int64_t k, int64_t metric,
                                        const Optional& lowest, const Optional& highest,
                                        const Optional& excluded_offsets, const Optional& excluded) {
  check(queries, "queries", ScalarType::Float, 2);
  check(corpus, "corpus", ScalarType::Float, 2);
  const Inputs in(queries, corpus, codes, factors, center, metric);
  STD_TORCH_CHECK(k >= 1 && k <= in.corpus.count, "k: expected 1 to ", in.corpus.count, ", got ", k);
  TopKWishes wishes = {k, limits_of(lowest, "lowest", in.count), limits_of(highest, "highest", in.count), nullptr,
                       nullptr};
  if (excluded_offsets && excluded) {
    check(*excluded_offsets, "excluded_offsets", ScalarType::Long, 1);
    check(*excluded, "excluded", ScalarType::Long, 1);
    STD_TORCH_CHECK(
        excluded_offsets->size(0) == in.count + 1 && excluded_offsets->is_contiguous() && excluded->is_contiguous(),
        "excluded_offsets: expected ", in.count + 1, " contiguous numbers");
    wishes.excluded_ends = static_cast<const int64_t*>(excluded_offsets->const_data_ptr());
    wishes.excluded = static_cast<const int64_t*>(excluded->const_data_ptr());
    for (int64_t i = 0; i < in.count; ++i) {
      STD_TORCH_CHECK(wishes.excluded_ends[i] >= 0 && wishes.excluded_ends[i] <= wishes.excluded_ends[i + 1] &&
                          wishes.excluded_ends[i + 1] <= excluded->size(0),
                      "excluded_offsets: expected to rise from 0 to ", excluded->size(0));
    }
  }
  Tensor scores = new_tensor({in.count, k}, ScalarType::Float), ids = new_tensor({in.count, k}, ScalarType::Long);
  auto* score = static_cast<float*>(scores.mutable_data_ptr());
  auto* id = static_cast<int64_t*>(ids.mutable_data_ptr());
  const Plan plan(in, k * static_cast<int64_t>(sizeof(Entry)),
                  kPieceBytes / (k * static_cast<int64_t>(sizeof(Entry)) * std::max<int64_t>(1, in.count)));
  Total total;
  const int64_t rows = in.corpus.count;
  // Rows whose k best are a threshold for the pieces.
  const int64_t sample =
      std::min(rows, (std::max<int64_t>(4096, 4 * k) + kSearchPanel - 1) / kSearchPanel * kSearchPanel);
  const int64_t begin = plan.pieces == 1 ? 0 : sample;
  const auto one_block = [&](int64_t b) {
    const int64_t first = plan.first(b), count = plan.size(in, b);
    std::vector<TopKBlock> blocks;
    blocks.emplace_back(wishes, first, count, plan.pieces == 1 ? rows : sample);
    total.add(scan(in, first, count, 0, plan.pieces == 1 ? rows : sample, true, blocks[0]));
    for (int64_t n = 0; plan.pieces > 1 && n < plan.pieces; ++n) {
      const int64_t size = piece_start(begin, rows, n + 1, plan.pieces) - piece_start(begin, rows, n, plan.pieces);
      blocks.emplace_back(wishes, first, count, size);
      blocks.back().start_after(blocks[0]);
    }
    if (plan.pieces > 1) {
      in_turn(plan.pieces, [&](int64_t n) {
        const int64_t from = piece_start(begin, rows, n, plan.pieces),
                      to = piece_start(begin, rows, n + 1, plan.pieces);
        total.add(scan(in, first, count, from, to, false, blocks[n + 1]));
      });
    }
    std::vector<Entry> entries;
    for (int64_t i = 0; i < count; ++i) {
      entries.clear();
      for (const TopKBlock& block : blocks) block.append(static_cast<uint32_t>(i), entries);
      write(entries, k, score + (first + i) * k, id + (first + i) * k);
    }
  };
  if (plan.pieces > 1) {
    for (int64_t b = 0; b < plan.blocks; ++b) one_block(b);
  } else {
    in_turn(plan.blocks, one_block);
  }
  return {scores, ids, total.tensor(in.count)};
}

// ---- above a threshold ----

// What pairs and counts have in common: a fixed limit, and perhaps only rows after the query's own.
struct Above {
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
  if (plan.pieces == 1)
    piece(0);
  else
    in_turn(plan.pieces, piece);
  return reducers;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pairs(const Tensor& queries, const Tensor& corpus, const Optional& codes,
                                                 const Optional& factors, const Optional& center, const Tensor& lowest,
                                                 int64_t metric, int64_t first_row) {
  check(queries, "queries", ScalarType::Float, 2);
  check(corpus, "corpus", ScalarType::Float, 2);
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
  if (plan.pieces > 1) {
    for (int64_t b = 0; b < plan.blocks; ++b) one_block(b);
  } else {
    in_turn(plan.blocks, one_block);
  }
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
  check(queries, "queries", ScalarType::Float, 2);
  check(corpus, "corpus", ScalarType::Float, 2);
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
  if (plan.pieces > 1) {
    for (int64_t b = 0; b < plan.blocks; ++b) one_block(b);
  } else {
    in_turn(plan.blocks, one_block);
  }
  return {counts, total.tensor(in.count)};
}

// ---- packing ----

constexpr int64_t kCenterRows = 4096;

// The mean of unit rows, of thousands at most: any vector not longer than 1 is a correct center, a near one makes what
// is left small.
void find_center(const float* data, int64_t stride, int64_t count, int64_t dim, float* center) {
  std::vector<double> sum(dim, 0.0);
  int64_t used = 0;
  for (int64_t i = 0; i < count; i += std::max<int64_t>(1, count / kCenterRows)) {
    const float* row = data + i * stride;
    const double norm = kernels().search.norm(row, dim);
    if (!search_unit_exists(norm)) continue;
    for (int64_t d = 0; d < dim; ++d) sum[d] += row[d] / norm;
    ++used;
  }
  for (int64_t d = 0; d < dim; ++d)
    center[d] = used == 0 ? 0.0f : static_cast<float>(sum[d] / static_cast<double>(used));
}

std::tuple<Tensor, Tensor, Tensor> pack(const Tensor& rows, int64_t bits) {
  check(rows, "rows", ScalarType::Float, 2);
  STD_TORCH_CHECK(bits == 8 || bits == 16, "bits: expected 8 or 16, got ", bits);
  const SearchFormat format = bits == 8 ? kSearchInt8 : kSearchBf16;
  const int64_t group = kSearchGroup[format];
  const RowView view(rows);
  const int64_t count = rows.size(0), dim = view.dim;
  const int64_t panels = (count + kSearchPanel - 1) / kSearchPanel, words = (dim + group - 1) / group;
  Tensor codes =
      new_tensor({panels, words, kSearchPanel, group}, format == kSearchInt8 ? ScalarType::Byte : ScalarType::BFloat16);
  Tensor factors = new_tensor({panels, kSearchFactors, kSearchPanel}, ScalarType::Float);
  Tensor center = new_tensor({dim}, ScalarType::Float);
  auto* panel = static_cast<uint32_t*>(codes.mutable_data_ptr());
  auto* factor = static_cast<float*>(factors.mutable_data_ptr());
  auto* middle = static_cast<float*>(center.mutable_data_ptr());
  const auto* data = static_cast<const float*>(view.get().data);
  find_center(data, view.stride, count, dim, middle);
  const SearchKernels& kernel = kernels().search;
  const double square = kernel.product(middle, middle, dim);
  torch::stable::parallel_for(0, panels, grain(kSearchPanel * dim), [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> lines(kSearchPanel * words);
    for (int64_t p = begin; p < end; ++p) {
      float* out = factor + p * kSearchFactors * kSearchPanel;
      std::fill_n(out, kSearchFactors * kSearchPanel, 0.0f);
      const int64_t size = std::min(kSearchPanel, count - p * kSearchPanel);
      for (int64_t j = 0; j < size; ++j) {
        const float* row = data + (p * kSearchPanel + j) * view.stride;
        search_pack_row(format, row, dim, middle, square, &lines[j * words], out + j);
      }
      kernel.panel(lines.data(), size, words, kSearchFlip[format], panel + p * words * kSearchPanel);
    }
  });
  return {codes, factors, center};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sentfast, CPU, m) {
  m.impl("search_pack", TORCH_BOX(&pack));
  m.impl("search_topk", TORCH_BOX(&topk));
  m.impl("search_pairs", TORCH_BOX(&pairs));
  m.impl("search_count", TORCH_BOX(&count));
}

}  // namespace sentfast::cpu
