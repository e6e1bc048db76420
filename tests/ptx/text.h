// Cutting PTX text into words and operands.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

std::string trimmed(const std::string& text);
bool starts_with(const std::string& text, const std::string& start);

// Between spaces and commas.
std::vector<std::string> words(const std::string& text);

// Between commas that are not inside braces or brackets.
std::vector<std::string> operands(const std::string& text);

// Between dots.
std::vector<std::string> parts(const std::string& text);

// A literal's bits: decimal, hexadecimal, octal, or a float written as 0f or 0d and its bits.
uint64_t literal(const std::string& text);
bool is_float_literal(const std::string& text);

}  // namespace ptx
