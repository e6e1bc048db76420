// The scan of exact search, without tensors: a block of queries against a range of the corpus.
//
// Rows are visited in the order of their indices, in steps. A query reads a step at one of three levels: int8 codes,
// floats, or exact scores of every pair. It climbs where bounds decide too little, and comes back later. What a level
// lets through is scored exactly and offered to the reducer, which keeps what belongs to the result.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "isa.h"

namespace sentfast::cpu {

struct SearchCorpus {
  SearchRows rows;
  int64_t count, metric;
  const uint32_t* codes;  // packed, or nullptr
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

// What rows of a panel weigh in a pass, from what was packed (or, for floats, from the rows' norms alone).
inline void search_factors(int64_t metric, const float* packed, float slack, float* out) {
  const auto row = [](auto* factors, int n) { return factors + n * kSearchPanel; };
  const float *residual = row(packed, kSearchResidual), *height = row(packed, kSearchHeight);
  const float* norm = row(packed, kSearchNorm);
  // Norms whose squares or products leave float32 get no bound: NaN lets every pair through.
  const float largest = metric == kCosine ? std::numeric_limits<float>::max() : metric == kDot ? 1e30f : 1e10f;
  const float smallest = metric == kCosine ? 0.0f : metric == kDot ? 1e-30f : 1e-15f;
  constexpr float up = 1 + 0x1p-20f, eps = static_cast<float>(kSearchEps), nan = __builtin_nanf("");
  for (int64_t j = 0; j < kSearchPanel; ++j) {
    const bool bounded = norm[j] == 0 || (norm[j] <= largest && norm[j] >= smallest);
    const float weight = metric != kCosine ? norm[j] : norm[j] < eps ? norm[j] / eps : 1.0f;
    // A dozen roundings of sums that are at most this large.
    const float rounding = 0x1p-20f * (1 + 3 * (height[j] + residual[j]));
    row(out, kSearchScale)[j] = row(packed, kSearchScale)[j] * weight;
    row(out, kSearchResidual)[j] = bounded ? weight * residual[j] * up : nan;
    row(out, kSearchHeight)[j] = weight * height[j] * up;
    row(out, kSearchNorm)[j] = weight;
    row(out, kSearchTilt)[j] = weight * (row(packed, kSearchTilt)[j] + rounding + slack);
    row(out, kSearchSquare)[j] = metric == kEuclidean && bounded ? -0.5f * norm[j] * norm[j] * (1 - 0x1p-20f) : 0.0f;
  }
}

// A query as the passes see it: divisor * unit, its scores being `unit_score` times those of the unit.
struct SearchQuery {
  double norm, divisor, unit_score, center;
  float length;  // of the unit, rounded up; NaN: no bounds
  SearchCodes codes;
  int level = 0;
  int64_t climbed_until = 0, patience = 16;  // steps
  bool fell_back = false;

  SearchQuery(const float* row, int64_t dim, int64_t metric, const SearchKernels& kernel) : center(0), codes() {
    norm = kernel.norm(row, dim);
    divisor = unit_score = norm > 0 ? norm : 1;
    if (metric == kCosine) unit_score = norm > 0 && norm < kSearchEps ? norm / kSearchEps : 1;
    if (metric == kEuclidean) divisor = unit_score = std::max(norm, 1e-10);
    const double most = metric == kCosine ? std::numeric_limits<float>::max() : metric == kDot ? 1e30 : 1e15;
    length = norm <= most ? static_cast<float>(norm / divisor * (1 + 0x1p-20)) : std::nanf("");
    if (!(norm <= most)) divisor = unit_score = 1;
  }
  // What a bound, in units of the query, must exceed for the exact score to exceed `score`.
  double limit(int64_t metric, float score) const {
    if (length != length) return -std::numeric_limits<double>::infinity();
    if (metric != kEuclidean || score == -std::numeric_limits<float>::infinity()) return score / unit_score;
    const double distance = score < 0 ? -static_cast<double>(score) : 0;
    const double square = norm * norm, other = distance * distance;
    if (score > 0) return std::numeric_limits<double>::infinity();
    return (square - other - 1e-15 * (square + other)) / (2 * unit_score);
  }
};

inline float float_below(double x) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  if (x == -std::numeric_limits<double>::infinity()) return -infinity;
  if (x == std::numeric_limits<double>::infinity()) return infinity;
  const double most = std::numeric_limits<float>::max();
  const float near = static_cast<float>(std::min(std::max(x, -most), most));
  return std::max(std::nextafter(std::nextafter(near, -infinity), -infinity), -static_cast<float>(most));
}

// Reducer: exclusive(q): only scores above it can enter; open(q): everything can; offer(q, row, score).
template <class Reducer>
class SearchScanner {
 public:
  SearchScanner(const SearchCorpus& corpus, const SearchRows& queries, int64_t count, Reducer& reducer)
      : kernel_(kernels().search), corpus_(corpus), rows_(queries), reducer_(reducer), hits_(new SearchHit[kHits]) {
    queries_.reserve(count);
    norms_.reserve(count);
    words_ = (queries.dim + kSearchGroup - 1) / kSearchGroup;
    if (corpus.codes != nullptr) codes_.resize(count * words_);
    base_ = corpus.codes != nullptr ? kCodes : kFloats;
    for (int64_t i = 0; i < count; ++i) {
      const float* row = queries.data + i * queries.stride;
      SearchQuery q(row, queries.dim, corpus.metric, kernel_);
      if (corpus.codes != nullptr && q.length == q.length) {
        q.codes = kernel_.quantize(row, queries.dim, q.divisor, q.norm > 0 ? corpus.center : nullptr, 1e-6,
                                   &codes_[i * words_]);
        q.center = kernel_.product(row, corpus.center, queries.dim) / q.divisor;
      }
      q.level = base_;
      queries_.push_back(q);
      norms_.push_back(q.norm < kSearchEps ? kSearchEps : q.norm);  // NaN stays
    }
    survivors_.resize(count);
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
    for (const SearchQuery& q : queries_) s.fallbacks += q.fell_back;
    return s;
  }

