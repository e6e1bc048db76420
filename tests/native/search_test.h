// Exact search on plain buffers: codes and their bounds, the first pass, and exact scores, against double loops.
#pragma once

#include "../../csrc/cpu/search_scan.h"
#include "similarity_test.h"

namespace check {

inline double true_score(const float* q, const float* k, int64_t dim, int64_t metric) {
  double dot = 0, query = 0, row = 0, square = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double a = q[d], b = k[d];
    dot += a * b;
    query += a * a;
    row += b * b;
    square += (a - b) * (a - b);
  }
  if (metric == kDot) return dot;
  if (metric == kEuclidean) return -std::sqrt(square);
  return dot / std::fmax(std::sqrt(query), kSearchEps) / std::fmax(std::sqrt(row), kSearchEps);
}

// Keeps every score above a fixed limit.
struct Kept {
  static constexpr bool rises = false;
  float limit;
  std::vector<std::vector<std::pair<int64_t, float>>> found;
  float exclusive(uint32_t) const { return limit; }
  bool open(uint32_t) const { return limit == -INFINITY; }
  bool considers(uint32_t, int64_t) const { return true; }
  void offer(uint32_t q, int64_t row, float score) {
    if (score > limit) found[q].push_back({row, score});
  }
};

// A corpus packed as csrc/cpu/search_pack.cpp packs it, around a center that is near the rows or not.
struct PackedRows {
  SearchFormat format;
  Buffer<uint32_t> codes;
  Buffer<float> factors, center;

  PackedRows(SearchFormat f, const Buffer<float>& rows, int64_t count, int64_t dim, int64_t stride)
      : format(f),
        codes((count + 63) / 64 * kSearchPanel * words(dim)),
        factors((count + 63) / 64 * kSearchFactors * kSearchPanel),
        center(random<float>(dim)) {
    const SearchKernels& kernel = kernels().search;
    if (integer(0, 1) == 0) std::copy_n(rows.get(), dim, center.get());
    const double length = kernel.norm(center.get(), dim), wanted = integer(0, 2) == 0 ? 0 : 0.999;
    for (int64_t d = 0; d < dim; ++d) center[d] = static_cast<float>(center[d] / length * wanted);
    const double square = kernel.product(center.get(), center.get(), dim);
    for (int64_t first = 0; first < count; first += kSearchPanel) {
      const int64_t size = std::min(kSearchPanel, count - first);
      const Buffer<uint32_t> lines(size * words(dim));
      float* out = factors.get() + first * kSearchFactors;
      std::fill_n(out, kSearchFactors * kSearchPanel, 0.0f);
      for (int64_t j = 0; j < size; ++j) {
        uint32_t* line = lines.get() + j * words(dim);
        search_pack_row(format, rows.get() + (first + j) * stride, dim, center.get(), square, line, out + j);
        const double norm = kernel.norm(rows.get() + (first + j) * stride, dim);
        double off = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const double near = static_cast<double>(out[j]) * code(line, d);
          off += std::pow(rows[(first + j) * stride + d] / norm - center[d] - near, 2);
        }
        close("search, residual", out[kSearchResidual * kSearchPanel + j], std::sqrt(off), 1e-5);
      }
      kernel.panel(lines.get(), words(dim), size, words(dim), kSearchFlip[format], codes.get() + first * words(dim));
    }
  }
  int64_t words(int64_t dim) const { return (dim + kSearchGroup[format] - 1) / kSearchGroup[format]; }
  double code(const uint32_t* line, int64_t d) const {
    if (format == kSearchInt8) return reinterpret_cast<const int8_t*>(line)[d];
    const uint32_t bits = static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(line)[d]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

inline void test_search() {
  // Long enough for queries to change to coarse codes, now and then.
  const bool is_long = integer(0, 7) == 0;
  const int64_t count = is_long ? integer(2000, 6000) : integer(1, 300), queries = integer(1, is_long ? 8 : 40);
  const int64_t dim = integer(1, 90), stride = dim + integer(0, 3);
  const Buffer<float> rows = random<float>((count - 1) * stride + dim), some = random<float>(queries * dim);
  if (integer(0, 3) == 0) {  // codes and sums of codes as large as they can be
    for (int64_t i = 0; i < (count - 1) * stride + dim; ++i) rows[i] = rows[i] > 0 ? 1.0f : -1.0f;
    for (int64_t i = 0; i < queries * dim; ++i) some[i] = some[i] > 0 || integer(0, 1) == 0 ? 1.0f : -1.0f;
  }
  const int64_t metric = integer(kCosine, kEuclidean);
  const auto format = static_cast<SearchFormat>(integer(kSearchInt8, kSearchFp32));
  const PackedRows packed(format == kSearchFp32 ? kSearchInt8 : format, rows, count, dim, stride);
  SearchCorpus corpus = {{rows.get(), stride, dim}, count, metric, format, packed.codes.get(), packed.factors.get(),
                         packed.center.get()};
  if (format == kSearchFp32) corpus.codes = nullptr, corpus.factors = corpus.center = nullptr;
  Kept kept;
  kept.limit = -INFINITY;
  if (integer(0, 5) != 0) {  // the best of some, so that few are above it where the scan is long
    for (int64_t n = integer(1, is_long ? 2000 : 3); n > 0; --n) {
      const float* query = some.get() + integer(0, queries - 1) * dim;
      const double score = true_score(query, rows.get() + integer(0, count - 1) * stride, dim, metric);
      kept.limit = std::fmax(kept.limit, static_cast<float>(score));
    }
  }
  kept.found.resize(static_cast<size_t>(queries));
  const bool small_first = integer(0, 1) == 0;
  in_threads(queries, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    Kept own = {kept.limit, std::vector<std::vector<std::pair<int64_t, float>>>(static_cast<size_t>(end - begin))};
    SearchScanner<Kept> scanner(corpus, {some.get() + begin * dim, dim, dim}, end - begin, own);
    scanner.run(0, count, small_first);
    for (int64_t i = begin; i < end; ++i)
      kept.found[static_cast<size_t>(i)] = own.found[static_cast<size_t>(i - begin)];
  });
  for (int64_t i = 0; i < queries; ++i) {
    const auto& found = kept.found[static_cast<size_t>(i)];
    size_t next = 0;
    for (int64_t j = 0; j < count; ++j) {
      const double want = true_score(some.get() + i * dim, rows.get() + j * stride, dim, metric);
      const bool there = next < found.size() && found[next].first == j;
      close("search, kept", there, static_cast<float>(want) > kept.limit, 0);
      if (there) close("search, score", found[next++].second, want, 1e-7);
    }
  }
}

}  // namespace check
