#include "names.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <tuple>

#include "text.h"

namespace ptx {

namespace {

uint64_t aligned(uint64_t address, uint64_t alignment) { return (address + alignment - 1) / alignment * alignment; }

// `name[4][2]` as the name and 8; `name[]` as 0; `name` as 1.
std::pair<std::string, uint64_t> sized(const std::string& text) {
  const size_t bracket = text.find('[');
  uint64_t count = 1;
  for (size_t at = bracket; at != std::string::npos; at = text.find('[', at + 1)) {
    count *= text[at + 1] == ']' ? 0 : literal(text.substr(at + 1));
  }
  return {text.substr(0, bracket), count};
}

// What a declaration of a variable or a parameter says.
struct Declaration {
  Space space = Space::Global;
  Type type = Type::B8;
  uint64_t alignment = 1, count = 1;
  std::string name;

  explicit Declaration(const std::string& text) {
    static const std::map<std::string, Space> spaces = {
        {".shared", Space::Shared}, {".local", Space::Local}, {".const", Space::Constant}, {".global", Space::Global}};
    const std::vector<std::string> all = words(text);
    bool of_pointer = false;  // the alignment after .ptr is that of what it points to
    for (size_t i = 0; i < all.size(); ++i) {
      const auto found = spaces.find(all[i]);
      if (all[i] == ".ptr") of_pointer = true;
      if (all[i] == ".align") {
        ++i;
        if (!of_pointer) alignment = literal(all[i]);
      } else if (found != spaces.end() && !of_pointer) {
        space = found->second;
      } else if (all[i][0] == '.' && type_named(all[i].substr(1)) != Type::None) {
        type = type_named(all[i].substr(1));
      } else if (all[i][0] != '.') {
        std::tie(name, count) = sized(all[i]);
      }
    }
    alignment = std::max<uint64_t>(alignment, bytes_of(type));
  }
  uint64_t bytes() const { return count * bytes_of(type); }
};

}  // namespace

void Names::enter_kernel(Kernel& kernel) {
  kernel_ = &kernel;
  scopes_.assign(1, {});
  constants_.clear();
  parameters_.clear();
  local_end_ = 0;
  sink_ = -1;
}

void Names::leave_kernel() {
  kernel_->shared_bytes = static_cast<uint32_t>(shared_end_);
  kernel_->local_bytes = static_cast<uint32_t>(aligned(local_end_, 16));
  kernel_ = nullptr;
}

// `.reg .b32 %r<10>, x`
void Names::declare_registers(const std::string& declaration) {
  const std::vector<std::string> all = words(declaration);
  for (size_t i = 2; i < all.size(); ++i) {
    const size_t bracket = all[i].find('<');
    if (bracket == std::string::npos) {
      scopes_.back()[all[i]] = new_register();
      continue;
    }
    const uint64_t count = literal(all[i].substr(bracket + 1));
    for (uint64_t n = 0; n < count; ++n) scopes_.back()[all[i].substr(0, bracket) + std::to_string(n)] = new_register();
  }
}

void Names::declare_parameters(const std::string& list) {
  for (const std::string& parameter : operands(list)) declare_parameter(parameter);
}

void Names::declare_parameter(const std::string& text) {
  const Declaration declared(text);
  const uint32_t offset = static_cast<uint32_t>(aligned(kernel_->parameter_bytes, declared.alignment));
  const uint32_t bytes = static_cast<uint32_t>(declared.bytes());
  parameters_[declared.name] = offset;
  kernel_->parameters.push_back({offset, bytes});
  kernel_->parameter_bytes = offset + bytes;
}

uint64_t Names::reserve(Space space, uint64_t bytes, uint64_t alignment) {
  if (space == Space::Shared || space == Space::Local) {
    uint64_t& end = space == Space::Shared ? shared_end_ : local_end_;
    const uint64_t address = aligned(end, alignment);
    end = address + bytes;
    return address;
  }
  module_.storage.push_back(std::make_unique<std::vector<uint8_t>>(bytes + alignment));
  return aligned(reinterpret_cast<uint64_t>(module_.storage.back()->data()), alignment);
}

void Names::initialise(uint64_t address, const std::string& declaration, int bytes) {
  const size_t begin = declaration.find('{');
  if (begin == std::string::npos) throw Failure("unknown initial value: " + declaration);
  for (const std::string& value : words(declaration.substr(begin + 1, declaration.rfind('}') - begin - 1))) {
    const uint64_t bits = literal(value);
    std::memcpy(reinterpret_cast<void*>(address), &bits, bytes);
    address += bytes;
  }
}

void Names::declare_variable(const std::string& text) {
  const size_t equals = text.find('=');
  const Declaration declared(text.substr(0, equals));
  const bool dynamic = declared.space == Space::Shared && declared.count == 0;
  const uint64_t address = dynamic ? 0 : reserve(declared.space, declared.bytes(), declared.alignment);
  if (equals != std::string::npos) initialise(address, text.substr(equals), bytes_of(declared.type));
  module_.variables[declared.name] = {declared.space, address, dynamic};
}

int Names::find(const std::string& name) const {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto found = scope->find(name);
    if (found != scope->end()) return found->second;
  }
  return -1;
}

