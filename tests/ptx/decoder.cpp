#include "decoder.h"

#include <algorithm>
#include <cctype>
#include <cstdio>

#include "machine.h"
#include "text.h"

namespace ptx {

namespace {

// One instruction on its way to be decoded: its parts as text.
class Decoder {
 public:
  Decoder(const std::string& statement, Names& names) : names_(names) {
    instruction.text = trimmed(statement);
    std::string text = instruction.text;
    if (text[0] == '@') text = take_predicate(text);
    const size_t space = text.find_first_of(" \t");
    modifiers_ = parts(text.substr(0, space));
    operation_ = modifiers_[0];
    modifiers_.erase(modifiers_.begin());
    if (space != std::string::npos) operands_ = operands(text.substr(space));
    for (const std::string& modifier : modifiers_) {
      if (type_named(modifier) != Type::None) types_.push_back(type_named(modifier));
    }
    instruction.type = types_.empty() ? Type::None : types_.back();
    instruction.flushes = has("ftz");
    instruction.space = space_of();
  }

  Decoded decoded() {
    using Rule = void (Decoder::*)();
    static const std::map<std::string, Rule> rules = {{"mov", &Decoder::move},
                                                      {"selp", &Decoder::select},
                                                      {"setp", &Decoder::comparison},
                                                      {"mul", &Decoder::product},
                                                      {"mad", &Decoder::product_sum},
                                                      {"fma", &Decoder::product_sum},
                                                      {"cvt", &Decoder::conversion},
                                                      {"cvta", &Decoder::address_conversion},
                                                      {"prmt", &Decoder::permutation},
                                                      {"bfe", &Decoder::bit_extraction},
                                                      {"bfi", &Decoder::bit_insertion},
                                                      {"shf", &Decoder::funnel},
                                                      {"lop3", &Decoder::logic},
                                                      {"ld", &Decoder::load},
                                                      {"ldu", &Decoder::load},
                                                      {"st", &Decoder::store},
                                                      {"cp", &Decoder::copy},
                                                      {"shfl", &Decoder::shuffle},
                                                      {"vote", &Decoder::vote},
                                                      {"redux", &Decoder::reduction},
                                                      {"activemask", &Decoder::active},
                                                      {"ldmatrix", &Decoder::matrix},
                                                      {"stmatrix", &Decoder::matrix},
                                                      {"mma", &Decoder::warp_product},
                                                      {"wgmma", &Decoder::group_product},
                                                      {"bar", &Decoder::barrier},
                                                      {"barrier", &Decoder::barrier},
                                                      {"membar", &Decoder::fence},
                                                      {"fence", &Decoder::fence},
                                                      {"bra", &Decoder::branch},
                                                      {"ret", &Decoder::end},
                                                      {"exit", &Decoder::end},
                                                      {"trap", &Decoder::trapping}};
    const auto rule = rules.find(operation_);
    if (rule != rules.end()) {
      (this->*rule->second)();
    } else {
      arithmetic();
    }
    if (instruction.execute == nullptr) refuse("no handler");
    return {std::move(instruction), label_};
  }

  Instruction instruction;

 private:
  [[noreturn]] void refuse(const std::string& why) const { throw Failure("unknown instruction: " + why); }
  bool has(const char* modifier) const {
    return std::find(modifiers_.begin(), modifiers_.end(), modifier) != modifiers_.end();
  }
  // Every modifier must be one of these, a type, or understood by the rule: a new one may change the meaning.
  void allow(const std::vector<std::string>& known) const {
    for (const std::string& modifier : modifiers_) {
      if (type_named(modifier) != Type::None) continue;
      if (std::find(known.begin(), known.end(), modifier) == known.end()) refuse("modifier ." + modifier);
    }
  }
  void need(bool condition, const char* what) const {
    if (!condition) refuse(what);
  }

  std::string take_predicate(const std::string& text) {
    const size_t space = text.find_first_of(" \t");
    instruction.predicate_negated = text[1] == '!';
    const size_t begin = instruction.predicate_negated ? 2 : 1;
    instruction.predicate = names_.operand(text.substr(begin, space - begin), Type::Predicate);
    return trimmed(text.substr(space));
  }

