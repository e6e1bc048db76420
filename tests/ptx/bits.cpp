// Instructions that move bits without regard to what they mean.
#include <algorithm>

#include "machine.h"

namespace ptx {

namespace {

uint64_t low_bits(int bits) { return bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1; }

}  // namespace

// One register to another, to several that share its bits, or several to one.
void move(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int parts = static_cast<int>(std::max(i.results.size(), i.sources.size()));
  if (parts == 1) {
    const uint64_t* from = warp[i.sources[0]];
    uint64_t* to = warp[i.results[0]];
    each_lane(lanes, [&](int lane) { to[lane] = from[lane]; });
    return;
  }
  const int width = 8 * bytes_of(i.type) / parts;
  const uint64_t mask = low_bits(width);
  each_lane(lanes, [&](int lane) {
    if (i.results.size() > 1) {
      const uint64_t whole = warp[i.sources[0]][lane];
      for (int part = 0; part < parts; ++part) warp[i.results[part]][lane] = whole >> (width * part) & mask;
      return;
    }
    uint64_t whole = 0;
    for (int part = 0; part < parts; ++part) whole |= (warp[i.sources[part]][lane] & mask) << (width * part);
    warp[i.results[0]][lane] = whole;
  });
}

void select(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t *a = warp[i.sources[0]], *b = warp[i.sources[1]], *which = warp[i.sources[2]];
  uint64_t* result = warp[i.results[0]];
  each_lane(lanes, [&](int lane) { result[lane] = which[lane] != 0 ? a[lane] : b[lane]; });
}

// Each nibble of the selector names a byte of both sources; its highest bit asks for the byte's sign.
void permute_bytes(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t *a = warp[i.sources[0]], *b = warp[i.sources[1]], *selector = warp[i.sources[2]];
  uint64_t* result = warp[i.results[0]];
  each_lane(lanes, [&](int lane) {
    const uint64_t both = (b[lane] & 0xffffffff) << 32 | (a[lane] & 0xffffffff);
    uint32_t bytes = 0;
    for (int position = 0; position < 4; ++position) {
      const uint32_t nibble = static_cast<uint32_t>(selector[lane] >> (4 * position)) & 15;
      uint32_t byte = static_cast<uint32_t>(both >> (8 * (nibble & 7))) & 0xff;
      if ((nibble & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
      bytes |= byte << (8 * position);
    }
    result[lane] = bytes;
  });
}

// Bits past the end of the number are its sign, or zero.
void extract_bits(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t *a = warp[i.sources[0]], *position = warp[i.sources[1]], *length = warp[i.sources[2]];
  const int width = 8 * bytes_of(i.type);
  const bool has_sign = i.type == Type::S32 || i.type == Type::S64;
  each_lane(lanes, [&](int lane) {
    const int first = static_cast<int>(position[lane] & 0xff), count = static_cast<int>(length[lane] & 0xff);
    const uint64_t number = a[lane] & low_bits(width);
    const int top = std::min(first + count - 1, width - 1);
    const bool negative = has_sign && count > 0 && (number >> top & 1) != 0;
    const uint64_t inside = first < width ? number >> first & low_bits(std::min(count, width - first)) : 0;
    const int known = first < width ? std::min(count, width - first) : 0;
    const uint64_t filled = negative ? inside | ~low_bits(known) : inside;
    warp[i.results[0]][lane] = filled & low_bits(width);
  });
}

void insert_bits(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t *a = warp[i.sources[0]], *b = warp[i.sources[1]];
  const uint64_t *position = warp[i.sources[2]], *length = warp[i.sources[3]];
  const int width = 8 * bytes_of(i.type);
  each_lane(lanes, [&](int lane) {
    const int first = static_cast<int>(position[lane] & 0xff), count = static_cast<int>(length[lane] & 0xff);
    const uint64_t hole = first < width ? low_bits(count) << first : 0;
    const uint64_t moved = first < width ? a[lane] << first : 0;
    warp[i.results[0]][lane] = ((b[lane] & ~hole) | (moved & hole)) & low_bits(width);
  });
}

void funnel_shift(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t *a = warp[i.sources[0]], *b = warp[i.sources[1]], *by = warp[i.sources[2]];
  each_lane(lanes, [&](int lane) {
    const uint64_t both = (b[lane] & 0xffffffff) << 32 | (a[lane] & 0xffffffff);
    const uint32_t given = static_cast<uint32_t>(by[lane]);
    const uint32_t steps = (i.variant & kClamped) != 0 ? std::min(given, 32u) : given & 31;
    const uint64_t shifted = (i.variant & kRight) != 0 ? both >> steps : both << steps >> 32;
    warp[i.results[0]][lane] = shifted & 0xffffffff;
  });
}

// The fourth source is the table of a function of three bits.
void logic_of_three(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t *a = warp[i.sources[0]], *b = warp[i.sources[1]], *c = warp[i.sources[2]], *table = warp[i.sources[3]];
  each_lane(lanes, [&](int lane) {
    uint64_t result = 0;
    for (int entry = 0; entry < 8; ++entry) {
      if (!(table[lane] >> entry & 1)) continue;
      result |= ((entry & 4) != 0 ? a[lane] : ~a[lane]) & ((entry & 2) != 0 ? b[lane] : ~b[lane]) &
                ((entry & 1) != 0 ? c[lane] : ~c[lane]);
    }
    warp[i.results[0]][lane] = result & 0xffffffff;
  });
}

}  // namespace ptx
