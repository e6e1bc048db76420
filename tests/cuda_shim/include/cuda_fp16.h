// float16 for the CUDA shim: rounds to the nearest, ties to even; NaN stays NaN.
#pragma once

#include <math.h>

#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float value;
  if (exponent == 31) {
    value = fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    value = ldexpf(static_cast<float>(fraction), -24);
  } else {
    value = ldexpf(static_cast<float>(fraction + 1024), exponent - 25);
  }
  return x.bits & 0x8000 ? -value : value;
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  if (x != x) return {0x7fff};
  const float size = fabsf(x);
  if (size == 0.0f) return {sign};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // The unit in the last place at this size; a carry into the next exponent comes out right by itself.
  int exponent;
  frexpf(size, &exponent);
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
  const int steps = static_cast<int>(nearbyintf(ldexpf(size, -unit)));
  if (unit == -24) return {static_cast<uint16_t>(sign | steps)};
  return {static_cast<uint16_t>(sign | ((unit + 24) * 1024 + steps))};
}
