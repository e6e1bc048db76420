// Contrastive loss of rows of scores, which become the gradient where they lie.
//
// A row is read four times, from the first caches after the first: what is left out is marked with -inf, the largest
// logit, the exponentials and their sum, the gradient. Plain products are first made into scores, in a place of their
// own: the next prefix continues them.
namespace losses {

constexpr float kInfinity = __builtin_inff();
// Columns whose exponentials are summed in float32 before they are added in double.
constexpr int64_t kSumColumns = 2048;

// x where lanes exist, `value` in the others.
inline Vec or_else(Vec x, Full, Vec) { return x; }
inline Vec or_else(Vec x, Tail k, Vec value) { return Vec::select(Vec::first_lanes(k.count), x, value); }

inline void scale_products(const ContrastiveSegment& s, int64_t i) {
  const float* products = s.products + i * s.columns;
  float* scores = s.scores + i * s.columns;
  const Vec factor = Vec::fill(s.row_scale[i]);
  each_vector(s.columns, [&](int64_t j, auto k) SENTFAST_INLINE {
    store(load(products + j, k) * factor * load(s.column_scale + j, k), scores + j, k);
  });
}

// Calls f(column) for the first own column of row i and every one after it.
template <class F>
SENTFAST_INLINE inline void each_own(const ContrastiveSegment& s, int64_t i, F f) {
  for (int64_t j = s.own + i; j < s.columns; j += s.period) f(j);
}

// Marks what the guide takes for positives, and duplicates.
inline void mark(const ContrastiveSegment& s, int64_t i, float limit) {
  float* scores = s.scores + i * s.columns;
  const float* guide = s.guide != nullptr ? s.guide + i * s.columns : nullptr;
  const int32_t own_id = s.ids != nullptr ? s.ids[s.own + i] : 0;
  const Vec hidden = Vec::fill(-kInfinity), most = Vec::fill(limit);
  each_vector(s.columns, [&](int64_t j, auto k) SENTFAST_INLINE {
    Vec x = load(scores + j, k);
    if (guide != nullptr) {
      const Vec g = load(guide + j, k);
      x = Vec::select(Vec::unordered(g, g), x, Vec::select(Vec::above(g, most), hidden, x));
    }
    if (s.ids != nullptr) {
      const auto ids = Vec::load_index(s.ids + j, k.count);
      x = Vec::select(Vec::equal(ids, own_id), hidden, x);
    }
    store(x, scores + j, k);
  });
}

inline void leave_out(const ContrastiveSegment& s, int64_t i, float limit) {
  const bool marked = s.guide != nullptr || s.ids != nullptr;
  if (s.positive && !marked) return;
  float* scores = s.scores + i * s.columns;
  const int64_t own = s.own + i;
  const float kept = scores[own];
  if (marked) mark(s, i, limit);
  if (s.positive) {
    scores[own] = kept;
  } else if (s.guide != nullptr) {
    scores[own] = s.guide[i * s.columns + own] > limit ? -kInfinity : kept;
  } else {
    each_own(s, i, [&](int64_t j) { scores[j] = -kInfinity; });
  }
}

// The factor that makes a logit of a row's own column j.
inline float own_factor(const ContrastiveSegment& s, int64_t i, int64_t j) {
  return j == s.own + i ? s.positive_factor : s.negatives_factor;
}

// Scales the own columns so that one factor makes logits of them all.
inline void even_out(const ContrastiveSegment& s, int64_t i) {
  if (s.positive_factor == s.factor && s.negatives_factor == s.factor) return;
  float* scores = s.scores + i * s.columns;
  each_own(s, i, [&](int64_t j) { scores[j] *= own_factor(s, i, j) / s.factor; });
}

inline float largest(const float* x, int64_t n) {
  const Vec none = Vec::fill(-kInfinity);
  Vec even = none, odd = none;
  int64_t j = 0;
  for (; j + 2 * Vec::lanes <= n; j += 2 * Vec::lanes) {
    even = Vec::max(even, Vec::load(x + j));
    odd = Vec::max(odd, Vec::load(x + j + Vec::lanes));
  }
  each_vector(n - j,
              [&](int64_t e, auto k) SENTFAST_INLINE { even = Vec::max(even, or_else(load(x + j + e, k), k, none)); });
  float lane[Vec::lanes], most = -kInfinity;
  Vec::max(even, odd).store(lane);
  for (int i = 0; i < Vec::lanes; ++i) most = lane[i] > most ? lane[i] : most;
  return most;
}

// exp(x * factor - shift), 0 where a float32 has no full precision left.
struct Exponential {
  Vec factor, shift;
  SENTFAST_INLINE Vec operator()(Vec x) const {
    const Vec t = Vec::fma(x, factor, shift) * Vec::fill(math::kLog2E);
    const Vec power = math::exp2<true>(Vec::min(Vec::fill(128.0f), t));
    return Vec::select(Vec::above(t, Vec::fill(-126.0f)), power, Vec::zero());
  }
};

struct Sums {
  double exponentials = 0, moments = 0;  // sum of e, of e times the similarity
};

// Sums the exponentials of a row; with Store they replace the scores.
template <bool Store>
void add_exponentials(const ContrastiveSegment& s, int64_t i, float shift, Sums& sums) {
  float* scores = s.scores + i * s.columns;
  const Exponential exponential = {Vec::fill(s.factor), Vec::fill(-shift)};
  if (Store && (s.positive_factor != s.factor || s.negatives_factor != s.factor)) {
    // Their moments count the similarities from before even_out.
    each_own(s, i, [&](int64_t j) {
      float lane[Vec::lanes];
      exponential(Vec::fill(scores[j])).store(lane);
      const float before = scores[j] * (s.factor / own_factor(s, i, j));
      if (lane[0] != 0.0f) sums.moments += static_cast<double>(lane[0]) * (before - scores[j]);
    });
  }
  for (int64_t begin = 0; begin < s.columns; begin += kSumColumns) {
    const int64_t count = s.columns - begin < kSumColumns ? s.columns - begin : kSumColumns;
    float* x = scores + begin;
    Vec sum[2] = {Vec::zero(), Vec::zero()}, moment[2] = {Vec::zero(), Vec::zero()};
    const auto step = [&](int64_t j, auto k, int turn) SENTFAST_INLINE {
      const Vec score = load(x + j, k), e = only(exponential(score), k);
      sum[turn] = sum[turn] + e;
      if constexpr (Store) {
        // Where e is 0 the score may be -inf.
        moment[turn] = Vec::fma(e, Vec::select(Vec::above(e, Vec::zero()), score, Vec::zero()), moment[turn]);
        store(e, x + j, k);
      }
    };
    int64_t j = 0;
    for (; j + 2 * Vec::lanes <= count; j += 2 * Vec::lanes) {
      step(j, Full{}, 0);
      step(j + Vec::lanes, Full{}, 1);
    }
    each_vector(count - j, [&](int64_t e, auto k) SENTFAST_INLINE { step(j + e, k, 0); });
    sums.exponentials += (sum[0] + sum[1]).sum();
    if (Store) sums.moments += (moment[0] + moment[1]).sum();
  }
}

// Exponentials become derivatives by the plain products: their part of the total, and for the positive one less. That
// difference is taken before the division, so a row with no other candidate has a gradient of exactly zero.
inline void differentiate(const ContrastiveSegment& s, int64_t i, double total, float weight, bool with_positive) {
  float* x = s.scores + i * s.columns;
  if (s.row_scale != nullptr) weight *= s.row_scale[i];
  const Vec factor = Vec::fill(static_cast<float>(1.0 / total) * weight);
  const int64_t own = s.own + i;
  float positive = with_positive ? static_cast<float>((x[own] - total) / total) * weight : 0.0f;
  if (s.column_scale != nullptr) {
    each_vector(s.columns, [&](int64_t j, auto k) SENTFAST_INLINE {
      store(load(x + j, k) * factor * load(s.column_scale + j, k), x + j, k);
    });
    positive *= with_positive ? s.column_scale[own] : 0.0f;
  } else {
    each_vector(s.columns, [&](int64_t j, auto k) SENTFAST_INLINE { store(load(x + j, k) * factor, x + j, k); });
  }
  if (with_positive) x[own] = positive;
}

inline float limit_of(const Contrastive& p, int64_t i) {
  const ContrastiveSegment& first = p.segments[0];
  if (first.guide == nullptr) return 0.0f;
  const float positive = first.guide[i * first.columns + first.own + i];
  return positive - (p.relative ? __builtin_fabsf(positive) * p.margin : p.margin);
}

template <bool Gradient>
void row(const Contrastive& p, int64_t i) {
  const float limit = limit_of(p, i);
  for (int64_t n = 0; n < p.segment_count; ++n) {
    if (p.segments[n].products != nullptr) scale_products(p.segments[n], i);
  }
  float shift[kContrastiveSegments];
  for (int g = 0; g < kContrastiveSegments; ++g) shift[g] = -kInfinity;
  const ContrastiveSegment& first = p.segments[0];
  const float similarity = first.scores[i * first.columns + first.own + i];
  for (int64_t n = 0; n < p.segment_count; ++n) {
    const ContrastiveSegment& s = p.segments[n];
    leave_out(s, i, limit);
    even_out(s, i);
    const float top = s.factor * largest(s.scores + i * s.columns, s.columns);
    if (top > shift[s.group]) shift[s.group] = top;
  }
  // In double, as the logarithm is: of a small loss nothing is lost in their difference.
  const double positive = static_cast<double>(first.factor) * first.scores[i * first.columns + first.own + i];
  Sums sums[kContrastiveSegments];
  for (int g = 0; g < kContrastiveSegments; ++g) {
    if (!(__builtin_fabsf(shift[g]) < kInfinity)) shift[g] = 0.0f;
  }
  for (int64_t n = 0; n < p.segment_count; ++n) {
    const ContrastiveSegment& s = p.segments[n];
    add_exponentials<Gradient>(s, i, shift[s.group], sums[s.group]);
  }
  const double groups = static_cast<double>(p.group_count);
  double log_sum = 0, slope = 0;
  for (int64_t g = 0; g < p.group_count; ++g) {
    log_sum += (shift[g] + __builtin_log(sums[g].exponentials)) / groups;
    slope += sums[g].moments / sums[g].exponentials / groups;
  }
  p.losses[i] = static_cast<float>(log_sum - positive);
  if constexpr (Gradient) {
    p.slopes[i] = static_cast<float>(slope - similarity);
    const float weight = p.weights[i] * p.scale;
    for (int64_t n = 0; n < p.segment_count; ++n) {
      const ContrastiveSegment& s = p.segments[n];
      differentiate(s, i, sums[s.group].exponentials * groups, weight, n == 0);
    }
  }
}

inline void contrastive(const Contrastive& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    p.weights != nullptr ? row<true>(p, i) : row<false>(p, i);
  }
}

