// The encoder's steps that go row by row: embedding, layer norm, rotation, gate, conversion.

namespace layers {

template <class T>
void embed(const Embed& p, int64_t begin, int64_t end) {
  const T* words = static_cast<const T*>(p.words);
  const T* positions = static_cast<const T*>(p.positions);
  const T* types = static_cast<const T*>(p.token_types);
  for (int64_t i = begin; i < end; ++i) {
    const T* word = words + p.ids[i] * p.dim;
    const T* position = positions != nullptr ? positions + p.position_ids[i] * p.dim : nullptr;
    const T* type =
        types != nullptr ? types + (p.token_type_ids != nullptr ? p.token_type_ids[i] : 0) * p.dim : nullptr;
    float* out = p.out + i * p.dim;
    each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE {
      Vec x = load(word + d, k);
      if (type != nullptr) x = x + load(type + d, k);
      if (position != nullptr) x = x + load(position + d, k);
      store(x, out + d, k);
    });
  }
}

inline void layer_norm_row(const LayerNorm& p, int64_t row) {
  const float* y = p.y + row * p.dim;
  const float* residual = p.residual != nullptr ? p.residual + row * p.dim : nullptr;
  const auto sum_at = [&](int64_t d, auto k) SENTFAST_INLINE {
    const Vec x = load(y + d, k);
    return residual != nullptr ? x + load(residual + d, k) : x;
  };
  Vec mean = Vec::zero(), scale = Vec::fill(1.0f);
  if (p.weight != nullptr) {
    Vec total = Vec::zero(), squares = Vec::zero();
    each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE { total = total + only(sum_at(d, k), k); });
    const float n = static_cast<float>(p.dim);
    mean = Vec::fill(total.sum() / n);
    each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE {
      const Vec x = only(sum_at(d, k) - mean, k);
      squares = Vec::fma(x, x, squares);
    });
    scale = Vec::fill(1.0f / __builtin_sqrtf(squares.sum() / n + p.eps));
  }
  each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE {
    Vec x = sum_at(d, k);
    if (p.sum_out != nullptr) store(x, p.sum_out + row * p.dim + d, k);
    if (p.weight != nullptr) {
      x = (x - mean) * scale;
      const Vec weight = load(p.weight + d, k);
      x = p.bias != nullptr ? Vec::fma(x, weight, load(p.bias + d, k)) : x * weight;
    }
    if (p.normed != nullptr) store(x, p.normed + row * p.dim + d, k);
    if (p.normed_bfloat16 != nullptr) store(x, p.normed_bfloat16 + row * p.dim + d, k);
  });
}

inline void layer_norm(const LayerNorm& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) layer_norm_row(p, i);
}

template <class T>
void rotate_head(T* x, const float* table, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  each_vector(half, [&](int64_t d, auto k) SENTFAST_INLINE {
    const Vec real = load(x + d, k), imaginary = load(x + half + d, k);
    const Vec cosine = load(table + d, k), sine = load(table + half + d, k);
    store(real * cosine - imaginary * sine, x + d, k);
    store(imaginary * cosine + real * sine, x + half + d, k);
  });
}

template <class T>
void rotate(const Rotate& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* row = static_cast<T*>(p.qkv) + i * p.stride;
    const float* table = p.table + p.position_ids[i] * p.head_dim;
    for (int64_t head = 0; head < 2 * p.heads; ++head) rotate_head(row + head * p.head_dim, table, p.head_dim);
  }
}

template <class T>
void gate(const Gate& p, int64_t begin, int64_t end) {
  constexpr bool exact = sizeof(T) == 4;
  math::with_activation<exact>(p.activation, [&](auto a) {
    for (int64_t i = begin; i < end; ++i) {
      T* row = static_cast<T*>(p.x) + i * p.stride;
      each_vector(p.dim, [&](int64_t d, auto k) SENTFAST_INLINE {
        store(decltype(a)::of(load(row + d, k)) * load(row + p.dim + d, k), row + d, k);
      });
    }
  });
}

template <class T>
void narrow(const float* from, void* to, int64_t count) {
  T* out = static_cast<T*>(to);
  each_vector(count, [&](int64_t d, auto k) SENTFAST_INLINE { store(load(from + d, k), out + d, k); });
}

}  // namespace layers
