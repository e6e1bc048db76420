// What a register holds: the types of PTX, and how their bits become numbers and back.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

namespace ptx {

enum class Type {
  None,
  Predicate,
  B8,
  U8,
  S8,
  B16,
  U16,
  S16,
  B32,
  U32,
  S32,
  B64,
  U64,
  S64,
  B128,
  F16,
  BF16,
  F16x2,
  BF16x2,
  TF32,
  F32,
  F64
};

// None if it is not the name of a type.
Type type_named(const std::string& name);
int bytes_of(Type type);
bool is_float(Type type);

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Numbers that C++ has no type for. Computing with them happens in float.
struct Flushed {};  // float32 whose subnormal numbers count as zero (.ftz)
struct Half {};
struct BFloat {};
template <typename Number>
struct Pair {};  // two numbers in a register of 32 bits

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline uint32_t truncated_to_tf32(uint32_t bits) { return bits & ~0x1fffu; }

inline uint16_t to_bfloat(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline uint16_t to_half(float x) { return x != x ? 0x7fff : static_cast<uint16_t>(_cvtss_sh(x, 0)); }

// A float that rounds further as the double would have: its last bit says that something was cut off.
inline float rounded_to_odd(double exact) {
  const float near = static_cast<float>(exact);
  if (exact != exact || static_cast<double>(near) == exact || std::isinf(near)) return near;
  const float down = std::fabs(static_cast<double>(near)) > std::fabs(exact) ? std::nextafter(near, 0.0f) : near;
  return bits_as<float>(bits_as<uint32_t>(down) | 1u);
}

// Bits of a register as a number, and back.
template <typename Number>
struct Bits {
  using Value = Number;
  static Value get(uint64_t bits) { return static_cast<Value>(bits); }
  static uint64_t put(Value x) { return static_cast<std::make_unsigned_t<Value>>(x); }
};
template <>
struct Bits<float> {
  using Value = float;
  static float get(uint64_t bits) { return bits_as<float>(static_cast<uint32_t>(bits)); }
  static uint64_t put(float x) { return bits_as<uint32_t>(x); }
};
template <>
struct Bits<double> {
  using Value = double;
  static double get(uint64_t bits) { return bits_as<double>(bits); }
  static uint64_t put(double x) { return bits_as<uint64_t>(x); }
};
template <>
struct Bits<Flushed> {
  using Value = float;
  static float get(uint64_t bits) { return flushed(Bits<float>::get(bits)); }
  static uint64_t put(float x) { return Bits<float>::put(flushed(x)); }
};
template <>
struct Bits<Half> {
  using Value = float;
  static float get(uint64_t bits) { return _cvtsh_ss(static_cast<uint16_t>(bits)); }
  static uint64_t put(float x) { return to_half(x); }
};
template <>
struct Bits<BFloat> {
  using Value = float;
  static float get(uint64_t bits) { return Bits<float>::get((bits & 0xffff) << 16); }
  static uint64_t put(float x) { return to_bfloat(x); }
};

// Applies a function of numbers to the bits of registers.
template <typename Number>
struct Apply {
  template <typename Function, typename... Registers>
  static uint64_t to(Function function, Registers... bits) {
    return Bits<Number>::put(function(Bits<Number>::get(bits)...));
  }
};
template <typename Number>
struct Apply<Pair<Number>> {
  template <typename Function, typename... Registers>
  static uint64_t to(Function function, Registers... bits) {
    return Apply<Number>::to(function, bits...) | Apply<Number>::to(function, (bits >> 16)...) << 16;
  }
};

// A half number of either kind as float.
inline float half_value(Type type, uint64_t bits) {
  return type == Type::BF16 ? Bits<BFloat>::get(bits) : Bits<Half>::get(bits);
}
inline float tf32_value(uint64_t bits) { return Bits<float>::get(truncated_to_tf32(static_cast<uint32_t>(bits))); }

}  // namespace ptx
