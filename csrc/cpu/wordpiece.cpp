#include "wordpiece.h"

#include <algorithm>

namespace sentfast::cpu {
namespace {

char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + ('a' - 'A')) : c; }

// U+2010 to U+2027 in UTF-8: dashes, quotation marks, dots. Nothing in it decomposes.
constexpr size_t kGeneralSize = 3;

bool is_general_punctuation(std::string_view text) {
  if (text.size() < kGeneralSize || text[0] != '\xe2' || text[1] != '\x80') return false;
  const auto last = static_cast<uint8_t>(text[2]);
  return last >= 0x90 && last <= 0xa7;
}

constexpr uint32_t kSeed = 0x811c9dc5u;

uint32_t longer(uint32_t hash, char letter) {
  hash = (hash ^ static_cast<uint8_t>(letter)) * 0x9e3779b1u;
  return hash ^ (hash >> 15);
}

uint32_t hash_of(std::string_view piece) {
  uint32_t hash = kSeed;
  for (const char c : piece) hash = longer(hash, c);
  return hash;
}

constexpr std::string_view kGoesOn = "##";

bool goes_on(std::string_view piece) { return piece.substr(0, kGoesOn.size()) == kGoesOn; }

}  // namespace

WordPiece::Table::Table(size_t count) {
  size_t size = 16;
  while (size < 2 * count) size *= 2;
  slots_.resize(size);
}

void WordPiece::Table::add(std::string_view piece, int32_t id) {
  const uint32_t hash = hash_of(piece);
  size_t i = hash & (slots_.size() - 1);
  while (slots_[i].id >= 0) i = (i + 1) & (slots_.size() - 1);
  slots_[i] = {hash, static_cast<uint32_t>(letters_.size()), static_cast<uint32_t>(piece.size()), id};
  letters_ += piece;
  longest_ = std::max(longest_, piece.size());
}

int32_t WordPiece::Table::find(std::string_view piece, uint32_t hash) const {
  for (size_t i = hash & (slots_.size() - 1); slots_[i].id >= 0; i = (i + 1) & (slots_.size() - 1)) {
    const Slot& slot = slots_[i];
    if (slot.hash == hash && std::string_view(letters_.data() + slot.begin, slot.size) == piece) return slot.id;
  }
  return -1;
}

WordPiece::WordPiece(const Vocabulary& vocabulary, std::vector<std::string> added, int32_t unknown, size_t longest_word,
                     bool lowercase)
    : first_(vocabulary.size()),
      further_(vocabulary.size()),
      added_(std::move(added)),
      unknown_(unknown),
      longest_word_(longest_word) {
  for (const auto& [piece, id] : vocabulary) {
    if (goes_on(piece)) {
      further_.add(std::string_view(piece).substr(kGoesOn.size()), id);
    } else {
      first_.add(piece, id);
    }
  }
  for (int i = 0; i < 256; ++i) {
    const auto c = static_cast<char>(i);
    kind_[i] = kind_of(c);
    letter_[i] = lowercase ? lower(c) : c;
  }
  for (std::string& token : added_) {
    for (char& c : token) c = lower(c);
    for (int i = 0; i < 256; ++i) begins_added_[i] |= lower(static_cast<char>(i)) == token.front();
  }
}

WordPiece::Kind WordPiece::kind_of(char c) {
  if (c == ' ' || c == '\t' || c == '\n' || c == '\r') return kSpace;
  if (c < ' ' || c > '~') return kOther;
  return (c >= '0' && c <= '9') || (lower(c) >= 'a' && lower(c) <= 'z') ? kLetter : kPunctuation;
}

// Some added tokens are looked for in the text as it is, others in lower case.
bool WordPiece::may_hold_added(std::string_view rest) const {
  return std::any_of(added_.begin(), added_.end(), [&](const std::string& token) {
    return token.size() <= rest.size() &&
           std::equal(token.begin(), token.end(), rest.begin(), [](char a, char b) { return a == lower(b); });
  });
}

// The longest piece at the beginning, then the longest of what is left; where there is none the whole word is unknown.
void WordPiece::encode_word(std::string_view word, std::vector<uint32_t>& hashes, std::vector<int32_t>& ids) const {
  const size_t before = ids.size();
  for (size_t begin = 0; begin < word.size();) {
    const Table& table = begin == 0 ? first_ : further_;
    const size_t most = std::min(word.size() - begin, table.longest());
    hashes.clear();
    uint32_t hash = kSeed;
    for (size_t i = 0; i < most; ++i) {
      hash = longer(hash, word[begin + i]);
      hashes.push_back(hash);
    }
    size_t size = most;
    int32_t id = -1;
    while (size > 0 && (id = table.find(word.substr(begin, size), hashes[size - 1])) < 0) --size;
    if (size == 0) {
      ids.resize(before);
      ids.push_back(unknown_);
      return;
    }
    ids.push_back(id);
    begin += size;
  }
}

WordPiece::Kind WordPiece::kind_at(std::string_view text, size_t i) const {
  const auto c = static_cast<uint8_t>(text[i]);
  if (begins_added_[c] && may_hold_added(text.substr(i))) return kOther;
  return is_general_punctuation(text.substr(i)) ? kPunctuation : kind_[c];
}

bool WordPiece::encode(std::string_view text, size_t most, std::vector<int32_t>& ids) const {
  const size_t before = ids.size();
  std::string word;
  std::vector<uint32_t> hashes;
  for (size_t i = 0; i < text.size() && ids.size() - before < most;) {
    Kind kind = kind_at(text, i);
    if (kind == kPunctuation) {
      const size_t size = is_general_punctuation(text.substr(i)) ? kGeneralSize : 1;
      encode_word(text.substr(i, size), hashes, ids);
      i += size;
    } else if (kind == kSpace) {
      ++i;
    } else {
      word.clear();
      for (; i < text.size() && (kind = kind_at(text, i)) == kLetter; ++i)
        word += letter_[static_cast<uint8_t>(text[i])];
      // Whatever it is, it might belong to the word.
      if (kind == kOther) {
        ids.resize(before);
        return false;
      }
      if (word.size() > longest_word_) {
        ids.push_back(unknown_);
      } else {
        encode_word(word, hashes, ids);
      }
    }
  }
  if (ids.size() - before > most) ids.resize(before + most);
  return true;
}

}  // namespace sentfast::cpu
