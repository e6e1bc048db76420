// Runs warps in random order, in slices of random length, and the blocks of a grid in random order.
#include <algorithm>
#include <climits>
#include <numeric>

#include "machine.h"

namespace ptx {

void Machine::report(const Instruction& instruction, const std::string& what) {
  // Numbers differ from lane to lane; a place and the kind of the mistake are news once.
  const std::string key = std::to_string(instruction.line) + what.substr(0, what.find_first_of("0123456789"));
  if (reported[key]++ > 0 || errors.size() >= 20) return;
  errors.push_back(kernel->name + ": line " + std::to_string(instruction.line) + " of the PTX, `" + instruction.text +
                   "`: " + what);
}

void nothing(Machine&, Warp&, const Instruction&, uint32_t) {}

void trap(Machine& machine, Warp&, const Instruction& i, uint32_t) {
  machine.report(i, "trap");
  throw Failure("the kernel trapped");
}

namespace {

constexpr int kLongestSlice = 400;  // instructions of a warp before another may go on

enum class State { Running, Waiting, Done };

// Lanes that have come to different places go on from the earliest one, until they meet again.
uint32_t choose_lanes(Machine& machine, Warp& warp, int& place) {
  if (warp.together) {
    place = warp.place;
    return warp.alive;
  }
  ++machine.counts.divergent;
  if ((warp.alive & ~warp.parked) == 0) warp.parked = 0;  // all wait: they must be at the same place, see below
  const uint32_t ready = warp.alive & ~warp.parked;
  place = INT_MAX;
  each_lane(ready, [&](int lane) { place = std::min(place, warp.places[lane]); });
  uint32_t lanes = 0;
  each_lane(warp.alive, [&](int lane) { lanes |= static_cast<uint32_t>(warp.places[lane] == place) << lane; });
  if (lanes == warp.alive) {
    warp.together = true;
    warp.place = place;
    warp.parked = 0;
  }
  return lanes;
}

void set_place(Warp& warp, uint32_t lanes, int place) {
  if (warp.together) {
    warp.place = place;
  } else {
    each_lane(lanes, [&](int lane) { warp.places[lane] = place; });
  }
}

void part(Warp& warp) {
  if (!warp.together) return;
  std::fill(warp.places, warp.places + kLanes, warp.place);
  warp.together = false;
}

void branch(Warp& warp, const Instruction& i, uint32_t lanes, uint32_t taken, int place) {
  if (taken == lanes || taken == 0) {
    set_place(warp, lanes, taken != 0 ? i.target : place + 1);
    return;
  }
  part(warp);
  set_place(warp, taken, i.target);
  set_place(warp, lanes & ~taken, place + 1);
}

State leave(Warp& warp, uint32_t lanes, uint32_t leaving, int place) {
  warp.alive &= ~leaving;
  if (warp.alive == 0) return State::Done;
  set_place(warp, lanes & ~leaving, place + 1);
  return State::Running;
}

uint32_t predicated(Warp& warp, const Instruction& i, uint32_t lanes) {
  if (i.predicate < 0) return lanes;
  const uint64_t* predicate = warp[i.predicate];
  uint32_t true_lanes = 0;
  each_lane(lanes, [&](int lane) {
    true_lanes |= static_cast<uint32_t>((predicate[lane] != 0) != i.predicate_negated) << lane;
  });
  return true_lanes;
}

State wait_at_barrier(Machine& machine, Warp& warp, const Instruction& i, uint32_t lanes, uint32_t active, int place) {
  if (active != warp.alive) machine.report(i, "barrier reached by a part of a warp");
  ++machine.counts.barriers;
  warp.at_barrier = true;
  set_place(warp, lanes, place + 1);
  return State::Waiting;
}

// What lanes execute together waits for those that are still on their way; lanes that can never meet are a deadlock.
bool must_wait(Machine& machine, Warp& warp, const Instruction& i, uint32_t lanes) {
  if (!i.together || lanes == warp.alive || i.predicate >= 0) return false;
  warp.parked |= lanes;
  if (warp.parked == warp.alive) {
    machine.report(i, "deadlock: lanes of a warp wait for each other at different places");
    throw Failure("deadlock");
  }
  return true;
}

State step(Machine& machine, Warp& warp) {
  int place = 0;
  const uint32_t lanes = choose_lanes(machine, warp, place);
  const Instruction& i = machine.kernel->code[place];
  if (must_wait(machine, warp, i, lanes)) return State::Running;
  const uint32_t active = predicated(warp, i, lanes);
  ++machine.counts.instructions;
  machine.counts.lanes += __builtin_popcount(active);
  if (i.flow == Flow::Branch) {
    branch(warp, i, lanes, active, place);
    return State::Running;
  }
  if (i.flow == Flow::Return) return leave(warp, lanes, active, place);
  if (i.flow == Flow::Barrier && active != 0) return wait_at_barrier(machine, warp, i, lanes, active, place);
  if (active != 0) i.execute(machine, warp, i, active);
  set_place(warp, lanes, place + 1);
  return State::Running;
}

// ---- blocks

using Coordinates = uint32_t[3];

uint32_t special_value(const Machine& machine, const std::string& name, const Coordinates& block, uint32_t thread) {
  const uint32_t x = machine.threads[0], y = machine.threads[1];
  const uint32_t places[3] = {thread % x, thread / x % y, thread / (x * y)};
  if (name == "%laneid") return thread % kLanes;
  if (name == "%warpid") return thread / kLanes;
  if (name.rfind("%clusterid.", 0) == 0) return 0;
  const size_t dot = name.find('.');
  const uint32_t axis = dot == std::string::npos ? 3 : static_cast<uint32_t>(name[dot + 1] - 'x');
  if (axis < 3) {
    const std::string what = name.substr(0, dot);
    if (what == "%tid") return places[axis];
    if (what == "%ctaid") return block[axis];
    if (what == "%ntid") return machine.threads[axis];
    if (what == "%nctaid") return machine.grid[axis];
  }
  throw Failure("unknown special register " + name);
}

void start(Machine& machine, Warp& warp, const Coordinates& block, uint32_t threads) {
  warp.alive = 0;
  warp.parked = 0;
  warp.at_barrier = false;
  warp.together = true;
  warp.place = 0;
  warp.copies.clear();
  warp.products.clear();
  const uint32_t first = static_cast<uint32_t>(warp.number) * kLanes;
  for (uint32_t lane = 0; lane < kLanes && first + lane < threads; ++lane) warp.alive |= 1u << lane;
  for (const auto& [name, number] : machine.kernel->special) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      warp[number][lane] = special_value(machine, name, block, first + lane);
    }
  }
}

