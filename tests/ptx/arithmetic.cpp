// Arithmetic, logic and comparisons: an operation is a function of numbers, the type says what the bits are.
#include <algorithm>
#include <limits>

#include "machine.h"

namespace ptx {

namespace {

// ---- operations

struct Add {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
    return a + b;
  }
};
struct Subtract {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) return static_cast<T>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
    return a - b;
  }
};
struct Multiply {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
    return a * b;
  }
};
// By zero: all ones, and the number itself as remainder. The least number by -1: itself.
struct Divide {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) {
      if (b == 0) return static_cast<T>(-1);
      if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Subtract()(T{0}, a);
    }
    return a / b;
  }
};
struct Remainder {
  template <typename T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    return std::is_signed_v<T> && b == static_cast<T>(-1) ? T{0} : static_cast<T>(a % b);
  }
};
// Of zeros the negative one is the smaller; a NaN loses, or wins if the instruction says so.
template <bool largest, bool nan_wins>
struct Extreme {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (!std::is_integral_v<T>) {
      if (a != a || b != b) return nan_wins ? std::numeric_limits<T>::quiet_NaN() : (a != a ? b : a);
      if (a == b) return std::signbit(a) == largest ? b : a;
    }
    return (a < b) == largest ? b : a;
  }
};
struct And {
  template <typename T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <typename T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct Xor {
  template <typename T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
struct Not {
  template <typename T>
  T operator()(T a) const {
    return ~a;
  }
};
struct Negate {
  template <typename T>
  T operator()(T a) const {
    if constexpr (std::is_integral_v<T>) return Subtract()(T{0}, a);
    return -a;
  }
};
struct Absolute {
  template <typename T>
  T operator()(T a) const {
    if constexpr (std::is_integral_v<T>) return a < 0 ? Subtract()(T{0}, a) : a;
    return std::fabs(a);
  }
};
struct SquareRoot {
  template <typename T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct InverseSquareRoot {
  template <typename T>
  T operator()(T a) const {
    return T{1} / std::sqrt(a);
  }
};
struct Reciprocal {
  template <typename T>
  T operator()(T a) const {
    return T{1} / a;
  }
};
struct PowerOfTwo {
  float operator()(float a) const { return std::exp2(a); }
};
struct LogarithmOfTwo {
  float operator()(float a) const { return std::log2(a); }
};
struct Sine {
  float operator()(float a) const { return std::sin(a); }
};
struct Cosine {
  float operator()(float a) const { return std::cos(a); }
};
struct HyperbolicTangent {
  float operator()(float a) const { return std::tanh(a); }
};
struct LeadingZeros {
  uint32_t operator()(uint32_t a) const { return a != 0 ? __builtin_clz(a) : 32; }
  uint64_t operator()(uint64_t a) const { return a != 0 ? __builtin_clzll(a) : 64; }
};
struct CountOfOnes {
  template <typename T>
  T operator()(T a) const {
    return __builtin_popcountll(a);
  }
};
struct Reversed {
  uint32_t operator()(uint32_t a) const {
    uint32_t result = 0;
    for (int bit = 0; bit < 32; ++bit) result |= (a >> bit & 1) << (31 - bit);
    return result;
  }
};

// ---- handlers

template <typename Number, typename Function>
void unary(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t* a = warp[i.sources[0]];
  uint64_t* result = warp[i.results[0]];
  each_lane(lanes, [&](int lane) { result[lane] = Apply<Number>::to(Function(), a[lane]); });
}

template <typename Number, typename Function>
void special(Machine& machine, Warp& warp, const Instruction& i, uint32_t lanes) {
  ++machine.counts.special_function;
  unary<Number, Function>(machine, warp, i, lanes);
}

template <typename Number, typename Function>
void binary(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t *a = warp[i.sources[0]], *b = warp[i.sources[1]];
  uint64_t* result = warp[i.results[0]];
  each_lane(lanes, [&](int lane) { result[lane] = Apply<Number>::to(Function(), a[lane], b[lane]); });
}

template <typename Function>
Handler of_integers(Type type) {
  switch (type) {
    case Type::S16:
      return binary<int16_t, Function>;
    case Type::U16:
    case Type::B16:
      return binary<uint16_t, Function>;
    case Type::S32:
      return binary<int32_t, Function>;
    case Type::U32:
    case Type::B32:
      return binary<uint32_t, Function>;
    case Type::S64:
      return binary<int64_t, Function>;
    case Type::U64:
    case Type::B64:
    case Type::Predicate:
      return binary<uint64_t, Function>;
    default:
      return nullptr;
  }
}

template <typename Function>
Handler of_floats(Type type, bool flushes) {
  switch (type) {
    case Type::F32:
      return flushes ? binary<Flushed, Function> : binary<float, Function>;
    case Type::F64:
      return binary<double, Function>;
    case Type::F16:
      return binary<Half, Function>;
    case Type::BF16:
      return binary<BFloat, Function>;
    case Type::F16x2:
      return binary<Pair<Half>, Function>;
    case Type::BF16x2:
      return binary<Pair<BFloat>, Function>;
    default:
      return nullptr;
  }
}

template <typename Function>
Handler of_numbers(Type type, bool flushes) {
  return is_float(type) ? of_floats<Function>(type, flushes) : of_integers<Function>(type);
}

template <typename Function>
Handler of_one_number(Type type, bool flushes) {
  switch (type) {
    case Type::F32:
      return flushes ? unary<Flushed, Function> : unary<float, Function>;
    case Type::F64:
      return unary<double, Function>;
    case Type::F16:
      return unary<Half, Function>;
    case Type::BF16:
      return unary<BFloat, Function>;
    case Type::F16x2:
      return unary<Pair<Half>, Function>;
    case Type::BF16x2:
      return unary<Pair<BFloat>, Function>;
    case Type::S16:
      return unary<int16_t, Function>;
    case Type::S32:
      return unary<int32_t, Function>;
    case Type::S64:
      return unary<int64_t, Function>;
    default:
      return nullptr;
  }
}

template <typename Function>
Handler of_words(Type type) {
  if (type == Type::B32 || type == Type::U32) return unary<uint32_t, Function>;
  return type == Type::B64 || type == Type::U64 ? unary<uint64_t, Function> : nullptr;
}

template <typename Function>
Handler of_root(Type type, bool flushes) {
  if (type == Type::F32) return flushes ? special<Flushed, Function> : special<float, Function>;
  return type == Type::F64 ? special<double, Function> : nullptr;
}

template <typename Function>
Handler of_special(Type type, bool flushes) {
  if (type != Type::F32) return nullptr;
  return flushes ? special<Flushed, Function> : special<float, Function>;
}

void not_predicate(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) { warp[i.results[0]][lane] = warp[i.sources[0]][lane] == 0; });
}

Handler of_not(Type type) {
  if (type == Type::Predicate) return not_predicate;
  if (type == Type::B16) return unary<uint16_t, Not>;
  return of_words<Not>(type);
}

// ---- shifts: by more than the width they give zeros, or copies of the sign

template <typename T>
struct ShiftLeft {
  static T of(T a, uint32_t by) { return by < 8 * sizeof(T) ? static_cast<T>(a << by) : T{0}; }
};
template <typename T>
struct ShiftRight {
  static T of(T a, uint32_t by) {
    const uint32_t last = 8 * sizeof(T) - 1;
    if (by > last && !std::is_signed_v<T>) return T{0};
    return static_cast<T>(a >> std::min(by, last));
  }
};

template <typename T, template <typename> class Shift>
void shift(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t *a = warp[i.sources[0]], *by = warp[i.sources[1]];
  uint64_t* result = warp[i.results[0]];
  each_lane(lanes, [&](int lane) {
    result[lane] = Bits<T>::put(Shift<T>::of(Bits<T>::get(a[lane]), static_cast<uint32_t>(by[lane])));
  });
}

template <template <typename> class Shift>
Handler of_shift(Type type) {
  switch (type) {
    case Type::B16:
    case Type::U16:
      return shift<uint16_t, Shift>;
    case Type::S16:
      return shift<int16_t, Shift>;
    case Type::B32:
    case Type::U32:
      return shift<uint32_t, Shift>;
    case Type::S32:
      return shift<int32_t, Shift>;
    case Type::B64:
    case Type::U64:
      return shift<uint64_t, Shift>;
    case Type::S64:
      return shift<int64_t, Shift>;
    default:
      return nullptr;
  }
}

using Chooser = Handler (*)(Type type, bool flushes);

const std::map<std::string, Chooser>& choosers() {
  static const std::map<std::string, Chooser> known = {
      {"add", of_numbers<Add>},
      {"sub", of_numbers<Subtract>},
      {"mul", of_numbers<Multiply>},
      {"div", [](Type t, bool f) { return is_float(t) && bytes_of(t) < 4 ? nullptr : of_numbers<Divide>(t, f); }},
      {"rem", [](Type t, bool) { return of_integers<Remainder>(t); }},
      {"min", of_numbers<Extreme<false, false>>},
      {"max", of_numbers<Extreme<true, false>>},
      {"min.NaN", of_floats<Extreme<false, true>>},
      {"max.NaN", of_floats<Extreme<true, true>>},
      {"and", [](Type t, bool) { return of_integers<And>(t); }},
      {"or", [](Type t, bool) { return of_integers<Or>(t); }},
      {"xor", [](Type t, bool) { return of_integers<Xor>(t); }},
      {"not", [](Type t, bool) { return of_not(t); }},
      {"shl", [](Type t, bool) { return of_shift<ShiftLeft>(t); }},
      {"shr", [](Type t, bool) { return of_shift<ShiftRight>(t); }},
      {"neg", of_one_number<Negate>},
      {"abs", of_one_number<Absolute>},
      {"sqrt", of_root<SquareRoot>},
      {"rsqrt", of_root<InverseSquareRoot>},
      {"rcp", of_root<Reciprocal>},
      {"ex2", of_special<PowerOfTwo>},
      {"lg2", of_special<LogarithmOfTwo>},
      {"sin", of_special<Sine>},
      {"cos", of_special<Cosine>},
      {"tanh", of_special<HyperbolicTangent>},
      {"clz", [](Type t, bool) { return of_words<LeadingZeros>(t); }},
      {"popc", [](Type t, bool) { return of_words<CountOfOnes>(t); }},
      {"brev", [](Type t, bool) { return t == Type::B32 ? Handler{unary<uint32_t, Reversed>} : nullptr; }}};
  return known;
}

}  // namespace

