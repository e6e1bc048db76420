// The best rows of the corpus for each query: a heap each while the scores are made.
#include <tuple>

#include "search_plan.h"

namespace sentfast::cpu {
namespace {

constexpr int64_t kPieceBytes = int64_t{16} << 20;  // of the results of all pieces

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
  static constexpr bool rises = true;
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

TopKWishes wishes_of(const Inputs& in, int64_t k, const Optional& lowest, const Optional& highest,
                     const Optional& excluded_offsets, const Optional& excluded) {
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
  return wishes;
}

std::tuple<Tensor, Tensor, Tensor> topk(const Tensor& queries, const Tensor& corpus, const Optional& codes,
                                        const Optional& factors, const Optional& center, int64_t k, int64_t metric,
                                        const Optional& lowest, const Optional& highest,
                                        const Optional& excluded_offsets, const Optional& excluded) {
  const Inputs in(queries, corpus, codes, factors, center, metric);
  const TopKWishes wishes = wishes_of(in, k, lowest, highest, excluded_offsets, excluded);
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
  plan.each_block(one_block);
  return {scores, ids, total.tensor(in.count)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sentfast, CPU, m) { m.impl("search_topk", TORCH_BOX(&topk)); }

}  // namespace sentfast::cpu
