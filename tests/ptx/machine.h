// The state of a launch: memory, warps, what was found wrong.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "program.h"
#include "statistics.h"

namespace ptx {

constexpr uint32_t kAllLanes = 0xffffffffu;
// Where the generic addresses of shared and local memory begin.
constexpr uint64_t kSharedBase = uint64_t{1} << 60, kLocalBase = uint64_t{2} << 60;

template <typename Function>
inline void each_lane(uint32_t lanes, Function function) {
  if (lanes == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) function(lane);
    return;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes >> lane & 1) function(lane);
  }
}

// When copies and products of the tensor core that run beside the program happen: as soon or as late as they may.
enum class Moment { Early, Late, Random, EarlyCopiesLateProducts };

struct Options {
  Moment moment = Moment::Random;
  bool watch_shared = true, watch_global = true;
  bool round_to_zero = true;  // sums of the tensor core
};

// A copy from global to shared memory by the lanes of a warp, or the end of a group of them.
struct Copy {
  const Instruction* instruction = nullptr;
  bool ends_group = false;
  uint32_t lanes = 0;  // for which it is still to be done
  uint64_t target[kLanes], source[kLanes];
  uint32_t bytes[kLanes];  // that are read; the rest is zeros
};

// A product of four warps, as one of them sees it, or the end of a group of them.
struct Product {
  const Instruction* instruction = nullptr;
  bool ends_group = false;
  uint64_t a = 0, b = 0;  // descriptors
  uint32_t adds = 0;      // lanes whose accumulators count
};

struct Warp {
  int number = 0;
  uint64_t* registers = nullptr;  // [register][lane]
  uint8_t* local = nullptr;       // [lane][local bytes]
  uint32_t alive = 0;             // lanes that have not returned
  uint32_t parked = 0;            // lanes that wait for the others before an instruction they execute together
  bool at_barrier = false;
  bool together = true;  // all lanes are at `place`
  int place = 0;
  int places[kLanes];
  std::vector<Copy> copies;
  std::vector<Product> products;

  uint64_t* operator[](int number) { return registers + static_cast<size_t>(number) * kLanes; }
};

// Who has touched a byte of shared memory since the last barrier.
struct Touched {
  uint32_t write_epoch = 0, read_epoch = 0, readers = 0;
  int16_t writer = -1;
};

// Which block has touched each two bytes of a piece of a tensor; -1 for none.
struct Piece {
  static constexpr uint64_t kBytes = 4096;
  int writer[kBytes / 2], reader[kBytes / 2];
  Piece() {
    std::fill(std::begin(writer), std::end(writer), -1);
    std::fill(std::begin(reader), std::end(reader), -1);
  }
};

// The memory of a tensor; pieces are made when they are touched, since a tensor may be larger than this machine's
// memory.
struct Buffer {
  uint64_t begin, end;
  std::string name;
  std::vector<std::unique_ptr<Piece>> pieces;
};

struct Machine {
  const Kernel* kernel = nullptr;
  const uint8_t* parameters = nullptr;
  Options options;
  uint32_t grid[3], threads[3];
  int block = 0;
  std::vector<Buffer> buffers;  // by address; empty: global memory is not watched
  std::vector<uint8_t> shared;
  std::vector<Touched> touched;
  uint32_t epoch = 0;  // barriers so far
  std::vector<Warp> warps;
  std::vector<uint64_t> registers;
  std::vector<uint8_t> local;
  std::mt19937 random;
  bool counting = false;
  Statistics counts;
  std::vector<std::string> errors;
  std::map<std::string, int> reported;

  // Remembers a mistake of the kernel, once per place; execution goes on.
  void report(const Instruction& instruction, const std::string& what);
  bool chance() { return random() & 1; }
};

// ---- memory.cpp: every access, watched

// Whether the bytes lie inside a tensor; if not, that is reported.
bool global_access(Machine& machine, const Warp& warp, const Instruction& instruction, uint64_t address, int bytes,
                   bool writes);
void read_shared(Machine& machine, const Warp& warp, const Instruction& instruction, uint64_t address, int bytes,
                 void* to);
void write_shared(Machine& machine, const Warp& warp, const Instruction& instruction, uint64_t address, int bytes,
                  const void* from);

// ---- handlers, by file

// memory.cpp
void load(Machine&, Warp&, const Instruction&, uint32_t);
void store(Machine&, Warp&, const Instruction&, uint32_t);
void convert_address(Machine&, Warp&, const Instruction&, uint32_t);  // variant 1: from generic
// copies.cpp
void copy_async(Machine&, Warp&, const Instruction&, uint32_t);
void commit_copies(Machine&, Warp&, const Instruction&, uint32_t);
void wait_for_copies(Machine&, Warp&, const Instruction&, uint32_t);  // count -1: for all
// warp_operations.cpp
enum class Shuffle { Up, Down, Butterfly, Index };
enum class Vote { Ballot, Any, All, Uniform };
enum class Reduce { Add, Min, Max, And, Or, Xor };
void shuffle(Machine&, Warp&, const Instruction&, uint32_t);
void vote(Machine&, Warp&, const Instruction&, uint32_t);
void reduce(Machine&, Warp&, const Instruction&, uint32_t);
void active_mask(Machine&, Warp&, const Instruction&, uint32_t);
// tensor_core.cpp
void load_matrix(Machine&, Warp&, const Instruction&, uint32_t);
void store_matrix(Machine&, Warp&, const Instruction&, uint32_t);
void multiply(Machine&, Warp&, const Instruction&, uint32_t);
void multiply_async(Machine&, Warp&, const Instruction&, uint32_t);
void commit_products(Machine&, Warp&, const Instruction&, uint32_t);
void wait_for_products(Machine&, Warp&, const Instruction&, uint32_t);
// scheduler.cpp
void nothing(Machine&, Warp&, const Instruction&, uint32_t);
void trap(Machine&, Warp&, const Instruction&, uint32_t);

// ---- arithmetic.cpp and conversions.cpp: handlers by operation and type; null where there is none

Handler arithmetic(const std::string& operation, Type type, bool flushes, bool nan_wins);
Handler wide_product(bool adds, Type type);
Handler high_product(Type type);
Handler fused_product(Type type, bool flushes);
Handler comparison(Type type, bool flushes);  // variant: outcomes_named, times 16 a Join
int outcomes_named(const std::string& name);  // 0 if there is no such comparison
void move(Machine&, Warp&, const Instruction&, uint32_t);
void select(Machine&, Warp&, const Instruction&, uint32_t);
void permute_bytes(Machine&, Warp&, const Instruction&, uint32_t);
void extract_bits(Machine&, Warp&, const Instruction&, uint32_t);
void insert_bits(Machine&, Warp&, const Instruction&, uint32_t);
void funnel_shift(Machine&, Warp&, const Instruction&, uint32_t);  // variant: FunnelShift bits
void logic_of_three(Machine&, Warp&, const Instruction&, uint32_t);
void convert(Machine&, Warp&, const Instruction&, uint32_t);

enum FunnelShift { kRight = 1, kClamped = 2 };
// Of a comparison: how its result is joined with the third source.
enum class Join { Alone, And, Or, Xor };
// Of a conversion: of a float to an integer, or of both to fewer bits.
enum class Rounding { Nearest, ToZero, ToInteger, CutInteger, Floor, Ceiling, NearestAway };

// ---- scheduler.cpp

// Runs all blocks of a grid in random order.
void run_grid(Machine& machine, uint32_t dynamic_shared);

}  // namespace ptx