Handler arithmetic(const std::string& operation, Type type, bool flushes, bool nan_wins) {
  const auto found = choosers().find(nan_wins ? operation + ".NaN" : operation);
  return found == choosers().end() ? nullptr : found->second(type, flushes);
}

// ---- products

namespace {

// Of twice as many bits; with a third source added, if there is one.
template <typename Narrow, typename Wide, bool adds>
void widened(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t *a = warp[i.sources[0]], *b = warp[i.sources[1]];
  const uint64_t* c = adds ? warp[i.sources[2]] : nullptr;
  uint64_t* result = warp[i.results[0]];
  each_lane(lanes, [&](int lane) {
    const Wide product =
        static_cast<Wide>(static_cast<Narrow>(a[lane])) * static_cast<Wide>(static_cast<Narrow>(b[lane]));
    result[lane] = Bits<Wide>::put(adds ? Add()(product, static_cast<Wide>(c[lane])) : product);
  });
}

template <typename Narrow, typename Wide>
void high(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t *a = warp[i.sources[0]], *b = warp[i.sources[1]];
  uint64_t* result = warp[i.results[0]];
  each_lane(lanes, [&](int lane) {
    const Wide product =
        static_cast<Wide>(static_cast<Narrow>(a[lane])) * static_cast<Wide>(static_cast<Narrow>(b[lane]));
    result[lane] = Bits<Narrow>::put(static_cast<Narrow>(product >> (8 * sizeof(Narrow))));
  });
}

struct FusedFloat {
  template <typename T>
  T operator()(T a, T b, T c) const {
    return std::fma(a, b, c);
  }
};
// The product of two halves is exact in float, and so is its sum with a third in double, but for rare cases.
struct FusedHalf {
  float operator()(float a, float b, float c) const {
    return rounded_to_odd(std::fma(static_cast<double>(a), static_cast<double>(b), static_cast<double>(c)));
  }
};
struct MultiplyAdd {
  template <typename T>
  T operator()(T a, T b, T c) const {
    return Add()(Multiply()(a, b), c);
  }
};

template <typename Number, typename Function>
void ternary(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t *a = warp[i.sources[0]], *b = warp[i.sources[1]], *c = warp[i.sources[2]];
  uint64_t* result = warp[i.results[0]];
  each_lane(lanes, [&](int lane) { result[lane] = Apply<Number>::to(Function(), a[lane], b[lane], c[lane]); });
}

template <bool adds>
Handler widened_of(Type type) {
  switch (type) {
    case Type::S16:
      return widened<int16_t, int32_t, adds>;
    case Type::U16:
      return widened<uint16_t, uint32_t, adds>;
    case Type::S32:
      return widened<int32_t, int64_t, adds>;
    case Type::U32:
      return widened<uint32_t, uint64_t, adds>;
    default:
      return nullptr;
  }
}

}  // namespace

