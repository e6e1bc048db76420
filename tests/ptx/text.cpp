#include "text.h"

#include <cctype>
#include <cstdlib>
#include <cstring>

namespace ptx {

namespace {

bool space(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }

// Cuts where `cuts` says so of a character and of how deep in brackets it is.
template <typename Cuts>
std::vector<std::string> cut(const std::string& text, Cuts cuts) {
  std::vector<std::string> found(1);
  int depth = 0;
  for (const char c : text) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (cuts(c, depth)) {
      found.emplace_back();
    } else {
      found.back() += c;
    }
  }
  return found;
}

}  // namespace

std::string trimmed(const std::string& text) {
  size_t begin = 0, end = text.size();
  while (begin < end && space(text[begin])) ++begin;
  while (end > begin && space(text[end - 1])) --end;
  return text.substr(begin, end - begin);
}

bool starts_with(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0;
}

std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> found;
  for (std::string& word : cut(text, [](char c, int) { return space(c) || c == ','; })) {
    if (!word.empty()) found.push_back(std::move(word));
  }
  return found;
}

std::vector<std::string> operands(const std::string& text) {
  std::vector<std::string> found;
  if (trimmed(text).empty()) return found;
  for (const std::string& operand : cut(text, [](char c, int depth) { return c == ',' && depth == 0; })) {
    found.push_back(trimmed(operand));
  }
  return found;
}

std::vector<std::string> parts(const std::string& text) {
  return cut(text, [](char c, int) { return c == '.'; });
}

bool is_float_literal(const std::string& text) {
  return text.size() > 2 && text[0] == '0' && std::strchr("fFdD", text[1]) != nullptr;
}

uint64_t literal(const std::string& text) {
  if (is_float_literal(text)) return std::strtoull(text.c_str() + 2, nullptr, 16);
  if (text[0] == '-') return uint64_t{0} - std::strtoull(text.c_str() + 1, nullptr, 0);
  return std::strtoull(text.c_str(), nullptr, 0);
}

}  // namespace ptx
