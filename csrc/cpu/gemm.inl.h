// The inner loop of every matrix product: the sums of R rows by V vectors of columns stay in registers.
//
// A Word is what one step multiplies: a float32, or a pair of bf16 whose two products are both added.

namespace gemm {

struct Float32Step {
  using Element = float;
  static constexpr int depth = 1;  // elements in a Word
  static SENTFAST_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return Vec::fma(a, b, c); }
};

// Without an instruction for it.
struct WideBFloat16Step {
  using Element = BFloat16;
  static constexpr int depth = 2;
  static SENTFAST_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
    return Vec::fma(Vec::high_half(a), Vec::high_half(b), Vec::fma(Vec::low_half(a), Vec::low_half(b), c));
  }
};

// sum[i][j] += a[i][s] * b[s][j]; rows of a and of b are stride_a and stride_b Words apart.
template <class Step, int R, int V>
SENTFAST_INLINE inline void accumulate(Vec (&sum)[R][V], const Word* a, int64_t stride_a, const Word* b,
                                       int64_t stride_b, int64_t steps) {
  for (int64_t s = 0; s < steps; ++s, b += stride_b) {
    Vec column[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) column[j] = Vec::load(reinterpret_cast<const AliasedFloat*>(b) + j * Vec::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vec x = Vec::broadcast(a + i * stride_a + s);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) sum[i][j] = Step::multiply_add(x, column[j], sum[i][j]);
    }
  }
}

// `steps` Words of each of `rows` rows, `stride` apart, become the steps of a panel: word (step, row) goes to
// panel[step][row], steps being `panel_stride` apart. Up to `width`, a multiple of a vector, missing rows are zero.
// Squares of a vector's width are turned.
inline void turn(const Word* from, int64_t stride, int64_t rows, int64_t steps, int64_t width, Word* panel,
                 int64_t panel_stride = kPanel) {
  const auto* words = reinterpret_cast<const AliasedFloat*>(from);
  auto* out = reinterpret_cast<AliasedFloat*>(panel);
  for (int64_t row = 0; row < width; row += Vec::lanes) {
    each_vector(steps, [&](int64_t s, auto k) SENTFAST_INLINE {
      Vec square[Vec::lanes];
#pragma GCC unroll 16
      for (int i = 0; i < Vec::lanes; ++i) {
        square[i] = row + i < rows ? load<float>(words + (row + i) * stride + s, k) : Vec::zero();
      }
      Vec::transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < Vec::lanes; ++i) {
        if (s + i < steps) square[i].store(out + (s + i) * panel_stride + row);
      }
    });
  }
}

// A number that is known when the program is compiled.
template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls f(Count<n>{}) with n = wanted, but at most N and never more than was asked for: what f touches is as wide.
template <int N, class F>
SENTFAST_INLINE inline void with_count(int64_t wanted, F f) {
  if constexpr (N > 1) {
    if (wanted < N) return with_count<N - 1>(wanted, f);
  }
  f(Count<N>{});
}

// Of the rows that are left, as many as a tile has.
template <class F>
SENTFAST_INLINE inline void with_rows(int64_t left, F f) {
  with_count<Vec::tile_rows>(left, f);
}

// Of the vectors of columns that are left, as many as a tile has.
template <class F>
SENTFAST_INLINE inline void with_vectors(int64_t left, F f) {
  with_count<Vec::tile_vectors>(left, f);
}

}  // namespace gemm
