#include "statistics.h"

#include <algorithm>
#include <vector>

namespace ptx {

int sectors(const uint64_t (&addresses)[kLanes], uint32_t lanes, int bytes) {
  std::vector<uint64_t> touched;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    for (uint64_t s = addresses[lane] / 32; s <= (addresses[lane] + bytes - 1) / 32; ++s) touched.push_back(s);
  }
  std::sort(touched.begin(), touched.end());
  return static_cast<int>(std::unique(touched.begin(), touched.end()) - touched.begin());
}

namespace {

// Lanes that read the same word share it; words of one bank wait for each other.
int passes(const uint64_t (&addresses)[kLanes], uint32_t lanes, int bytes, int first, int end) {
  std::vector<uint64_t> banks[32];
  for (int lane = first; lane < end; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    for (uint64_t word = addresses[lane] / 4; word <= (addresses[lane] + bytes - 1) / 4; ++word) {
      std::vector<uint64_t>& bank = banks[word % 32];
      if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
    }
  }
  size_t most = 0;
  for (const auto& bank : banks) most = std::max(most, bank.size());
  return static_cast<int>(most);
}

}  // namespace

int wavefronts(const uint64_t (&addresses)[kLanes], uint32_t lanes, int bytes) {
  const int parts = bytes <= 4 ? 1 : bytes / 4, width = kLanes / parts;
  int total = 0;
  for (int part = 0; part < parts; ++part) {
    total += passes(addresses, lanes, bytes, part * width, (part + 1) * width);
  }
  return total;
}

}  // namespace ptx