// A barrier opens when all warps that have not ended are there.
bool open_barrier(Machine& machine, std::vector<Warp*>& ready) {
  for (Warp& warp : machine.warps) {
    if (warp.alive == 0) continue;
    warp.at_barrier = false;
    ready.push_back(&warp);
  }
  ++machine.epoch;
  return !ready.empty();
}

void run_block(Machine& machine, const Coordinates& block, uint32_t threads) {
  std::fill(machine.shared.begin(), machine.shared.end(), 0xff);  // NaN in every type
  ++machine.epoch;
  std::vector<Warp*> ready;
  for (Warp& warp : machine.warps) {
    start(machine, warp, block, threads);
    ready.push_back(&warp);
  }
  while (!ready.empty()) {
    const size_t chosen = machine.random() % ready.size();
    State state = State::Running;
    for (uint32_t left = 1 + machine.random() % kLongestSlice; left > 0 && state == State::Running; --left) {
      state = step(machine, *ready[chosen]);
    }
    if (state == State::Running) continue;
    ready.erase(ready.begin() + static_cast<std::ptrdiff_t>(chosen));
    if (ready.empty() && !open_barrier(machine, ready)) return;
  }
}

void fill_register(Warp& warp, int number, uint64_t value) { std::fill(warp[number], warp[number] + kLanes, value); }

uint32_t aligned(uint32_t bytes) { return (bytes + 15) / 16 * 16; }

void make_warps(Machine& machine, uint32_t threads) {
  const Kernel& kernel = *machine.kernel;
  const size_t count = (threads + kLanes - 1) / kLanes;
  machine.registers.assign(count * kernel.registers * kLanes, 0);
  machine.local.assign(count * kLanes * kernel.local_bytes, 0xff);
  machine.warps.assign(count, Warp());
  for (size_t number = 0; number < count; ++number) {
    Warp& warp = machine.warps[number];
    warp.number = static_cast<int>(number);
    warp.registers = machine.registers.data() + number * kernel.registers * kLanes;
    warp.local = machine.local.data() + number * kLanes * kernel.local_bytes;
    for (const auto& [target, value] : kernel.constants) fill_register(warp, target, value);
    if (kernel.dynamic_shared_register >= 0) {
      fill_register(warp, kernel.dynamic_shared_register, aligned(kernel.shared_bytes));
    }
  }
}

void check_launch(const Machine& machine, uint32_t threads) {
  const uint32_t* grid = machine.grid;
  if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) throw Failure("a grid without blocks: a GPU refuses it");
  if (grid[1] > 65535 || grid[2] > 65535 || grid[0] > INT_MAX) throw Failure("the grid is too large");
  if (threads == 0 || threads > 1024) throw Failure("a block has 1 to 1024 threads");
}

}  // namespace

void run_grid(Machine& machine, uint32_t dynamic_shared) {
  const uint32_t threads = machine.threads[0] * machine.threads[1] * machine.threads[2];
  check_launch(machine, threads);
  make_warps(machine, threads);
  machine.shared.resize(aligned(machine.kernel->shared_bytes) + dynamic_shared);
  machine.touched.assign(machine.options.watch_shared ? machine.shared.size() : 0, Touched());
  const uint32_t *grid = machine.grid, blocks = grid[0] * grid[1] * grid[2];
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), machine.random);
  for (const uint32_t number : order) {
    machine.block = static_cast<int>(number);
    const Coordinates block = {number % grid[0], number / grid[0] % grid[1], number / grid[0] / grid[1]};
    run_block(machine, block, threads);
  }
}

}  // namespace ptx
