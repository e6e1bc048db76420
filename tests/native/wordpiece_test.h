// The tokenizer against a search of the vocabulary from the longest piece down.
#pragma once

#include <map>
#include <string>

#include "../../csrc/cpu/wordpiece.h"
#include "check.h"

namespace check {

inline std::string letters(const std::string& alphabet, int64_t most) {
  std::string found;
  for (int64_t i = integer(0, most); i > 0; --i) {
    found += alphabet[static_cast<size_t>(integer(0, static_cast<int64_t>(alphabet.size()) - 1))];
  }
  return found;
}

// The ids of one word by WordPiece's definition.
inline std::vector<int32_t> plain_pieces(const std::map<std::string, int32_t>& vocabulary, const std::string& word,
                                         size_t longest, int32_t unknown) {
  std::vector<int32_t> ids;
  if (word.size() > longest) return {unknown};
  for (size_t begin = 0; begin < word.size();) {
    size_t size = word.size() - begin;
    const auto piece = [&] { return (begin > 0 ? "##" : "") + word.substr(begin, size); };
    while (size > 0 && vocabulary.count(piece()) == 0) --size;
    if (size == 0) return {unknown};
    ids.push_back(vocabulary.at(piece()));
    begin += size;
  }
  return ids;
}

inline void test_wordpiece() {
  std::map<std::string, int32_t> vocabulary;
  for (int64_t i = integer(1, 60); i > 0; --i) {
    const std::string piece = letters("abc", 4);
    if (!piece.empty()) vocabulary.emplace((integer(0, 1) == 0 ? "##" : "") + piece, integer(0, 1000));
  }
  vocabulary.emplace("\xe2\x80\x94", 1001);
  const int32_t unknown = 1002;
  const auto longest = static_cast<size_t>(integer(1, 12));
  const WordPiece tokenizer({vocabulary.begin(), vocabulary.end()}, {"[X]", "cab"}, unknown, longest, true);
  std::string text;
  std::vector<int32_t> expected = {7};
  bool declined = false;
  for (int64_t i = integer(0, 8); i > 0; --i) {
    const std::string word = letters("abc", 14);
    for (const char c : word) text += integer(0, 1) == 0 ? c : static_cast<char>(c - 'a' + 'A');
    declined = declined || word.find("cab") != std::string::npos;
    for (const int32_t id : plain_pieces(vocabulary, word, longest, unknown)) expected.push_back(id);
    const bool dash = integer(0, 2) == 0;
    text += dash ? "\xe2\x80\x94" : letters(" \t\n", 3) + " ";
    if (dash) expected.push_back(1001);
  }
  const auto most = static_cast<size_t>(integer(1, 40));
  std::vector<int32_t> ids = {7};
  const bool done = tokenizer.encode(text, most, ids);
  if (done && expected.size() > most + 1) expected.resize(most + 1);
  // A text that ends early may be done before the added token in it is met.
  close("wordpiece", done ? ids == expected : declined && ids.size() == 1, 1, 0);
  for (const char* rest : {"[x]", "\x01", "\xc3\xa9", "\xe2\x80", "\xe2\x80\xa8", "a\xcc\x81"}) {
    close("wordpiece, declined", tokenizer.encode(rest, most, ids), 0, 0);
  }
}

}  // namespace check