Handler wide_product(bool adds, Type type) { return adds ? widened_of<true>(type) : widened_of<false>(type); }

Handler high_product(Type type) {
  switch (type) {
    case Type::S32:
      return high<int32_t, int64_t>;
    case Type::U32:
      return high<uint32_t, uint64_t>;
    case Type::S64:
      return high<int64_t, __int128>;
    case Type::U64:
      return high<uint64_t, unsigned __int128>;
    default:
      return nullptr;
  }
}

Handler fused_product(Type type, bool flushes) {
  switch (type) {
    case Type::F32:
      return flushes ? ternary<Flushed, FusedFloat> : ternary<float, FusedFloat>;
    case Type::F64:
      return ternary<double, FusedFloat>;
    case Type::F16:
      return ternary<Half, FusedHalf>;
    case Type::BF16:
      return ternary<BFloat, FusedHalf>;
    case Type::F16x2:
      return ternary<Pair<Half>, FusedHalf>;
    case Type::BF16x2:
      return ternary<Pair<BFloat>, FusedHalf>;
    case Type::S16:
    case Type::U16:
      return ternary<uint16_t, MultiplyAdd>;
    case Type::S32:
    case Type::U32:
      return ternary<uint32_t, MultiplyAdd>;
    case Type::S64:
    case Type::U64:
      return ternary<uint64_t, MultiplyAdd>;
    default:
      return nullptr;
  }
}

