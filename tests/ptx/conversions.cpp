// Conversions between types (cvt).
#include <algorithm>
#include <limits>

#include "machine.h"

namespace ptx {

namespace {

double rounded(double x, Rounding rounding) {
  switch (rounding) {
    case Rounding::ToInteger:
      return std::nearbyint(x);
    case Rounding::Floor:
      return std::floor(x);
    case Rounding::Ceiling:
      return std::ceil(x);
    case Rounding::CutInteger:
      return std::trunc(x);
    default:
      return x;
  }
}

double float_value(Type type, uint64_t bits, bool flushes) {
  switch (type) {
    case Type::F32:
      return flushes ? Bits<Flushed>::get(bits) : Bits<float>::get(bits);
    case Type::F64:
      return Bits<double>::get(bits);
    default:
      return half_value(type, bits);
  }
}

// `exact` in the float type; one that is rounded towards zero is cut.
uint64_t float_bits(Type type, double exact, Rounding rounding, bool flushes) {
  if (type == Type::F64) return Bits<double>::put(exact);
  if (type == Type::BF16) return to_bfloat(rounded_to_odd(exact));
  if (type == Type::F16) return to_half(rounded_to_odd(exact));
  float near = static_cast<float>(exact);
  const bool larger = std::fabs(static_cast<double>(near)) > std::fabs(exact);
  if (rounding == Rounding::ToZero && larger) near = std::nextafter(near, 0.0f);
  return flushes ? Bits<Flushed>::put(near) : Bits<float>::put(near);
}

// Numbers out of range become the nearest in range, NaN becomes 0.
template <typename T>
uint64_t saturated(double x) {
  if (x != x) return 0;
  // The largest 64-bit numbers are no doubles: the next double is out of range.
  if (x >= std::ldexp(1.0, std::numeric_limits<T>::digits)) return Bits<T>::put(std::numeric_limits<T>::max());
  if (x <= static_cast<double>(std::numeric_limits<T>::min())) return Bits<T>::put(std::numeric_limits<T>::min());
  return Bits<T>::put(static_cast<T>(x));
}

uint64_t integer_of_float(Type type, double x) {
  switch (type) {
    case Type::S8:
      return static_cast<uint32_t>(static_cast<int8_t>(saturated<int8_t>(x)));
    case Type::U8:
      return saturated<uint8_t>(x);
    case Type::S16:
      return saturated<int16_t>(x);
    case Type::U16:
      return saturated<uint16_t>(x);
    case Type::S32:
      return saturated<int32_t>(x);
    case Type::U32:
      return saturated<uint32_t>(x);
    case Type::S64:
      return saturated<int64_t>(x);
    case Type::U64:
      return saturated<uint64_t>(x);
    default:
      throw Failure("conversion to an unknown integer type");
  }
}

// An integer with its sign, in 64 bits.
uint64_t widened(Type type, uint64_t bits) {
  switch (type) {
    case Type::S8:
      return static_cast<uint64_t>(static_cast<int64_t>(static_cast<int8_t>(bits)));
    case Type::S16:
      return static_cast<uint64_t>(static_cast<int64_t>(static_cast<int16_t>(bits)));
    case Type::S32:
      return static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(bits)));
    default: {
      const int width = 8 * bytes_of(type);
      return width == 64 ? bits : bits & ((uint64_t{1} << width) - 1);
    }
  }
}

uint64_t narrowed(Type type, uint64_t number) {
  if (type == Type::S8) return static_cast<uint32_t>(static_cast<int8_t>(number));
  return type == Type::S16 ? static_cast<uint16_t>(number) : widened(type == Type::S32 ? Type::U32 : type, number);
}

// 64-bit integers are no doubles, so float32 is made of them directly.
uint64_t float_of_integer(Type type, uint64_t number, bool has_sign) {
  if (type == Type::F64) {
    return Bits<double>::put(has_sign ? static_cast<double>(static_cast<int64_t>(number))
                                      : static_cast<double>(number));
  }
  const float near = has_sign ? static_cast<float>(static_cast<int64_t>(number)) : static_cast<float>(number);
  return float_bits(type, near, Rounding::Nearest, false);
}

uint64_t to_tf32(uint32_t bits, Rounding rounding) {
  const bool finite = (bits & 0x7f800000) != 0x7f800000;
  return truncated_to_tf32(rounding == Rounding::NearestAway && finite ? bits + 0x1000 : bits);
}

uint64_t converted(const Instruction& i, uint64_t bits) {
  const Rounding rounding = static_cast<Rounding>(i.variant);
  if (i.type == Type::TF32) return to_tf32(static_cast<uint32_t>(bits), rounding);
  if (is_float(i.source_type)) {
    const double x = rounded(float_value(i.source_type, bits, i.flushes), rounding);
    return is_float(i.type) ? float_bits(i.type, x, rounding, i.flushes) : integer_of_float(i.type, std::trunc(x));
  }
  const uint64_t number = widened(i.source_type, bits);
  const bool has_sign = i.source_type != Type::U64 && i.source_type != Type::B64;
  return is_float(i.type) ? float_of_integer(i.type, number, has_sign) : narrowed(i.type, number);
}

// Two floats to a pair of halves; the first source is the upper one.
template <typename Number>
uint64_t paired(uint64_t upper, uint64_t lower) {
  return Bits<Number>::put(Bits<float>::get(upper)) << 16 | Bits<Number>::put(Bits<float>::get(lower));
}

}  // namespace

void convert(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t* from = warp[i.sources[0]];
  const uint64_t* second = i.sources.size() > 1 ? warp[i.sources[1]] : nullptr;
  uint64_t* to = warp[i.results[0]];
  each_lane(lanes, [&](int lane) {
    if (i.type == Type::BF16x2) {
      to[lane] = paired<BFloat>(from[lane], second[lane]);
    } else if (i.type == Type::F16x2) {
      to[lane] = paired<Half>(from[lane], second[lane]);
    } else {
      to[lane] = converted(i, from[lane]);
    }
  });
}

}  // namespace ptx
