// y = activation(x w^T + bias) with a weight that lies in rows, such as the model's own.
//
// Turning parts of the weight into panels would cost as much as multiplying them with three to six rows, again for
// every group of rows. So the rows of x stand side by side in vectors instead, which is a smaller copy, and a number of
// the weight is read where it is, for whole vectors of rows. A sum goes through its steps in the same order and in the
// same parts as with a panel: its bits depend neither on the number of rows nor on where the weight lies.

namespace linear {

// Features whose sums a tile holds with V vectors of rows.
template <int V>
constexpr int kFeatures = Vec::tile_rows * Vec::tile_vectors / V > 4 ? Vec::tile_rows * Vec::tile_vectors / V : 4;

// Rows of x side by side: x[step][row] for at most V vectors of rows.
struct Turned {
  int64_t row, rows;
  const float* x;
};

// Rows of the weight, `stride` apart, of which steps [begin, begin + count) are multiplied. Meanwhile what is needed
// next comes into the second cache: as many rows, as far apart, from `next` on; nullptr: nothing.
struct InPlace {
  const float *weight, *next;
  int64_t stride, begin, count;
};

// sums[o] += of V vectors of rows with feature o.
template <int V, int O>
SENTFAST_INLINE inline void in_place_tile(const InPlace& f, const float* x, float* sums) {
  Vec sum[O][V];
#pragma GCC unroll 32
  for (int o = 0; o < O; ++o) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sum[o][j] = Vec::zero();
  }
  constexpr int64_t line = 16;
  const float* weight = f.weight;
  for (int64_t s = 0; s < f.count; s += line) {
    const int64_t stop = s + line < f.count ? s + line : f.count;
    if (f.next != nullptr) {
#pragma GCC unroll 32
      for (int o = 0; o < O; ++o) __builtin_prefetch(f.next + s + o * f.stride, 0, 2);
    }
    for (int64_t t = s; t < stop; ++t, ++weight, x += V * Vec::lanes) {
      Vec column[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) column[j] = Vec::load(x + j * Vec::lanes);
#pragma GCC unroll 32
      for (int o = 0; o < O; ++o) {
        const Vec w = Vec::broadcast(reinterpret_cast<const Word*>(weight + o * f.stride));
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sum[o][j] = Vec::fma(w, column[j], sum[o][j]);
      }
    }
  }
#pragma GCC unroll 32
  for (int o = 0; o < O; ++o) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      float* to = sums + (o * V + j) * Vec::lanes;
      (f.begin == 0 ? sum[o][j] : sum[o][j] + Vec::load(to)).store(to);
    }
  }
}

// All of `features` rows of the weight.
template <int V>
inline void in_place_part(InPlace f, int64_t features, const float* x, float* sums) {
  const auto tiles = [&](auto count) SENTFAST_INLINE {
    constexpr int O = decltype(count)::value;
    for (; features >= O; features -= O) {
      in_place_tile<V, O>(f, x + f.begin * V * Vec::lanes, sums);
      f.weight += O * f.stride;
      if (f.next != nullptr) f.next += O * f.stride;
      sums += O * V * Vec::lanes;
    }
  };
  tiles(gemm::Count<kFeatures<V>>{});
  tiles(gemm::Count<4>{});
  tiles(gemm::Count<1>{});
}

// y of some features from their sums, whose vectors of rows are turned into rows of features.
template <class A>
inline void finish_in_place(const Linear& p, const Turned& t, int64_t vectors, int64_t feature, int64_t features,
                            const float* sums) {
  for (int64_t j = 0; j < vectors; ++j) {
    const int64_t first = j * Vec::lanes, rows = t.rows - first < Vec::lanes ? t.rows - first : Vec::lanes;
    each_vector(features, [&](int64_t d, auto k) SENTFAST_INLINE {
      Vec square[Vec::lanes];
#pragma GCC unroll 16
      for (int o = 0; o < Vec::lanes; ++o) {
        square[o] = o < k.count ? Vec::load(sums + ((d + o) * vectors + j) * Vec::lanes) : Vec::zero();
      }
      Vec::transpose(square);
      alignas(64) float turned[Vec::lanes][Vec::lanes];
#pragma GCC unroll 16
      for (int i = 0; i < Vec::lanes; ++i) square[i].store(turned[i]);
      for (int64_t i = 0; i < rows; ++i) {
        Vec value = Vec::load(turned[i]);
        if (p.bias != nullptr) value = value + load(p.bias + feature + d, k);
        store(A::of(value), static_cast<float*>(p.y) + (t.row + first + i) * p.stride_y + feature + d, k);
      }
    });
  }
}