// ---- comparisons

namespace {

// A comparison is the set of outcomes for which it holds.
enum Outcome { kLess = 1, kEqual = 2, kGreater = 4, kUnordered = 8 };

template <typename T>
int outcome(T a, T b) {
  if (a < b) return kLess;
  if (a > b) return kGreater;
  return a == b ? kEqual : kUnordered;
}

bool joined(Join join, bool result, bool other) {
  switch (join) {
    case Join::And:
      return result && other;
    case Join::Or:
      return result || other;
    case Join::Xor:
      return result != other;
    default:
      return result;
  }
}

template <typename Number>
void compare(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t *a = warp[i.sources[0]], *b = warp[i.sources[1]];
  const uint64_t* other = i.sources.size() > 2 ? warp[i.sources[2]] : nullptr;
  const int holds = i.variant & 15;
  const Join join = static_cast<Join>(i.variant >> 4);
  each_lane(lanes, [&](int lane) {
    const bool result = (holds & outcome(Bits<Number>::get(a[lane]), Bits<Number>::get(b[lane]))) != 0;
    const bool second = other != nullptr && (other[lane] != 0) != i.negated;
    warp[i.results[0]][lane] = joined(join, result, second);
    if (i.results.size() > 1) warp[i.results[1]][lane] = joined(join, !result, second);
  });
}

// Two comparisons with a result each.
template <typename Number>
void compare_pairs(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t *a = warp[i.sources[0]], *b = warp[i.sources[1]];
  each_lane(lanes, [&](int lane) {
    for (int half = 0; half < 2; ++half) {
      const int found = outcome(Bits<Number>::get(a[lane] >> 16 * half), Bits<Number>::get(b[lane] >> 16 * half));
      warp[i.results[half]][lane] = ((i.variant & 15) & found) != 0;
    }
  });
}

}  // namespace

int outcomes_named(const std::string& name) {
  static const std::map<std::string, int> names = {{"eq", kEqual},
                                                   {"ne", kLess | kGreater},
                                                   {"lt", kLess},
                                                   {"le", kLess | kEqual},
                                                   {"gt", kGreater},
                                                   {"ge", kGreater | kEqual},
                                                   {"lo", kLess},
                                                   {"ls", kLess | kEqual},
                                                   {"hi", kGreater},
                                                   {"hs", kGreater | kEqual},
                                                   {"nan", kUnordered},
                                                   {"num", kLess | kEqual | kGreater},
                                                   {"equ", kEqual | kUnordered},
                                                   {"neu", kLess | kGreater | kUnordered},
                                                   {"ltu", kLess | kUnordered},
                                                   {"leu", kLess | kEqual | kUnordered},
                                                   {"gtu", kGreater | kUnordered},
                                                   {"geu", kGreater | kEqual | kUnordered}};
  const auto found = names.find(name);
  return found == names.end() ? 0 : found->second;
}

Handler comparison(Type type, bool flushes) {
  switch (type) {
    case Type::F32:
      return flushes ? compare<Flushed> : compare<float>;
    case Type::F64:
      return compare<double>;
    case Type::F16:
      return compare<Half>;
    case Type::BF16:
      return compare<BFloat>;
    case Type::F16x2:
      return compare_pairs<Half>;
    case Type::BF16x2:
      return compare_pairs<BFloat>;
    case Type::S16:
      return compare<int16_t>;
    case Type::U16:
    case Type::B16:
      return compare<uint16_t>;
    case Type::S32:
      return compare<int32_t>;
    case Type::U32:
    case Type::B32:
      return compare<uint32_t>;
    case Type::S64:
      return compare<int64_t>;
    case Type::U64:
    case Type::B64:
      return compare<uint64_t>;
    default:
      return nullptr;
  }
}

}  // namespace ptx
