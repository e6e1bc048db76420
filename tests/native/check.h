// Exact-size buffers, random numbers and a comparison for the stand-alone kernel tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/isa.h"

namespace check {

using namespace sentfast::cpu;

inline std::mt19937_64& generator() {
  static std::mt19937_64 engine([] {
    const char* seed = std::getenv("SENTFAST_TEST_SEED");
    const uint64_t value = seed != nullptr ? std::strtoull(seed, nullptr, 10) : std::random_device{}();
    std::printf("SENTFAST_TEST_SEED=%llu\n", static_cast<unsigned long long>(value));
    return value;
  }());
  return engine;
}

// What a fuzzer wants drawn, before the generator draws.
struct Choices {
  const uint8_t* data;
  size_t left;
};
inline Choices& choices() {
  static Choices value = {nullptr, 0};
  return value;
}

inline int64_t integer(int64_t low, int64_t high) {
  Choices& c = choices();
  if (c.left >= 2) {
    const int64_t chosen = c.data[0] | c.data[1] << 8;
    c.data += 2;
    c.left -= 2;
    return low + chosen % (high - low + 1);
  }
  return std::uniform_int_distribution<int64_t>(low, high)(generator());
}

inline float normal() { return std::normal_distribution<float>()(generator()); }

// A buffer of exactly `n` elements, so that a sanitizer sees one element too far.
template <class T>
struct Buffer {
  std::unique_ptr<T[]> data;
  int64_t n;
  explicit Buffer(int64_t size) : data(new T[size]), n(size) {}
  T* get() const { return data.get(); }
  T& operator[](int64_t i) const { return data[i]; }
};

// A float cut to the precision of a dtype, its bits, and back.
template <class T>
T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return {static_cast<uint16_t>(bits >> 16)};
}
template <>
inline Float16 narrow<Float16>(float x) {  // multiples of 2^-8 below 4: exact
  const float rounded = std::fmin(std::fmax(std::nearbyint(x * 256.0f), -1023.0f), 1023.0f);
  const int magnitude = static_cast<int>(std::fabs(rounded));
  if (magnitude == 0) return {0};
  int exponent = 0;
  while ((magnitude >> exponent) > 1) ++exponent;
  const int mantissa = (magnitude << 10 >> exponent) & 0x3ff;
  return {static_cast<uint16_t>((rounded < 0 ? 0x8000 : 0) | ((exponent + 7) << 10) | mantissa)};
}

inline double widen(float x) { return x; }
inline double widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float r;
  __builtin_memcpy(&r, &bits, 4);
  return r;
}
inline double widen(Float16 x) {
  const int exponent = (x.bits >> 10) & 31, mantissa = x.bits & 0x3ff;
  const double magnitude = exponent == 0    ? std::ldexp(mantissa, -24)
                           : exponent == 31 ? (mantissa != 0 ? NAN : INFINITY)
                                            : std::ldexp(1024 + mantissa, exponent - 25);
  return (x.bits & 0x8000) != 0 ? -magnitude : magnitude;
}

template <class T>
constexpr Dtype dtype();
template <>
constexpr Dtype dtype<float>() {
  return Dtype::Float32;
}
template <>
constexpr Dtype dtype<BFloat16>() {
  return Dtype::BFloat16;
}
template <>
constexpr Dtype dtype<Float16>() {
  return Dtype::Float16;
}

// What a dtype makes of a value beyond its largest number.
template <class T>
double within_range(double x) {
  const bool beyond = dtype<T>() == Dtype::Float16 && std::fabs(x) >= 65520;
  return beyond ? std::copysign(INFINITY, x) : x;
}

template <class T>
double tolerance() {
  return dtype<T>() == Dtype::Float32 ? 2e-5 : dtype<T>() == Dtype::Float16 ? 2e-3 : 1.6e-2;
}

template <class T>
Buffer<T> random(int64_t n) {
  Buffer<T> buffer(n);
  for (int64_t i = 0; i < n; ++i) buffer[i] = narrow<T>(normal());
  return buffer;
}

// The same, now and then with a row of zeros, where only eps keeps a norm from dividing by nothing.
template <class T>
Buffer<T> random_rows(int64_t rows, int64_t dim, int64_t stride) {
  Buffer<T> buffer = random<T>((rows - 1) * stride + dim);
  for (int64_t i = 0; i < rows; ++i) {
    if (integer(0, 15) > 0) continue;
    for (int64_t d = 0; d < dim; ++d) buffer[i * stride + d] = narrow<T>(0);
  }
  return buffer;
}

struct Counts {
  int64_t passed = 0, failed = 0;
};
inline Counts& counts() {
  static Counts value;
  return value;
}

// |got - want| within the tolerance times max(1, scale); NaN and infinities must agree.
inline void close(const char* what, double got, double want, double allowed, double scale = 1.0) {
  const bool same = got == want || (std::isnan(got) && std::isnan(want)) ||
                    std::fabs(got - want) <= allowed * std::fmax(1.0, std::fmax(scale, std::fabs(want)));
  if (same) {
    ++counts().passed;
  } else if (++counts().failed <= 20) {
    std::printf("FAILED %s on %s: got %.9g, expected %.9g\n", what, isa_name(isa()), got, want);
  }
}

// Splits [0, n) over threads, as PyTorch's parallel_for does.
template <class F>
void in_threads(int64_t n, F f) {
  constexpr int64_t threads = 3;
  std::vector<std::thread> running;
  for (int64_t t = 0; t < threads; ++t) {
    running.emplace_back([=] { f(n * t / threads, n * (t + 1) / threads); });
  }
  for (std::thread& thread : running) thread.join();
}

}  // namespace check