  Space space_of() const {
    if (has("global")) return Space::Global;
    if (has("local")) return Space::Local;
    if (has("param")) return Space::Parameter;
    if (has("const")) return Space::Constant;
    const auto shared = [](const std::string& modifier) { return starts_with(modifier, "shared"); };
    return std::any_of(modifiers_.begin(), modifiers_.end(), shared) ? Space::Shared : Space::Generic;
  }

  // The first operand: a register, several in braces, or two with a bar between.
  void result(Type type) {
    const size_t bar = operands_[0][0] == '{' ? std::string::npos : operands_[0].find('|');
    if (bar == std::string::npos) {
      instruction.results = names_.group(operands_[0], type);
      return;
    }
    instruction.results = {names_.operand(operands_[0].substr(0, bar), type),
                           names_.operand(operands_[0].substr(bar + 1), Type::Predicate)};
  }
  void source(size_t number, Type type) {
    std::string text = operands_[number];
    if (text[0] == '!') {
      instruction.negated = true;
      text = text.substr(1);
    }
    for (const int found : names_.group(text, type)) instruction.sources.push_back(found);
  }
  void sources(size_t first, Type type) {
    for (size_t number = first; number < operands_.size(); ++number) source(number, type);
  }
  void result_and_sources(Type type) {
    result(type);
    sources(1, type);
  }
  int number(size_t operand) const { return static_cast<int>(literal(operands_[operand])); }

  // ---- arithmetic

  void arithmetic() {
    static const std::vector<std::string> known = {"rn", "approx", "full", "ftz", "NaN"};
    allow(known);
    const bool shifts = operation_ == "shl" || operation_ == "shr";
    result(instruction.type);
    source(1, instruction.type);
    if (operands_.size() > 2) source(2, shifts ? Type::U32 : instruction.type);
    need(operands_.size() < 4, "four operands");
    instruction.execute = ptx::arithmetic(operation_, instruction.type, instruction.flushes, has("NaN"));
  }

  void product() {
    allow({"lo", "hi", "wide", "rn", "ftz"});
    result_and_sources(instruction.type);
    if (has("wide")) {
      instruction.execute = wide_product(false, instruction.type);
    } else if (has("hi")) {
      instruction.execute = high_product(instruction.type);
    } else {
      instruction.execute = ptx::arithmetic("mul", instruction.type, instruction.flushes, false);
    }
  }

  void product_sum() {
    allow({"lo", "wide", "rn", "ftz"});
    result_and_sources(instruction.type);
    instruction.execute =
        has("wide") ? wide_product(true, instruction.type) : fused_product(instruction.type, instruction.flushes);
  }

  void comparison() {
    allow({modifiers_[0], "and", "or", "xor", "ftz"});
    const Join join = has("and") ? Join::And : has("or") ? Join::Or : has("xor") ? Join::Xor : Join::Alone;
    need((operands_.size() > 3) == (join != Join::Alone), "operands");
    const int outcomes = outcomes_named(modifiers_[0]);
    need(outcomes != 0, "comparison");
    instruction.variant = outcomes | static_cast<int>(join) << 4;
    result(Type::Predicate);
    sources(1, instruction.type);
    instruction.execute = ptx::comparison(instruction.type, instruction.flushes);
    const bool pairs = instruction.type == Type::F16x2 || instruction.type == Type::BF16x2;
    need(!pairs || (instruction.results.size() == 2 && join == Join::Alone), "pairs");
  }

  void conversion() {
    static const std::map<std::string, Rounding> roundings = {
        {"rn", Rounding::Nearest},     {"rz", Rounding::ToZero}, {"rni", Rounding::ToInteger},
        {"rzi", Rounding::CutInteger}, {"rmi", Rounding::Floor}, {"rpi", Rounding::Ceiling},
        {"rna", Rounding::NearestAway}};
    need(types_.size() == 2, "types");
    instruction.type = types_[0];
    instruction.source_type = types_[1];
    Rounding rounding = Rounding::Nearest;
    for (const std::string& modifier : modifiers_) {
      const auto found = roundings.find(modifier);
      if (found != roundings.end()) rounding = found->second;
      need(found != roundings.end() || modifier == "ftz" || type_named(modifier) != Type::None, "modifier");
    }
    instruction.variant = static_cast<int>(rounding);
    result(instruction.type);
    sources(1, instruction.source_type);
    instruction.execute = convert;
  }

  // ---- bits

