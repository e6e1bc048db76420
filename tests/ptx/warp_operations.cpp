// What the lanes of a warp do together: exchange, vote, reduce.
#include <algorithm>

#include "machine.h"

namespace ptx {

namespace {

struct From {
  int lane;
  bool inside;
};

// The lane that `lane` reads from; bits 0 to 4 of `limits` are the bound, bits 8 to 12 the segments.
From shuffle_source(Shuffle kind, int lane, uint32_t by, uint32_t limits) {
  const int segment = static_cast<int>(limits >> 8 & 31), bound = static_cast<int>(limits & 31);
  const int last = (lane & segment) | (bound & ~segment), first = lane & segment, step = static_cast<int>(by & 31);
  int from = 0;
  bool inside = false;
  switch (kind) {
    case Shuffle::Up:
      from = lane - step;
      inside = from >= last;
      break;
    case Shuffle::Down:
      from = lane + step;
      inside = from <= last;
      break;
    case Shuffle::Butterfly:
      from = lane ^ step;
      inside = from <= last;
      break;
    case Shuffle::Index:
      from = first | (step & ~segment);
      inside = from <= last;
  }
  return {inside ? from : lane, inside};
}

}  // namespace

void shuffle(Machine& machine, Warp& warp, const Instruction& i, uint32_t lanes) {
  ++machine.counts.shuffles;
  uint64_t given[kLanes];
  std::memcpy(given, warp[i.sources[0]], sizeof given);
  const uint64_t *by = warp[i.sources[1]], *limits = warp[i.sources[2]], *members = warp[i.sources[3]];
  each_lane(lanes, [&](int lane) {
    if ((static_cast<uint32_t>(members[lane]) & warp.alive) != lanes) {
      machine.report(i, "the lanes of the mask are not those that execute this");
    }
    const From from = shuffle_source(static_cast<Shuffle>(i.variant), lane, static_cast<uint32_t>(by[lane]),
                                     static_cast<uint32_t>(limits[lane]));
    if (!(lanes >> from.lane & 1)) machine.report(i, "reads from a lane that does not execute this");
    warp[i.results[0]][lane] = static_cast<uint32_t>(given[from.lane]);
    if (i.results.size() > 1) warp[i.results[1]][lane] = from.inside;
  });
}

void vote(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t* predicate = warp[i.sources[0]];
  uint32_t yes = 0;
  each_lane(lanes, [&](int lane) { yes |= static_cast<uint32_t>((predicate[lane] != 0) != i.negated) << lane; });
  uint64_t result = yes;
  if (static_cast<Vote>(i.variant) == Vote::Any) result = yes != 0;
  if (static_cast<Vote>(i.variant) == Vote::All) result = yes == lanes;
  if (static_cast<Vote>(i.variant) == Vote::Uniform) result = yes == 0 || yes == lanes;
  each_lane(lanes, [&](int lane) { warp[i.results[0]][lane] = result; });
}

namespace {

uint32_t reduced(Reduce kind, bool has_sign, uint32_t a, uint32_t b) {
  const bool less = has_sign ? static_cast<int32_t>(a) < static_cast<int32_t>(b) : a < b;
  switch (kind) {
    case Reduce::Add:
      return a + b;
    case Reduce::Min:
      return less ? a : b;
    case Reduce::Max:
      return less ? b : a;
    case Reduce::And:
      return a & b;
    case Reduce::Or:
      return a | b;
    default:
      return a ^ b;
  }
}

}  // namespace

void reduce(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint64_t* given = warp[i.sources[0]];
  const int first = __builtin_ctz(lanes);
  uint32_t result = static_cast<uint32_t>(given[first]);
  each_lane(lanes & ~(1u << first), [&](int lane) {
    result = reduced(static_cast<Reduce>(i.variant), i.type == Type::S32, result, static_cast<uint32_t>(given[lane]));
  });
  each_lane(lanes, [&](int lane) { warp[i.results[0]][lane] = result; });
}

void active_mask(Machine&, Warp& warp, const Instruction& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) { warp[i.results[0]][lane] = lanes; });
}

}  // namespace ptx
