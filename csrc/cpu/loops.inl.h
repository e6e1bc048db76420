// What every loop over a row is made of: full vectors, then one partial vector.

#define SENTFAST_INLINE __attribute__((always_inline))

// The compiler must take a register's value for unknown here: nothing that depends on it can be worked out before. The
// letter is the class of registers; clang puts the wide ones into `v` only.
#if defined(SENTFAST_PLAIN)  // an array, which fits no register
#define SENTFAST_UNKNOWN(x) asm volatile("" : "+m"(x))
#elif defined(__aarch64__)
#define SENTFAST_UNKNOWN(x) asm volatile("" : "+w"(x))
#elif defined(SENTFAST_EMULATED)  // by tests/native/avx512, where no register is as wide
#define SENTFAST_UNKNOWN(x) asm volatile("" : "+m"(x))
#elif defined(__AVX512F__)
#define SENTFAST_UNKNOWN(x) asm volatile("" : "+v"(x))
#else
#define SENTFAST_UNKNOWN(x) asm volatile("" : "+x"(x))
#endif

struct Full {
  static constexpr int count = Vec::lanes;
};
struct Tail {
  int count;
};

template <class T>
Vec load(const T* p, Full) {
  return Vec::load(p);
}
template <class T>
Vec load(const T* p, Tail k) {
  return Vec::load(p, k.count);
}
template <class T>
void store(Vec x, T* p, Full) {
  x.store(p);
}
template <class T>
void store(Vec x, T* p, Tail k) {
  x.store(p, k.count);
}
// The lanes that exist; zero in the others.
inline Vec only(Vec x, Full) { return x; }
inline Vec only(Vec x, Tail k) { return Vec::select(Vec::first_lanes(k.count), x, Vec::zero()); }

// Calls f(d, Full) for every whole vector of [0, n) and f(d, Tail) for what is left.
template <class F>
SENTFAST_INLINE inline void each_vector(int64_t n, F f) {
  int64_t d = 0;
  for (; d + Vec::lanes <= n; d += Vec::lanes) f(d, Full{});
  if (d < n) f(d, Tail{static_cast<int>(n - d)});
}

// Asks for the line at p, which need not exist.
template <class T>
void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 3);
}

template <class T>
void fill(T* p, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

// Rows of scratch are this long, so that whole vectors may be read and written.
inline int64_t round_up(int64_t dim) { return (dim + 15) / 16 * 16; }

// max(x, low) that keeps NaN.
inline float at_least(float x, float low) { return x < low ? low : x; }

constexpr float kNormalizeEps = 1e-12f;