  void plain(Handler handler, Type type) {
    result_and_sources(type);
    instruction.execute = handler;
  }
  void move() {
    allow({});
    plain(ptx::move, instruction.type);
  }
  void select() {
    allow({});
    result(instruction.type);
    source(1, instruction.type);
    source(2, instruction.type);
    source(3, Type::Predicate);
    instruction.execute = ptx::select;
  }
  void permutation() {
    allow({});
    plain(permute_bytes, Type::B32);
  }
  void bit_extraction() {
    allow({});
    plain(extract_bits, instruction.type);
  }
  void bit_insertion() {
    allow({});
    plain(insert_bits, instruction.type);
  }
  void funnel() {
    allow({"l", "r", "wrap", "clamp"});
    instruction.variant = (has("r") ? kRight : 0) | (has("clamp") ? kClamped : 0);
    plain(funnel_shift, instruction.type);
  }
  void logic() {
    allow({});
    plain(logic_of_three, instruction.type);
  }

  // ---- memory

  void set_address(size_t operand) {
    const Address found = names_.address(operands_[operand]);
    instruction.offset = found.distance;
    if (found.base >= 0) instruction.sources.push_back(found.base);
  }
  void vector_length() {
    static const std::vector<std::string> known = {"global",
                                                   "local",
                                                   "param",
                                                   "const",
                                                   "shared",
                                                   "shared::cta",
                                                   "v2",
                                                   "v4",
                                                   "v8",
                                                   "nc",
                                                   "ca",
                                                   "cg",
                                                   "cs",
                                                   "cv",
                                                   "wb",
                                                   "wt",
                                                   "weak",
                                                   "relaxed",
                                                   "gpu",
                                                   "volatile",
                                                   "L1::no_allocate",
                                                   "L1::evict_first",
                                                   "L1::evict_last",
                                                   "L2::cache_hint",
                                                   "L2::128B"};
    allow(known);
    instruction.count = has("v2") ? 2 : has("v4") ? 4 : has("v8") ? 8 : 1;
  }
  void load() {
    vector_length();
    result(instruction.type);
    set_address(1);
    instruction.execute = ptx::load;
    need(static_cast<int>(instruction.results.size()) == instruction.count, "vector");
  }
  void store() {
    vector_length();
    set_address(0);
    need(instruction.sources.size() == 1, "address");
    source(1, instruction.type);
    instruction.execute = ptx::store;
  }
  void address_conversion() {
    allow({"to", "global", "local", "shared", "const", "param"});
    instruction.variant = has("to") ? 1 : 0;
    plain(convert_address, instruction.type);
  }

  void copy() {
    need(has("async") && !has("bulk") && !has("mbarrier"), "kind of copy");
    if (has("commit_group")) {
      instruction.execute = commit_copies;
    } else if (has("wait_all") || has("wait_group")) {
      instruction.count = has("wait_all") ? -1 : number(0);
      instruction.execute = wait_for_copies;
    } else {
      allow({"async", "ca", "cg", "shared", "shared::cta", "global", "L2::128B", "L2::64B", "L2::256B"});
      set_address(0);
      const Address from = names_.address(operands_[1]);
      instruction.sources.push_back(from.base);
      instruction.second_offset = from.distance;
      instruction.count = number(2);
      if (operands_.size() > 3) source(3, Type::U32);
      instruction.execute = copy_async;
    }
  }

  // ---- warps

  void shuffle() {
    allow({"sync", "up", "down", "bfly", "idx"});
    instruction.together = true;
    const Shuffle kind = has("up")     ? Shuffle::Up
                         : has("down") ? Shuffle::Down
                         : has("bfly") ? Shuffle::Butterfly
                                       : Shuffle::Index;
    instruction.variant = static_cast<int>(kind);
    plain(ptx::shuffle, Type::B32);
  }
  void vote() {
    allow({"sync", "ballot", "any", "all", "uni"});
    instruction.together = true;
    const Vote kind = has("ballot") ? Vote::Ballot : has("any") ? Vote::Any : has("all") ? Vote::All : Vote::Uniform;
    instruction.variant = static_cast<int>(kind);
    result(instruction.type);
    source(1, Type::Predicate);
    instruction.execute = ptx::vote;
  }
  void reduction() {
    static const std::map<std::string, Reduce> kinds = {{"add", Reduce::Add}, {"min", Reduce::Min},
                                                        {"max", Reduce::Max}, {"and", Reduce::And},
                                                        {"or", Reduce::Or},   {"xor", Reduce::Xor}};
    need(modifiers_[0] == "sync" && kinds.count(modifiers_[1]) == 1 && !is_float(instruction.type), "reduction");
    instruction.together = true;
    instruction.variant = static_cast<int>(kinds.at(modifiers_[1]));
    result(instruction.type);
    source(1, instruction.type);
    instruction.execute = reduce;
  }
  void active() {
    result(instruction.type);
    instruction.execute = active_mask;
  }