 private:
  enum Level { kCodes, kFloats, kExact };
  static constexpr int64_t kLongestStep = 1024;
  static constexpr int64_t kHits = 1 << 16;
  static constexpr int64_t kFewQueries = 12;  // below, a panel of floats is not worth making

  void visit(int64_t begin, int64_t end) {
    std::vector<uint32_t>* const lists[] = {&coded_, &floated_, &scored_};
    for (auto* list : lists) list->clear();
    for (size_t i = 0; i < queries_.size(); ++i) {
      const auto number = static_cast<uint32_t>(i);
      lists[reducer_.open(number) ? kExact : queries_[i].level]->push_back(number);
    }
    if (static_cast<int64_t>(floated_.size()) < kFewQueries) {
      scored_.insert(scored_.end(), floated_.begin(), floated_.end());
      floated_.clear();
    }
    statistics_.pairs += static_cast<int64_t>(queries_.size()) * (end - begin);
    std::fill(survivors_.begin(), survivors_.end(), 0u);
    if (!coded_.empty()) pass(kCodes, coded_, begin, end);
    if (!floated_.empty()) pass(kFloats, floated_, begin, end);
    if (!scored_.empty()) score_all(begin, end);
  }

  // Queries of a pass side by side, in the pass's own units.
  void gather(Level level, const std::vector<uint32_t>& list) {
    const auto count = static_cast<int64_t>(list.size());
    const int64_t words = level == kCodes ? words_ : rows_.dim;
    packed_.resize(count * words);
    start_.resize(count);
    for (auto* values : {&length_, &error_, &center_, &tilt_, &square_, &limit_}) values->resize(count);
    for (int64_t n = 0; n < count; ++n) {
      const SearchQuery& q = queries_[list[n]];
      uint32_t* to = &packed_[n * words];
      double scale = 1, length = q.length;
      if (level == kCodes) {
        std::copy_n(&codes_[list[n] * words_], words_, to);
        scale = q.codes.scale > 0 ? q.codes.scale : 1;
        if (length == length) length = (q.codes.height + q.codes.residual) * (1 + 0x1p-20);
        error_[n] = static_cast<float>(q.codes.residual / scale * (1 + 0x1p-20));
        center_[n] = static_cast<float>(q.center / scale);
        start_[n] = -128 * q.codes.sum;
      } else {
        kernel_.unit(rows_.data + list[n] * rows_.stride, rows_.dim, q.divisor, reinterpret_cast<float*>(to));
        error_[n] = 0;
        center_[n] = 0;
      }
      length_[n] = static_cast<float>(length / scale);
      tilt_[n] = q.norm > 0 ? static_cast<float>(1 / scale) : 0.0f;
      square_[n] = static_cast<float>(1 / (q.unit_score * scale));
    }
    renew_limits(level, list);
  }

  void renew_limits(Level level, const std::vector<uint32_t>& list) {
    for (size_t n = 0; n < list.size(); ++n) {
      const SearchQuery& q = queries_[list[n]];
      const double scale = level == kCodes && q.codes.scale > 0 ? q.codes.scale : 1;
      limit_[n] = float_below(q.limit(corpus_.metric, reducer_.exclusive(list[n])) / scale);
    }
  }

