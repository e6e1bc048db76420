// The scan of exact search, without tensors: a block of queries against a range of the corpus.
//
// Rows are visited in the order of their indices, in steps. A query reads a step at one of three levels: packed codes,
// floats, or exact scores of every pair. It climbs where bounds decide too little, and comes back later. What a level
// lets through is scored exactly and offered to the reducer, which keeps what belongs to the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "search_bounds.h"

namespace sentfast::cpu {

struct SearchCorpus {
  SearchRows rows;
  int64_t count, metric;
  SearchFormat format;    // of the codes; fp32: the rows themselves are scanned, and the others are nullptr
  const uint32_t* codes;  // packed
  const float *factors, *center;
};

struct SearchStatistics {
  int64_t pairs = 0, scored = 0, fallbacks = 0, nans = 0;
  void add(const SearchStatistics& s) {
    pairs += s.pairs;
    scored += s.scored;
    fallbacks += s.fallbacks;
    nans += s.nans;
  }
};

// Reducer: exclusive(q): only scores above it, or equal to it in an earlier row, can enter; open(q): everything can;
// offer(q, row, score). rises: `exclusive` does, and rows may be offered in any order.
template <class Reducer>
class SearchScanner {
 public:
  SearchScanner(const SearchCorpus& corpus, const SearchRows& queries, int64_t count, Reducer& reducer)
      : kernel_(kernels().search), corpus_(corpus), rows_(queries), reducer_(reducer), hits_(new SearchHit[kHits]) {
    queries_.reserve(count);
    norms_.reserve(count);
    base_ = corpus.format == kSearchFp32 ? kFloats : kCodes;
    words_ = words_of(corpus.format);
    codes_.resize(count * words_);
    square_ = corpus.center == nullptr ? 0 : kernel_.product(corpus.center, corpus.center, queries.dim);
    for (int64_t i = 0; i < count; ++i) {
      const float* row = queries.data + i * queries.stride;
      Query q(row, queries.dim, corpus.metric);
      if (q.bounded && q.norm > 0 && corpus.center != nullptr) {
        q.center = kernel_.product(row, corpus.center, queries.dim) / q.divisor;
      }
      q.codes = quantize(corpus.format, i, q, &codes_[i * words_]);
      q.level = base_;
      queries_.push_back(q);
      norms_.push_back(search_divisor(q.norm, queries.dim));
    }
    survivors_.resize(count);
    place_.resize(count);
    exact_ = {rows_, corpus_.rows, corpus_.metric, norms_.data()};
  }

  // Rows from begin, a multiple of kSearchPanel, to end; first steps are small where thresholds must be found.
  void run(int64_t begin, int64_t end, bool small_first) {
    int64_t step = small_first ? kSearchPanel : kLongestStep;
    for (int64_t row = begin; row < end; ++steps_) {
      const int64_t stop = std::min(end, row + step);
      visit(row, stop);
      if (stop - row >= kLongestStep / 2) judge(stop - row);
      if (row > begin || !small_first) step = std::min(2 * step, kLongestStep);
      row = stop;
    }
  }
  SearchStatistics statistics() const {
    SearchStatistics s = statistics_;
    for (const Query& q : queries_) s.fallbacks += q.fell_back;
    return s;
  }

 private:
  enum Level { kCodes, kFloats, kExact };
  static constexpr int64_t kLongestStep = 1024;
  static constexpr int64_t kHits = 1 << 16;
  static constexpr int64_t kChunk = 8;  // hits of a query, before its limit is looked at again

  struct Query : SearchQuery {
    using SearchQuery::SearchQuery;
    int level = 0;
    int64_t climbed_until = 0, patience = 16;  // steps
    bool fell_back = false;
  };

  int64_t words_of(SearchFormat format) const { return (rows_.dim + kSearchGroup[format] - 1) / kSearchGroup[format]; }
  SearchFormat format_of(Level level) const { return level == kCodes ? corpus_.format : kSearchFp32; }