// V vectors of rows by some features. The first strip to read them asks for the next ones.
template <int V>
inline void in_place_strip(const Linear& p, const Turned& t, bool ahead, int64_t feature, int64_t features,
                           float* sums) {
  const int64_t parts = (p.depth + kBlockSteps - 1) / kBlockSteps, size = (p.depth + parts - 1) / parts;
  const float* weight = static_cast<const float*>(p.weight) + feature * p.stride_weight;
  for (int64_t begin = 0; begin < p.depth; begin += size) {
    const bool last = begin + size >= p.depth;
    const float* next = last ? weight + features * p.stride_weight : weight + begin + size;
    in_place_part<V>({weight + begin, ahead ? next : nullptr, p.stride_weight, begin, last ? p.depth - begin : size},
                     features, t.x, sums);
  }
  math::with_activation<true>(p.activation,
                              [&](auto a) { finish_in_place<decltype(a)>(p, t, V, feature, features, sums); });
}

// Calls f(Count<V>{}, strip) for strips of one to three vectors of the rows [begin, end), whose columns are `turned`.
template <class F>
SENTFAST_INLINE inline void each_strip(int64_t depth, int64_t begin, int64_t end, float* turned, F f) {
  constexpr int64_t lanes = Vec::lanes;
  for (int64_t row = begin; row < end;) {
    const int64_t left = (end - row + lanes - 1) / lanes, vectors = left <= 3 ? left : 2;
    const int64_t rows = end - row < vectors * lanes ? end - row : vectors * lanes;
    const Turned strip = {row, rows, turned};
    if (vectors == 1) f(gemm::Count<1>{}, strip, turned);
    if (vectors == 2) f(gemm::Count<2>{}, strip, turned);
    if (vectors == 3) f(gemm::Count<3>{}, strip, turned);
    row += rows;
    turned += vectors * lanes * depth;
  }
}

inline void in_place_rows(const Linear& p, int64_t begin, int64_t end, const LinearBlock& b) {
  float *sums = b.scratch, *turned = sums + kInPlaceFeatures * 3 * Vec::lanes;
  each_strip(p.depth, begin, end, turned, [&](auto v, const Turned& t, float* to) {
    const auto* x = static_cast<const float*>(p.x) + t.row * p.stride_x;
    constexpr int64_t width = decltype(v)::value * Vec::lanes;
    gemm::turn(reinterpret_cast<const Word*>(x), p.stride_x, t.rows, p.depth, width, reinterpret_cast<Word*>(to),
               width);
  });
  const int64_t last = b.panel_end * kPanel < p.columns ? b.panel_end * kPanel : p.columns;
  for (int64_t feature = b.panel_begin * kPanel; feature < last; feature += kInPlaceFeatures) {
    const int64_t features = last - feature < kInPlaceFeatures ? last - feature : kInPlaceFeatures;
    each_strip(p.depth, begin, end, turned, [&](auto v, const Turned& t, float*) {
      in_place_strip<decltype(v)::value>(p, t, t.row == begin, feature, features, sums);
    });
  }
}

// Blocks of rows of about the same size, whole strips of two vectors.
inline void in_place(const Linear& p, const LinearBlock& b) {
  constexpr int64_t strip = 2 * Vec::lanes;
  const int64_t rows = b.row_end - b.row_begin, blocks = (rows + kInPlaceRows - 1) / kInPlaceRows;
  const int64_t size = blocks == 0 ? 0 : ((rows + blocks - 1) / blocks + strip - 1) / strip * strip;
  for (int64_t begin = b.row_begin; begin < b.row_end; begin += size) {
    in_place_rows(p, begin, begin + size < b.row_end ? begin + size : b.row_end, b);
  }
}

}  // namespace linear