  void pass(Level level, const std::vector<uint32_t>& list, int64_t begin, int64_t end) {
    gather(level, list);
    const auto count = static_cast<int64_t>(list.size());
    float factors[kSearchPassFactors * kSearchPanel];
    SearchScan p = {};
    p.words = level == kCodes ? words_ : rows_.dim;
    p.factors = factors;
    int64_t found = 0;
    for (int64_t row = begin; row < end; row += kSearchPanel) {
      p.row = row;
      p.panel =
          level == kCodes ? coded_panel(row, factors) : float_panel(row, std::min(end, row + kSearchPanel), factors);
      // As many queries at a time as the space for hits allows.
      for (int64_t first = 0; first < count;) {
        int64_t room = (kHits - found) / kSearchPanel;
        if (room < std::min(count - first, kHits / kSearchPanel / 2)) {
          flush(found, end);
          found = 0;
          room = kHits / kSearchPanel;
          renew_limits(level, list);
        }
        p.count = std::min(room, count - first);
        p.queries = packed_.data() + first * p.words;
        p.start = start_.data() + first;
        p.norm = length_.data() + first;
        p.error = error_.data() + first;
        p.center = center_.data() + first;
        p.tilt = tilt_.data() + first;
        p.square = corpus_.metric == kEuclidean ? square_.data() + first : nullptr;
        p.limit = limit_.data() + first;
        p.number = list.data() + first;
        found += (level == kCodes ? kernel_.scan_codes : kernel_.scan_floats)(p, hits_.get() + found);
        first += p.count;
      }
    }
    flush(found, end);
  }

  const uint32_t* coded_panel(int64_t row, float* factors) const {
    const int64_t panel = row / kSearchPanel;
    search_factors(corpus_.metric, corpus_.factors + panel * kSearchFactors * kSearchPanel, 0.0f, factors);
    return corpus_.codes + panel * words_ * kSearchPanel;
  }

  const uint32_t* float_panel(int64_t row, int64_t end, float* factors) {
    const int64_t dim = rows_.dim;
    units_.resize(kSearchPanel * dim);
    panel_.resize(kSearchPanel * dim);
    float plain[kSearchFactors * kSearchPanel] = {};
    for (int64_t j = 0; j < end - row; ++j) {
      const float* x = corpus_.rows.data + (row + j) * corpus_.rows.stride;
      const double norm = kernel_.norm(x, dim);
      plain[j] = 1;
      plain[kSearchNorm * kSearchPanel + j] = static_cast<float>(norm);
      kernel_.unit(x, dim, norm > 0 && norm <= std::numeric_limits<double>::max() ? norm : 1, &units_[j * dim]);
    }
    kernel_.panel(reinterpret_cast<const uint32_t*>(units_.data()), end - row, dim, 0, panel_.data());
    // Roundings of both units and of dim sums of products.
    search_factors(corpus_.metric, plain, static_cast<float>(dim + 16) * 0x1.1p-24f, factors);
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

  void flush(int64_t found, int64_t end) {
    constexpr int64_t chunk = 256;
    float scores[chunk];
    found = std::remove_if(hits_.get(), hits_.get() + found, [end](SearchHit h) { return h.row >= end; }) - hits_.get();
    statistics_.scored += found;
    for (int64_t first = 0; first < found; first += chunk) {
      const int64_t count = std::min(chunk, found - first);
      const SearchHit* hits = hits_.get() + first;
      kernel_.pairs(exact_, hits, count, scores);
      for (int64_t i = 0; i < count; ++i) {
        ++survivors_[hits[i].query];
        take(hits[i].query, hits[i].row, scores[i]);
      }
    }
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
          for (int64_t j = 0; j < rows; ++j) {
            if (reducer_.open(query) || !(own[j] <= reducer_.exclusive(query))) take(query, row + j, own[j]);
          }
        }
      }
    }
  }

  // Where more than a sixteenth of the rows survived codes, floats are faster; after an eighth, exact scores.
  void judge(int64_t rows) {
    for (const auto* list : {&coded_, &floated_}) {
      for (const uint32_t number : *list) {
        SearchQuery& q = queries_[number];
        if (survivors_[number] * (list == &coded_ ? 16 : 8) <= rows) continue;
        q.level = list == &coded_ ? kFloats : kExact;
        q.fell_back = true;
        q.climbed_until = steps_ + q.patience;
        q.patience *= 2;
      }
    }
    for (SearchQuery& q : queries_) {
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
  int base_ = kCodes;
  std::vector<SearchQuery> queries_;
  std::vector<double> norms_;
  std::vector<uint32_t> codes_, survivors_;
  std::vector<uint32_t> coded_, floated_, scored_;
  std::vector<uint32_t> packed_, panel_;
  std::vector<float> units_;
  std::vector<int32_t> start_;
  std::vector<float> length_, error_, center_, tilt_, square_, limit_;
  SearchStatistics statistics_;
};

}  // namespace sentfast::cpu