  SearchCodes quantize(SearchFormat format, int64_t query, const SearchQuery& q, uint32_t* to) const {
    if (!q.bounded) {
      std::fill_n(to, words_of(format), 0u);
      return {};
    }
    const float* center = q.norm > 0 ? corpus_.center : nullptr;
    return kernel_.quantize[format](rows_.data + query * rows_.stride, rows_.dim, q.divisor, center, 1e-6,
                                    kernel_.query_codes, to);
  }

  void visit(int64_t begin, int64_t end) {
    std::vector<uint32_t>* const lists[] = {&coded_, &floated_, &scored_};
    for (auto* list : lists) list->clear();
    for (size_t i = 0; i < queries_.size(); ++i) {
      const auto number = static_cast<uint32_t>(i);
      lists[reducer_.open(number) ? kExact : queries_[i].level]->push_back(number);
    }
    if (static_cast<int64_t>(floated_.size()) < kernel_.few) {
      scored_.insert(scored_.end(), floated_.begin(), floated_.end());
      floated_.clear();
    }
    statistics_.pairs += static_cast<int64_t>(queries_.size()) * (end - begin);
    std::fill(survivors_.begin(), survivors_.end(), 0u);
    if (!coded_.empty()) pass(kCodes, coded_, begin, end);
    if (!floated_.empty()) pass(kFloats, floated_, begin, end);
    if (!scored_.empty()) score_all(begin, end);
  }

  void gather(Level level, const std::vector<uint32_t>& list) {
    const auto count = static_cast<int64_t>(list.size());
    const int64_t words = words_of(format_of(level));
    pass_.resize(count, words);
    for (int64_t n = 0; n < count; ++n) {
      const Query& q = queries_[list[n]];
      place_[list[n]] = n;
      uint32_t* to = &pass_.codes[n * words];
      SearchCodes codes = q.codes;
      if (level == base_) {
        std::copy_n(&codes_[list[n] * words_], words_, to);
      } else {
        codes = quantize(format_of(level), list[n], q, to);
      }
      pass_.set(n, q, codes);
    }
    renew_limits(list);
  }

  void renew_limits(const std::vector<uint32_t>& list) {
    for (size_t n = 0; n < list.size(); ++n) {
      const auto at = static_cast<int64_t>(n);
      pass_.set_aim(at, queries_[list[n]], corpus_.metric, reducer_.exclusive(list[n]));
    }
  }

  void pass(Level level, const std::vector<uint32_t>& list, int64_t begin, int64_t end) {
    gather(level, list);
    const auto count = static_cast<int64_t>(list.size());
    const SearchFormat format = format_of(level);
    float factors[kSearchFactors * kSearchPanel];
    SearchScan p = {};
    p.words = words_of(format);
    p.factors = factors;
    // Each step of a sum of floats is rounded once or twice.
    const double sums = format == kSearchInt8 ? 0 : static_cast<double>(rows_.dim + 16) * 0x1p-23;
    int64_t found = 0;
    bases_.clear();
    pass_begin_ = begin;
    for (int64_t row = begin; row < end; row += kSearchPanel) {
      const int64_t rows = std::min(kSearchPanel, end - row);
      const int64_t panel = row / kSearchPanel;
      p.row = row;
      p.panel = level == kCodes ? corpus_.codes + panel * words_ * kSearchPanel : float_panel(row, rows);
      const float* packed = level == kCodes ? corpus_.factors + panel * kSearchFactors * kSearchPanel : float_factors_;
      const double base = search_factors(corpus_.metric, packed, rows, rows_.dim, sums, factors);
      bases_.push_back(base);
      // As many queries at a time as the space for hits allows.
      for (int64_t first = 0; first < count;) {
        int64_t room = (kHits - found) / kSearchPanel;
        if (room < std::min(count - first, kHits / kSearchPanel / 2)) {
          flush(list, found, end);
          found = 0;
          room = kHits / kSearchPanel;
          renew_limits(list);
        }
        pass_.set_base(base, corpus_.metric, search_error(rows_.dim));
        p.count = std::min(room, count - first);
        p.queries = pass_.codes.data() + first * p.words;
        p.start = pass_.start.data() + first;
        p.norm = pass_.length.data() + first;
        p.error = pass_.error.data() + first;
        p.center = pass_.center.data() + first;
        p.tilt = pass_.tilt.data() + first;
        p.square = corpus_.metric == kEuclidean ? pass_.square.data() + first : nullptr;
        p.limit = pass_.limit.data() + first;
        p.number = list.data() + first;
        found += kernel_.scan[format](p, hits_.get() + found);
        first += p.count;
      }
    }
    flush(list, found, end);
  }

