// Memory: every access is looked at for bounds, alignment and races.
#include <algorithm>

#include "machine.h"

namespace ptx {

namespace {

Buffer* buffer_at(Machine& machine, uint64_t address, int bytes) {
  auto after = std::upper_bound(machine.buffers.begin(), machine.buffers.end(), address,
                                [](uint64_t a, const Buffer& buffer) { return a < buffer.begin; });
  if (after == machine.buffers.begin()) return nullptr;
  Buffer& buffer = *--after;
  return address + bytes <= buffer.end ? &buffer : nullptr;
}

// The address as a distance from the nearest tensor.
std::string beside(const Machine& machine, uint64_t address) {
  uint64_t least = ~uint64_t{0};
  std::string place = "nowhere near a tensor";
  for (const Buffer& buffer : machine.buffers) {
    const bool before = address < buffer.begin;
    const uint64_t distance = before ? buffer.begin - address : address - buffer.end;
    if (distance >= least) continue;
    least = distance;
    place = std::to_string(distance) + (before ? " bytes before " : " bytes after the end of ") + buffer.name;
  }
  return place;
}

Piece& piece_at(Buffer& buffer, uint64_t offset) {
  if (buffer.pieces.empty()) buffer.pieces.resize((buffer.end - buffer.begin) / Piece::kBytes + 1);
  std::unique_ptr<Piece>& piece = buffer.pieces[offset / Piece::kBytes];
  if (piece == nullptr) piece = std::make_unique<Piece>();
  return *piece;
}

// Blocks of a grid run in any order, so what one has written no other may touch, nor write what another has read.
void watch_blocks(Machine& machine, const Instruction& instruction, Buffer& buffer, uint64_t address, int bytes,
                  bool writes) {
  const uint64_t first = (address - buffer.begin) / 2 * 2, end = address + bytes - buffer.begin;
  for (uint64_t offset = first; offset < end; offset += 2) {
    Piece& piece = piece_at(buffer, offset);
    int &writer = piece.writer[offset % Piece::kBytes / 2], &reader = piece.reader[offset % Piece::kBytes / 2];
    const bool written = writer >= 0 && writer != machine.block, read = reader >= 0 && reader != machine.block;
    if (written) {
      const std::string what = writes ? "two blocks write to " : "a block reads what another writes to ";
      machine.report(instruction, "global race: " + what + buffer.name);
    }
    if (writes && read) {
      machine.report(instruction, "global race: a block writes what another reads in " + buffer.name);
    }
    (writes ? writer : reader) = machine.block;
  }
}

void check_alignment(Machine& machine, const Instruction& instruction, uint64_t address, int bytes) {
  if (address % bytes != 0) machine.report(instruction, "misaligned access of " + std::to_string(bytes) + " bytes");
}

void check_shared(Machine& machine, const Instruction& instruction, uint64_t address, int bytes) {
  check_alignment(machine, instruction, address, bytes);
  if (address + bytes <= machine.shared.size()) return;
  machine.report(instruction, "shared memory has " + std::to_string(machine.shared.size()) + " bytes, this is byte " +
                                  std::to_string(address));
  throw Failure("access outside shared memory");
}

std::string pair(int first, int second) { return "warps " + std::to_string(first) + " and " + std::to_string(second); }

void watch_read(Machine& machine, const Warp& warp, const Instruction& instruction, uint64_t address, int bytes) {
  for (int i = 0; i < bytes; ++i) {
    Touched& byte = machine.touched[address + i];
    if (byte.write_epoch == machine.epoch && byte.writer != warp.number) {
      machine.report(instruction,
                     "shared race: " + pair(byte.writer, warp.number) + " write and read without a barrier");
    }
    if (byte.read_epoch != machine.epoch) {
      byte.read_epoch = machine.epoch;
      byte.readers = 0;
    }
    byte.readers |= 1u << warp.number;
  }
}

// Writing what is there already is no race: threads may store the same number.
void watch_write(Machine& machine, const Warp& warp, const Instruction& instruction, uint64_t address, int bytes,
                 const uint8_t* from) {
  for (int i = 0; i < bytes; ++i) {
    Touched& byte = machine.touched[address + i];
    const bool changes = machine.shared[address + i] != from[i];
    if (changes && byte.write_epoch == machine.epoch && byte.writer != warp.number) {
      machine.report(instruction, "shared race: " + pair(byte.writer, warp.number) + " both write without a barrier");
    }
    if (changes && byte.read_epoch == machine.epoch && (byte.readers & ~(1u << warp.number)) != 0) {
      machine.report(instruction, "shared race: a warp overwrites what another reads without a barrier");
    }
    byte.write_epoch = machine.epoch;
    byte.writer = static_cast<int16_t>(warp.number);
  }
}

}  // namespace

bool global_access(Machine& machine, const Warp& warp, const Instruction& instruction, uint64_t address, int bytes,
                   bool writes) {
  check_alignment(machine, instruction, address, bytes);
  if (machine.buffers.empty()) return true;
  Buffer* buffer = buffer_at(machine, address, bytes);
  if (buffer == nullptr) {
    machine.report(instruction, std::string(writes ? "writes " : "reads ") + std::to_string(bytes) +
                                    " bytes outside every tensor, " + beside(machine, address) + " (block " +
                                    std::to_string(machine.block) + ", warp " + std::to_string(warp.number) + ")");
    return false;
  }
  if (machine.options.watch_global) watch_blocks(machine, instruction, *buffer, address, bytes, writes);
  return true;
}

void read_shared(Machine& machine, const Warp& warp, const Instruction& instruction, uint64_t address, int bytes,
                 void* to) {
  check_shared(machine, instruction, address, bytes);
  if (machine.options.watch_shared) watch_read(machine, warp, instruction, address, bytes);
  std::memcpy(to, &machine.shared[address], bytes);
}

void write_shared(Machine& machine, const Warp& warp, const Instruction& instruction, uint64_t address, int bytes,
                  const void* from) {
  check_shared(machine, instruction, address, bytes);
  if (machine.options.watch_shared) {
    watch_write(machine, warp, instruction, address, bytes, static_cast<const uint8_t*>(from));
  }
  std::memcpy(&machine.shared[address], from, bytes);
}

// ---- loads and stores

namespace {

struct Place {
  Space space;
  uint64_t address;
};

Place resolved(Space space, uint64_t address) {
  if (space == Space::Shared) return {space, address & 0xffffffff};
  if (space != Space::Generic) return {space, address};
  if (address >> 60 == 1) return {Space::Shared, address - kSharedBase};
  if (address >> 60 == 2) return {Space::Local, address - kLocalBase};
  return {Space::Global, address};
}

uint8_t* local_memory(Machine& machine, Warp& warp, int lane, uint64_t address, int bytes) {
  if (address + bytes > machine.kernel->local_bytes) throw Failure("access outside local memory");
  return warp.local + static_cast<size_t>(lane) * machine.kernel->local_bytes + address;
}

void read(Machine& machine, Warp& warp, const Instruction& instruction, int lane, uint64_t address, int bytes,
          void* to) {
  const Place place = resolved(instruction.space, address);
  if (place.space == Space::Shared) {
    read_shared(machine, warp, instruction, place.address, bytes, to);
  } else if (place.space == Space::Local) {
    std::memcpy(to, local_memory(machine, warp, lane, place.address, bytes), bytes);
  } else if (place.space == Space::Parameter) {
    std::memcpy(to, machine.parameters + place.address, bytes);
  } else if (place.space == Space::Constant || global_access(machine, warp, instruction, place.address, bytes, false)) {
    std::memcpy(to, reinterpret_cast<const void*>(place.address), bytes);
  } else {
    std::memset(to, 0xff, bytes);
  }
}

void write(Machine& machine, Warp& warp, const Instruction& instruction, int lane, uint64_t address, int bytes,
           const void* from) {
  const Place place = resolved(instruction.space, address);
  if (place.space == Space::Shared) {
    write_shared(machine, warp, instruction, place.address, bytes, from);
  } else if (place.space == Space::Local) {
    std::memcpy(local_memory(machine, warp, lane, place.address, bytes), from, bytes);
  } else if (global_access(machine, warp, instruction, place.address, bytes, true)) {
    std::memcpy(reinterpret_cast<void*>(place.address), from, bytes);
  }
}

void count_access(Machine& machine, const Instruction& instruction, const uint64_t (&addresses)[kLanes], uint32_t lanes,
                  int bytes, bool writes) {
  if (!machine.counting) return;
  Statistics& counts = machine.counts;
  if (instruction.space == Space::Global) {
    ++(writes ? counts.global_stores : counts.global_loads);
    (writes ? counts.global_store_sectors : counts.global_load_sectors) += sectors(addresses, lanes, bytes);
    (writes ? counts.global_store_bytes : counts.global_load_bytes) +=
        static_cast<uint64_t>(bytes) * __builtin_popcount(lanes);
  } else if (instruction.space == Space::Shared) {
    ++(writes ? counts.shared_stores : counts.shared_loads);
    (writes ? counts.shared_store_wavefronts : counts.shared_load_wavefronts) += wavefronts(addresses, lanes, bytes);
  }
}

// Registers hold small signed numbers as 32 bits.
uint64_t extended(Type type, uint64_t bits) {
  if (type == Type::S8) return static_cast<uint32_t>(static_cast<int8_t>(bits));
  if (type == Type::S16) return static_cast<uint32_t>(static_cast<int16_t>(bits));
  return bits;
}

}  // namespace

void load(Machine& machine, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int size = bytes_of(i.type), bytes = size * i.count;
  const uint64_t* base = i.sources.empty() ? nullptr : warp[i.sources[0]];
  uint64_t addresses[kLanes];
  each_lane(lanes, [&](int lane) { addresses[lane] = (base != nullptr ? base[lane] : 0) + i.offset; });
  count_access(machine, i, addresses, lanes, bytes, false);
  each_lane(lanes, [&](int lane) {
    uint8_t memory[32];
    read(machine, warp, i, lane, addresses[lane], bytes, memory);
    for (int element = 0; element < i.count; ++element) {
      uint64_t bits = 0;
      std::memcpy(&bits, memory + element * size, size);
      warp[i.results[element]][lane] = extended(i.type, bits);
    }
  });
}

void store(Machine& machine, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int size = bytes_of(i.type), bytes = size * i.count;
  const uint64_t* base = warp[i.sources[0]];
  uint64_t addresses[kLanes];
  each_lane(lanes, [&](int lane) { addresses[lane] = base[lane] + i.offset; });
  count_access(machine, i, addresses, lanes, bytes, true);
  each_lane(lanes, [&](int lane) {
    uint8_t memory[32];
    for (int element = 0; element < i.count; ++element) {
      std::memcpy(memory + element * size, &warp[i.sources[1 + element]][lane], size);
    }
    write(machine, warp, i, lane, addresses[lane], bytes, memory);
  });
}

void convert_address(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t base = i.space == Space::Shared ? kSharedBase : i.space == Space::Local ? kLocalBase : 0;
  const uint64_t* from = warp[i.sources[0]];
  uint64_t* to = warp[i.results[0]];
  each_lane(lanes, [&](int lane) { to[lane] = i.variant == 1 ? from[lane] - base : from[lane] + base; });
}

}  // namespace ptx
