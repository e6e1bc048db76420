#include "values.h"

#include <map>

namespace ptx {

Type type_named(const std::string& name) {
  static const std::map<std::string, Type> names = {
      {"pred", Type::Predicate}, {"b8", Type::B8},       {"u8", Type::U8},     {"s8", Type::S8},     {"b16", Type::B16},
      {"u16", Type::U16},        {"s16", Type::S16},     {"b32", Type::B32},   {"u32", Type::U32},   {"s32", Type::S32},
      {"b64", Type::B64},        {"u64", Type::U64},     {"s64", Type::S64},   {"b128", Type::B128}, {"f16", Type::F16},
      {"bf16", Type::BF16},      {"f16x2", Type::F16x2}, {"tf32", Type::TF32}, {"f32", Type::F32},   {"f64", Type::F64},
      {"bf16x2", Type::BF16x2}};
  const auto found = names.find(name);
  return found == names.end() ? Type::None : found->second;
}

int bytes_of(Type type) {
  switch (type) {
    case Type::B8:
    case Type::U8:
    case Type::S8:
      return 1;
    case Type::B16:
    case Type::U16:
    case Type::S16:
    case Type::F16:
    case Type::BF16:
      return 2;
    case Type::B64:
    case Type::U64:
    case Type::S64:
    case Type::F64:
      return 8;
    case Type::B128:
      return 16;
    default:
      return 4;
  }
}

bool is_float(Type type) { return type >= Type::F16; }

}  // namespace ptx