  // Rows become floats relative to the center, and stay what they are where there is none.
  const uint32_t* float_panel(int64_t row, int64_t rows) {
    const int64_t dim = rows_.dim, stride = corpus_.rows.stride;
    const float* first = corpus_.rows.data + row * stride;
    panel_.resize(kSearchPanel * dim);
    std::fill_n(float_factors_, kSearchFactors * kSearchPanel, 0.0f);
    if (corpus_.center == nullptr) {
      double norms[kSearchPanel];
      kernel_.norms(corpus_.rows, row, rows, norms);
      for (int64_t j = 0; j < rows; ++j) search_pack_plain(norms[j], float_factors_ + j);
      kernel_.panel(reinterpret_cast<const uint32_t*>(first), stride, rows, dim, 0, panel_.data());
      return panel_.data();
    }
    lines_.resize(kSearchPanel * dim);
    for (int64_t j = 0; j < rows; ++j) {
      search_pack_row(kSearchFp32, first + j * stride, dim, corpus_.center, square_, &lines_[j * dim],
                      float_factors_ + j);
    }
    kernel_.panel(lines_.data(), dim, rows, dim, 0, panel_.data());
    return panel_.data();
  }

  void take(uint32_t query, int64_t row, float score) {
    if (reducer_.considers(query, row)) {
      if (score != score)
        ++statistics_.nans;
      else
        reducer_.offer(query, row, score);
    }
  }

  // The hits of rows below `end`.
  void flush(const std::vector<uint32_t>& list, int64_t found, int64_t end) {
    SearchHit* hits = hits_.get();
    found = std::remove_if(hits, hits + found, [end](const SearchHit& hit) { return hit.row >= end; }) - hits;
    if constexpr (Reducer::rises) {
      best_first(list, found);
    } else {
      score(hits, found);
    }
  }

  void score(const SearchHit* hits, int64_t count) {
    constexpr int64_t chunk = 256;
    float scores[chunk];
    statistics_.scored += count;
    for (int64_t first = 0; first < count; first += chunk) {
      const int64_t some = std::min(chunk, count - first);
      kernel_.pairs(exact_, hits + first, some, scores);
      for (int64_t i = 0; i < some; ++i) {
        const SearchHit& hit = hits[first + i];
        ++survivors_[hit.query];
        take(hit.query, hit.row, scores[i]);
      }
    }
  }

  // The scores of a query's best bounds raise its limit, which leaves out most of the others.
  void best_first(const std::vector<uint32_t>& list, int64_t found) {
    const SearchHit* hits = hits_.get();
    ends_.assign(list.size() + 1, 0);
    for (int64_t i = 0; i < found; ++i) ++ends_[place_[hits[i].query] + 1];
    std::partial_sum(ends_.begin(), ends_.end(), ends_.begin());
    ordered_.resize(found);
    std::vector<int64_t>& next = ends_;  // becomes the end of each
    for (int64_t i = 0; i < found; ++i) ordered_[next[place_[hits[i].query]]++] = hits[i];
    const auto key = [](const SearchHit& hit) { return hit.bound == hit.bound ? hit.bound : kInfinity; };
    int64_t begin = 0;
    for (size_t n = 0; n < list.size(); begin = ends_[n++]) {
      SearchHit* own = ordered_.data() + begin;
      const int64_t count = ends_[n] - begin;
      if (count > kChunk) {
        std::sort(own, own + count, [&](const SearchHit& a, const SearchHit& b) { return key(a) > key(b); });
      }
      score(own, std::min(count, kChunk));
      for (int64_t first = kChunk; first < count; first += kChunk) {
        score(own + first, still_above(static_cast<int64_t>(n), list[n], own + first, std::min(kChunk, count - first)));
      }
    }
  }