inline void moments(const Moments& p, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kMomentColumns, left = p.columns - first;
    const int64_t count = left < kMomentColumns ? left : kMomentColumns;
    float* column_sums = p.column_sums + first;
    fill(column_sums, count, 0.0f);
    for (int64_t i = 0; i < p.rows; ++i) {
      const float *a = p.a + i * p.columns + first, *b = p.b + i * p.columns + first;
      Vec sum = Vec::zero();
      each_vector(count, [&](int64_t j, auto k) SENTFAST_INLINE {
        const Vec product = load(a + j, k) * load(b + j, k);
        sum = sum + only(product, k);
        store(load(column_sums + j, k) + product, column_sums + j, k);
      });
      p.row_sums[panel * p.rows + i] = sum.sum();
    }
  }
}

// How much of x is in the gradient to which only its norm's factor was applied. Below eps the norm is a constant.
template <class T>
float along(const Project& p, const T* x, const float* gradient, int64_t i) {
  if (p.along != nullptr) return p.along[i];
  if (p.norm == nullptr || p.norm[i] < p.eps) return 0.0f;
  return rows::dot(x, gradient, p.dim) / p.norm[i] / p.norm[i];
}

template <class T>
void project(const Project& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = rows::row<T>(p.x, i);
    const float* gradient = rows::row<float>(p.gradient, i);
    T* out = static_cast<T*>(p.out) + i * p.stride_out;
    const float part = along(p, x, gradient, i);
    const Vec factor = Vec::fill(part);
    if (part == 0.0f) {  // 0 * inf must not make NaN
      each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE { store(load(gradient + d, k), out + d, k); });
    } else {
      each_vector(p.dim, [&](int64_t d, auto k)
                             SENTFAST_INLINE { store(load(gradient + d, k) - factor * load(x + d, k), out + d, k); });
    }
  }
}

}  // namespace losses
