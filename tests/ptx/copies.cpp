// Copies from global to shared memory that run beside the program (cp.async).
#include "machine.h"

namespace ptx {

namespace {

void perform(Machine& machine, const Warp& warp, const Copy& copy) {
  const Instruction& i = *copy.instruction;
  each_lane(copy.lanes, [&](int lane) {
    uint8_t memory[16] = {};
    const int given = static_cast<int>(copy.bytes[lane]);
    // A copy that reads less than it writes may start anywhere.
    const int aligned = given < i.count ? 1 : i.count;
    if (given > 0 && global_access(machine, warp, i, copy.source[lane], aligned, false)) {
      std::memcpy(memory, reinterpret_cast<const void*>(copy.source[lane]), given);
    }
    write_shared(machine, warp, i, copy.target[lane], i.count, memory);
  });
}

void count(Machine& machine, const Copy& copy) {
  if (!machine.counting) return;
  uint32_t reading = 0;
  each_lane(copy.lanes, [&](int lane) { reading |= static_cast<uint32_t>(copy.bytes[lane] > 0) << lane; });
  const int bytes = copy.instruction->count;
  ++machine.counts.copies;
  machine.counts.copy_sectors += sectors(copy.source, reading, bytes);
  machine.counts.copy_bytes += static_cast<uint64_t>(bytes) * __builtin_popcount(reading);
  machine.counts.shared_store_wavefronts += wavefronts(copy.target, copy.lanes, bytes);
}

bool at_once(Machine& machine) {
  switch (machine.options.moment) {
    case Moment::Late:
      return false;
    case Moment::Random:
      return machine.chance();
    default:
      return true;
  }
}

}  // namespace

void copy_async(Machine& machine, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t *target = warp[i.sources[0]], *source = warp[i.sources[1]];
  const uint64_t* bytes = i.sources.size() > 2 ? warp[i.sources[2]] : nullptr;
  Copy copy;
  copy.instruction = &i;
  copy.lanes = lanes;
  each_lane(lanes, [&](int lane) {
    copy.target[lane] = (target[lane] + i.offset) & 0xffffffff;
    copy.source[lane] = source[lane] + i.second_offset;
    copy.bytes[lane] = bytes != nullptr ? static_cast<uint32_t>(bytes[lane]) : static_cast<uint32_t>(i.count);
  });
  count(machine, copy);
  if (at_once(machine)) {
    perform(machine, warp, copy);
    return;
  }
  warp.copies.push_back(copy);
}

void commit_copies(Machine&, Warp& warp, const Instruction&, uint32_t) {
  Copy end;
  end.ends_group = true;
  warp.copies.push_back(end);
}

void wait_for_copies(Machine& machine, Warp& warp, const Instruction& i, uint32_t) {
  int pending = 0;
  for (const Copy& copy : warp.copies) pending += copy.ends_group;
  size_t done = 0;
  // wait_all waits for copies outside groups too.
  while (done < warp.copies.size() && (i.count < 0 || pending > i.count)) {
    const Copy& copy = warp.copies[done++];
    if (copy.ends_group) {
      --pending;
    } else {
      perform(machine, warp, copy);
    }
  }
  warp.copies.erase(warp.copies.begin(), warp.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace ptx