  // The hits of a query, to the front, that are above its limit as it is by now; a score that is equal to the k-th may
  // still be that of an earlier row.
  int64_t still_above(int64_t n, uint32_t number, SearchHit* hits, int64_t count) {
    pass_.set_aim(n, queries_[number], corpus_.metric, below(reducer_.exclusive(number)));
    const auto too_low = [&](const SearchHit& hit) {
      const double base = bases_[(hit.row - pass_begin_) / kSearchPanel];
      return hit.bound <= pass_.limit_of(n, base, corpus_.metric, search_error(rows_.dim));
    };
    return std::remove_if(hits, hits + count, too_low) - hits;
  }

  void score_all(int64_t begin, int64_t end) {
    constexpr int64_t block = 32;
    float scores[block * kSearchPanel];
    const auto count = static_cast<int64_t>(scored_.size());
    statistics_.scored += count * (end - begin);
    for (int64_t row = begin; row < end; row += kSearchPanel) {
      const int64_t rows = std::min(kSearchPanel, end - row);
      for (int64_t first = 0; first < count; first += block) {
        const int64_t some = std::min(block, count - first);
        kernel_.all(exact_, &scored_[first], some, row, rows, scores);
        for (int64_t i = 0; i < some; ++i) {
          const uint32_t query = scored_[first + i];
          const float* own = scores + i * kSearchPanel;
          bool open = reducer_.open(query);
          float least = reducer_.exclusive(query);
          for (int64_t j = 0; j < rows; ++j) {
            if (!open && own[j] <= least) continue;
            take(query, row + j, own[j]);
            open = reducer_.open(query);
            least = reducer_.exclusive(query);
          }
        }
      }
    }
  }

  // Where more than a sixteenth of the rows survived codes, floats are faster; after an eighth, exact scores.
  void judge(int64_t rows) {
    for (const auto* list : {&coded_, &floated_}) {
      for (const uint32_t number : *list) {
        Query& q = queries_[number];
        if (survivors_[number] * (list == &coded_ ? 16 : 8) <= rows) continue;
        q.level = list == &coded_ ? kFloats : kExact;
        q.fell_back = true;
        q.climbed_until = steps_ + q.patience;
        q.patience *= 2;
      }
    }
    for (Query& q : queries_) {
      if (q.level > base_ && steps_ >= q.climbed_until) q.level = base_;
    }
  }

  const SearchKernels& kernel_;
  const SearchCorpus corpus_;
  const SearchRows rows_;
  Reducer& reducer_;
  const std::unique_ptr<SearchHit[]> hits_;
  SearchExact exact_ = {};
  int64_t words_ = 0, steps_ = 0;
  Level base_ = kCodes;
  double square_ = 0;  // of the center
  std::vector<Query> queries_;
  std::vector<double> norms_;
  std::vector<uint32_t> codes_, survivors_;
  std::vector<uint32_t> coded_, floated_, scored_;
  SearchPass pass_;
  int64_t pass_begin_ = 0;
  std::vector<double> bases_;          // of the panels of a pass
  std::vector<int64_t> place_, ends_;  // of the queries in the pass's list, of their hits
  std::vector<SearchHit> ordered_;
  std::vector<uint32_t> lines_, panel_;
  float float_factors_[kSearchFactors * kSearchPanel];
  SearchStatistics statistics_;
};

}  // namespace sentfast::cpu