int Names::constant(uint64_t value) {
  const auto found = constants_.find(value);
  if (found != constants_.end()) return found->second;
  const int number = new_register();
  constants_[value] = number;
  kernel_->constants.emplace_back(number, value);
  return number;
}

int Names::special(const std::string& name) {
  const auto found = kernel_->special.find(name);
  return found != kernel_->special.end() ? found->second : kernel_->special[name] = new_register();
}

int Names::of_variable(const Variable& variable) {
  if (!variable.dynamic_shared) return constant(variable.address);
  if (kernel_->dynamic_shared_register < 0) kernel_->dynamic_shared_register = new_register();
  return kernel_->dynamic_shared_register;
}

namespace {

uint64_t constant_bits(const std::string& text, Type type) {
  const uint64_t bits = literal(text);
  const int width = 8 * bytes_of(type);
  return is_float_literal(text) || width >= 64 ? bits : bits & ((uint64_t{1} << width) - 1);
}

}  // namespace

int Names::operand(const std::string& given, Type type) {
  const std::string text = trimmed(given);
  if (text == "_") return sink_ >= 0 ? sink_ : sink_ = new_register();
  const int number = find(text);
  if (number >= 0) return number;
  if (text[0] == '%') return special(text);
  if (std::isdigit(static_cast<unsigned char>(text[0])) != 0 || text[0] == '-')
    return constant(constant_bits(text, type));
  const auto parameter = parameters_.find(text);
  if (parameter != parameters_.end()) return constant(parameter->second);
  const auto variable = module_.variables.find(text);
  if (variable != module_.variables.end()) return of_variable(variable->second);
  throw Failure("unknown operand " + text);
}

std::vector<int> Names::group(const std::string& text, Type type) {
  if (text[0] != '{') return {operand(text, type)};
  std::vector<int> numbers;
  for (const std::string& member : operands(text.substr(1, text.rfind('}') - 1)))
    numbers.push_back(operand(member, type));
  return numbers;
}

Address Names::address(const std::string& text) {
  const std::string inside = trimmed(text.substr(1, text.rfind(']') - 1));
  const size_t end = inside.find_first_of("+ \t");
  const std::string base = inside.substr(0, end);
  std::string rest = end == std::string::npos ? "" : inside.substr(end);
  rest.erase(std::remove_if(rest.begin(), rest.end(), [](char c) { return c == '+' || c == ' ' || c == '\t'; }),
             rest.end());
  const int64_t distance = rest.empty() ? 0 : static_cast<int64_t>(literal(rest));
  const auto parameter = parameters_.find(base);
  if (parameter != parameters_.end()) return {-1, distance + parameter->second};
  return {operand(base, Type::U64), distance};
}

}  // namespace ptx
