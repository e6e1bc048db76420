// Dropout by a generator that counts: whether an element stays follows from its place alone, so the backward pass makes
// the same choice again and nothing is stored. Philox 4x32 with seven rounds (Salmon et al., "Parallel random numbers:
// as easy as 1, 2, 3", 2011). One counter serves four columns that lie sixteen apart: four whole vectors.

namespace dropout {

constexpr int64_t kBlock = 64;  // columns that sixteen counters serve
constexpr int kMasks = kBlock / Vec::lanes;

// The four numbers of each lane's counter.
inline void philox(const Dropout& p, Vec::Bits column, uint32_t row, uint32_t head, Vec::Bits (&x)[4]) {
  const Vec::Bits first = Vec::fill_bits(0xD2511F53u), second = Vec::fill_bits(0xCD9E8D57u);
  uint32_t key[2] = {static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32)};
  x[0] = column;
  x[1] = Vec::fill_bits(row);
  x[2] = Vec::fill_bits(head);
  x[3] = Vec::fill_bits(p.stream);
#pragma GCC unroll 7
  for (int round = 0; round < 7; ++round) {
    Vec::Bits high[2], low[2];
    Vec::multiply(x[0], first, &high[0], &low[0]);
    Vec::multiply(x[2], second, &high[1], &low[1]);
    x[0] = Vec::exclusive_or(Vec::exclusive_or(high[1], x[1]), Vec::fill_bits(key[0]));
    x[2] = Vec::exclusive_or(Vec::exclusive_or(high[0], x[3]), Vec::fill_bits(key[1]));
    x[1] = low[1];
    x[3] = low[0];
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
}

// Which of the 64 columns from `column`, a multiple of 64, stay.
inline void keep(const Dropout& p, int64_t row, int64_t head, int64_t column, Vec::Mask (&masks)[kMasks]) {
  constexpr int parts = 16 / Vec::lanes;
  const Vec::Bits limit = Vec::fill_bits(p.threshold);
#pragma GCC unroll 4
  for (int part = 0; part < parts; ++part) {
    Vec::Bits x[4];
    const auto counter = static_cast<uint32_t>(column / 4 + part * Vec::lanes);
    philox(p, Vec::count_from(counter), static_cast<uint32_t>(row), static_cast<uint32_t>(head), x);
#pragma GCC unroll 4
    for (int word = 0; word < 4; ++word) masks[word * parts + part] = Vec::reaches(x[word], limit);
  }
}

// f(d, k, mask) for each vector of columns [first, last), whose lanes in the mask stay; first: a multiple of 64.
template <class F>
SENTFAST_INLINE inline void each_mask(const Dropout& p, int64_t row, int64_t head, int64_t first, int64_t last, F f) {
  for (int64_t column = first; column < last; column += kBlock) {
    Vec::Mask masks[kMasks];
    keep(p, row, head, column, masks);
    each_vector(last - column < kBlock ? last - column : kBlock,
                [&](int64_t d, auto k) SENTFAST_INLINE { f(column + d, k, masks[d / Vec::lanes]); });
  }
}

// f(d, k, kept) for each vector of a row of n columns; kept(x) is x / (1 - p) where the column stays, else 0.
template <class F>
SENTFAST_INLINE inline void each_kept(const Dropout& p, int64_t row, int64_t n, F f) {
  if (p.threshold == 0) {
    each_vector(n, [&](int64_t d, auto k) SENTFAST_INLINE { f(d, k, [](Vec x) SENTFAST_INLINE { return x; }); });
    return;
  }
  const Vec scale = Vec::fill(p.scale);
  each_mask(p, row, 0, 0, n, [&](int64_t d, auto k, Vec::Mask mask) SENTFAST_INLINE {
    f(d, k, [&](Vec x) SENTFAST_INLINE { return Vec::select(mask, x * scale, Vec::zero()); });
  });
}

// y = dropout(x); a row of the mask is a row of x.
template <class T>
void dropout(const DropoutRows& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(p.x.data) + i * p.x.stride;
    T* y = static_cast<T*>(p.y) + i * p.dim;
    each_kept(p.dropout, i, p.dim,
              [&](int64_t d, auto k, auto kept) SENTFAST_INLINE { store(kept(load(x + d, k)), y + d, k); });
  }
}

}  // namespace dropout
