// Walks over the text of a PTX module.
#include <cctype>

#include "decoder.h"
#include "text.h"

namespace ptx {

namespace {

class Parser {
 public:
  Parser(const std::string& text, Module& module) : text_(text), module_(module), names_(module) {}

  void parse() {
    while (skip_blank() && !at(".section")) statement_of_module();
  }

 private:
  bool at(const char* word) const { return text_.compare(position_, std::char_traits<char>::length(word), word) == 0; }

  void advance() {
    if (text_[position_] == '\n') ++line_;
    ++position_;
  }
  void skip_line() {
    while (position_ < text_.size() && text_[position_] != '\n') ++position_;
  }
  void skip_comment() {
    const size_t end = text_.find("*/", position_);
    if (end == std::string::npos) throw Failure("a comment without end");
    while (position_ < end + 2) advance();
  }
  // Passes over spaces and comments; false at the end.
  bool skip_blank() {
    while (position_ < text_.size()) {
      if (at("//")) {
        skip_line();
      } else if (at("/*")) {
        skip_comment();
      } else if (std::isspace(static_cast<unsigned char>(text_[position_])) != 0) {
        advance();
      } else {
        return true;
      }
    }
    return false;
  }
  // What comes before one of the characters, which is passed over, without comments and on one line.
  std::string until(const char* ends) {
    std::string found;
    while (position_ < text_.size() && std::string(ends).find(text_[position_]) == std::string::npos) {
      if (at("//")) {
        skip_line();
        continue;
      }
      const bool space = std::isspace(static_cast<unsigned char>(text_[position_])) != 0;
      found += space ? ' ' : text_[position_];
      advance();
    }
    if (position_ < text_.size()) advance();
    return trimmed(found);
  }

  void statement_of_module() {
    for (const char* word : {".version", ".target", ".address_size", ".file"}) {
      if (at(word)) return skip_line();
    }
    const size_t end = text_.find_first_of(";(\n", position_);
    const std::string head = text_.substr(position_, end - position_);
    if (head.find(".entry") != std::string::npos) return kernel();
    const std::string declaration = until(";");
    if (declaration.find(".func") != std::string::npos) throw Failure("device functions are unknown: " + declaration);
    names_.declare_variable(declaration);
  }

  void kernel() {
    const std::string name = words(until("(")).back();
    Kernel& kernel = module_.kernels[name];
    kernel.name = name;
    kernel_ = &kernel;
    names_.enter_kernel(kernel);
    names_.declare_parameters(until(")"));
    until("{");  // directives about performance
    labels_.clear();
    branches_.clear();
    body();
    Decoded end = decode("ret", names_);
    end.instruction.line = line_;
    kernel.code.push_back(std::move(end.instruction));
    names_.leave_kernel();
    join_branches();
  }

  void body() {
    int depth = 1;
    while (skip_blank()) {
      const char c = text_[position_];
      if (c == '{') {
        advance();
        ++depth;
        names_.enter_scope();
      } else if (c == '}') {
        advance();
        if (--depth == 0) return;
        names_.leave_scope();
      } else if (c == ';') {
        advance();
      } else if (c == '.') {
        directive();
      } else if (!label()) {
        instruction();
      }
    }
    throw Failure("a kernel without end");
  }

  void directive() {
    if (at(".loc") || at(".file")) return skip_line();
    const std::string text = until(";");
    if (starts_with(text, ".reg")) {
      names_.declare_registers(text);
    } else if (starts_with(text, ".shared") || starts_with(text, ".local")) {
      names_.declare_variable(text);
    } else if (!starts_with(text, ".pragma")) {
      throw Failure("unknown directive " + text);
    }
  }

  bool label() {
    size_t end = position_;
    const auto in_name = [](char c) {
      return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$';
    };
    while (end < text_.size() && in_name(text_[end])) ++end;
    if (end == position_ || text_[end] != ':' || text_[end + 1] == ':') return false;
    labels_[text_.substr(position_, end - position_)] = static_cast<int>(kernel_->code.size());
    position_ = end + 1;
    return true;
  }

  void instruction() {
    const int line = line_;
    const std::string statement = until(";");
    Decoded decoded = decoded_at(line, statement);
    decoded.instruction.line = line;
    if (!decoded.label.empty()) branches_.emplace_back(kernel_->code.size(), decoded.label);
    kernel_->code.push_back(std::move(decoded.instruction));
  }

  Decoded decoded_at(int line, const std::string& statement) {
    try {
      return decode(statement, names_);
    } catch (const Failure& failure) {
      throw Failure("line " + std::to_string(line) + ", `" + statement + "`: " + failure.what());
    }
  }

  void join_branches() {
    for (const auto& [place, name] : branches_) {
      const auto found = labels_.find(name);
      if (found == labels_.end()) throw Failure("unknown label " + name);
      kernel_->code[place].target = found->second;
    }
  }

  const std::string& text_;
  size_t position_ = 0;
  int line_ = 1;
  Module& module_;
  Names names_;
  Kernel* kernel_ = nullptr;
  std::map<std::string, int> labels_;
  std::vector<std::pair<size_t, std::string>> branches_;
};

}  // namespace

std::unique_ptr<Module> parse(const std::string& text) {
  auto module = std::make_unique<Module>();
  Parser(text, *module).parse();
  return module;
}

}  // namespace ptx