  // ---- tensor cores

  void matrix() {
    allow({"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta"});
    instruction.together = true;
    instruction.count = has("x4") ? 4 : has("x2") ? 2 : 1;
    instruction.a_transposed = has("trans");
    const bool loads = operation_ == "ldmatrix";
    if (loads) result(Type::B32);
    set_address(loads ? 1 : 0);
    if (!loads) source(1, Type::B32);
    instruction.execute = loads ? load_matrix : store_matrix;
  }

  // Returns the rows; the type is that of a and b, and the sums are float32 or int32.
  int shape() {
    int rows = 0;
    for (const std::string& modifier : modifiers_) {
      if (modifier[0] != 'm' || std::isdigit(static_cast<unsigned char>(modifier[1])) == 0) continue;
      std::sscanf(modifier.c_str(), "m%dn%dk%d", &rows, &instruction.columns, &instruction.depth);
    }
    need(types_.size() >= 3 && types_[1] == types_[2], "types");
    instruction.type = types_[1];
    const bool known = instruction.type == Type::S8 || instruction.type == Type::BF16 ||
                       instruction.type == Type::F16 || instruction.type == Type::TF32;
    need(known && types_[0] == (instruction.type == Type::S8 ? Type::S32 : Type::F32), "types");
    instruction.together = true;
    instruction.saturates = has("satfinite");
    return rows;
  }
  void warp_product() {
    need(shape() == 16 && instruction.columns == 8 && !has("sp"), "shape");
    need(has("row") && has("col"), "layout");
    result_and_sources(Type::B32);
    instruction.execute = multiply;
  }
  void group_product() {
    if (has("fence")) {
      instruction.execute = nothing;
    } else if (has("commit_group")) {
      instruction.execute = commit_products;
    } else if (has("wait_group")) {
      instruction.count = number(0);
      instruction.execute = wait_for_products;
    } else {
      asynchronous_product();
    }
    instruction.together = true;
  }
  // {d}, a or {a}, b, whether d counts, then factors of a and b, then whether a and b are transposed.
  void asynchronous_product() {
    need(has("mma_async") && shape() == 64 && !has("sp"), "shape");
    instruction.a_in_registers = operands_[1][0] == '{';
    result(Type::B32);
    source(1, instruction.a_in_registers ? Type::B32 : Type::B64);
    source(2, Type::B64);
    source(3, Type::Predicate);
    size_t next = 4;
    if (instruction.type != Type::S8) {
      need(number(4) == 1 && number(5) == 1, "factors");
      next = 6;
    }
    if (instruction.type == Type::BF16 || instruction.type == Type::F16) {
      if (!instruction.a_in_registers) instruction.a_transposed = number(next++) != 0;
      instruction.b_transposed = number(next) != 0;
    }
    instruction.execute = multiply_async;
  }

  // ---- flow

  void barrier() {
    instruction.together = true;
    instruction.execute = nothing;
    if (has("warp")) return;
    need(has("sync") && operands_.size() == 1 && operands_[0] == "0", "barrier of a part of the block");
    instruction.flow = Flow::Barrier;
  }
  void fence() { instruction.execute = nothing; }
  void branch() {
    instruction.flow = Flow::Branch;
    instruction.execute = nothing;
    label_ = operands_[0];
  }
  void end() {
    instruction.flow = Flow::Return;
    instruction.execute = nothing;
  }
  void trapping() { instruction.execute = trap; }

  Names& names_;
  std::string operation_, label_;
  std::vector<std::string> modifiers_, operands_;
  std::vector<Type> types_;
};

}  // namespace

Decoded decode(const std::string& statement, Names& names) { return Decoder(statement, names).decoded(); }

}  // namespace ptx
