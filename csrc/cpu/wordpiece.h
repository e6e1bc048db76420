// The tokenizer of BERT for texts in plain ASCII: lower case, words and punctuation, the longest pieces of a
// vocabulary.
//
// Follows BertNormalizer, BertPreTokenizer and WordPiece of the tokenizers library, on the texts where none of their
// tables of Unicode is needed. Knows no Python and no PyTorch; const after it is made, so threads can share it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace sentfast::cpu {

class WordPiece {
 public:
  using Vocabulary = std::vector<std::pair<std::string, int32_t>>;

  // A piece that begins with "##" goes on a word. longest_word: characters of a word above which it is unknown.
  // added: tokens that are looked for in a text before anything else, none empty; a text that may hold one is declined.
  WordPiece(const Vocabulary& vocabulary, std::vector<std::string> added, int32_t unknown, size_t longest_word,
            bool lowercase);

  // Appends the first `most` ids of a text in UTF-8, or returns false and leaves `ids` as they were.
  bool encode(std::string_view text, size_t most, std::vector<int32_t>& ids) const;

 private:
  // From strings to numbers, with open addressing. The hash of a string is made of that of the string without its last
  // character, so that all beginnings of a word are hashed in one pass.
  class Table {
   public:
    explicit Table(size_t count);
    void add(std::string_view piece, int32_t id);
    // The number of a piece, -1 if it has none. hash: of the piece.
    int32_t find(std::string_view piece, uint32_t hash) const;
    size_t longest() const { return longest_; }

   private:
    struct Slot {
      uint32_t hash, begin, size;
      int32_t id = -1;
    };
    std::vector<Slot> slots_;
    std::string letters_;  // of all pieces
    size_t longest_ = 0;
  };

  // Other: a control character, which the normaliser takes out of the middle of a word, an added token, the rest of
  // Unicode.
  enum Kind : uint8_t { kLetter, kSpace, kPunctuation, kOther };

  static Kind kind_of(char c);
  Kind kind_at(std::string_view text, size_t i) const;
  void encode_word(std::string_view word, std::vector<uint32_t>& hashes, std::vector<int32_t>& ids) const;
  bool may_hold_added(std::string_view rest) const;

  Table first_, further_;
  std::vector<std::string> added_;  // in lower case
  int32_t unknown_;
  size_t longest_word_;
  Kind kind_[256];
  char letter_[256];  // what a character becomes
  bool begins_added_[256] = {};
};

}  // namespace sentfast::cpu
