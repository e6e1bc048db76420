// Tensor cores: matrices between registers and shared memory, products of a warp (mma) and of four (wgmma).
#include <algorithm>

#include "machine.h"

namespace ptx {

namespace {

constexpr int kRows = 16;  // of a and of the result, per warp
constexpr int kMostColumns = 256, kMostDepth = 32;

void check_whole(Machine& machine, const Instruction& i, uint32_t lanes) {
  if (lanes != kAllLanes) machine.report(i, "executed by a part of a warp");
}

// The rows of 8 by 8 halves that ldmatrix and stmatrix move: lane 8 m + r has the address of row r of matrix m.
struct RowAddresses {
  uint64_t of[kLanes];
  RowAddresses(Warp& warp, const Instruction& i) {
    const uint64_t* base = warp[i.sources[0]];
    for (int lane = 0; lane < kLanes; ++lane) of[lane] = (base[lane] + i.offset) & 0xffffffff;
  }
};

void count_rows(Machine& machine, const RowAddresses& rows, int matrix, bool writes) {
  if (!machine.counting) return;
  uint64_t addresses[kLanes] = {};
  for (int row = 0; row < 8; ++row) addresses[row] = rows.of[8 * matrix + row];
  const int passes = wavefronts(addresses, 0xff, 16);
  ++(writes ? machine.counts.shared_stores : machine.counts.shared_loads);
  (writes ? machine.counts.shared_store_wavefronts : machine.counts.shared_load_wavefronts) += passes;
}

}  // namespace

// A lane holds the elements 2 t and 2 t + 1 of row g, where lane = 4 g + t; of column g if the matrix is turned.
void load_matrix(Machine& machine, Warp& warp, const Instruction& i, uint32_t lanes) {
  check_whole(machine, i, lanes);
  const RowAddresses rows(warp, i);
  uint16_t matrices[4][8][8];  // results may be the register that held the addresses
  for (int m = 0; m < i.count; ++m) {
    count_rows(machine, rows, m, false);
    for (int row = 0; row < 8; ++row) read_shared(machine, warp, i, rows.of[8 * m + row], 16, matrices[m][row]);
  }
  for (int m = 0; m < i.count; ++m) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint32_t first = i.a_transposed ? matrices[m][t][g] : matrices[m][g][t];
      const uint32_t second = i.a_transposed ? matrices[m][t + 1][g] : matrices[m][g][t + 1];
      warp[i.results[m]][lane] = first | second << 16;
    }
  }
}

void store_matrix(Machine& machine, Warp& warp, const Instruction& i, uint32_t lanes) {
  check_whole(machine, i, lanes);
  const RowAddresses rows(warp, i);
  for (int m = 0; m < i.count; ++m) {
    uint16_t matrix[8][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint64_t both = warp[i.sources[1 + m]][lane];
      (i.a_transposed ? matrix[t][g] : matrix[g][t]) = static_cast<uint16_t>(both);
      (i.a_transposed ? matrix[t + 1][g] : matrix[g][t + 1]) = static_cast<uint16_t>(both >> 16);
    }
    count_rows(machine, rows, m, true);
    for (int row = 0; row < 8; ++row) write_shared(machine, warp, i, rows.of[8 * m + row], 16, matrix[row]);
  }
}

// ---- products

namespace {

// An element of a or b. All numbers that a tensor core multiplies are exact in double, and so are the products.
double element(Type type, uint64_t bits) {
  if (type == Type::S8) return static_cast<int8_t>(bits);
  return type == Type::TF32 ? tf32_value(bits) : half_value(type, bits);
}

int element_bytes(Type type) { return type == Type::S8 ? 1 : type == Type::TF32 ? 4 : 2; }

// One warp's part of a product: c += a b.
struct Tile {
  double a[kRows][kMostDepth], b[kMostDepth][kMostColumns], c[kRows][kMostColumns];

  void multiply(int columns, int depth) {
    for (int m = 0; m < kRows; ++m) {
      for (int k = 0; k < depth; ++k) {
        for (int n = 0; n < columns; ++n) c[m][n] += a[m][k] * b[k][n];
      }
    }
  }
};

// Calls `give` with the place in the matrix and the bits of every element of a in the registers of a warp.
void read_a(Warp& warp, const Instruction& i, const int* registers, Tile& tile) {
  const int bytes = element_bytes(i.type), each = 4 / bytes;
  const int count = i.depth / (2 * each);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < count; ++r) {
      const uint64_t bits = warp[registers[r]][lane];
      for (int e = 0; e < each; ++e) {
        tile.a[g + r % 2 * 8][each * t + e + r / 2 * 4 * each] = element(i.type, bits >> (8 * bytes * e));
      }
    }
  }
}

void read_b(Warp& warp, const Instruction& i, const int* registers, Tile& tile) {
  const int bytes = element_bytes(i.type), each = 4 / bytes;
  const int count = i.depth / (4 * each);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < count; ++r) {
      const uint64_t bits = warp[registers[r]][lane];
      for (int e = 0; e < each; ++e) tile.b[each * t + e + r * 4 * each][g] = element(i.type, bits >> (8 * bytes * e));
    }
  }
}

double accumulator(const Instruction& i, uint64_t bits) {
  return i.type == Type::S8 ? static_cast<double>(static_cast<int32_t>(bits)) : Bits<float>::get(bits);
}

// The exact sum of one instruction; the hardware cuts what does not fit into float32.
uint64_t sum_bits(const Machine& machine, const Instruction& i, double exact) {
  if (i.type == Type::S8) {
    const double inside = std::min(std::max(exact, -0x1p31), 0x1p31 - 1);
    return static_cast<uint32_t>(static_cast<int64_t>(i.saturates ? inside : exact));
  }
  float near = static_cast<float>(exact);
  const bool larger = std::fabs(static_cast<double>(near)) > std::fabs(exact);
  if (machine.options.round_to_zero && std::isfinite(exact) && larger) near = std::nextafter(near, 0.0f);
  return Bits<float>::put(near);
}

// The place of accumulator r of a lane.
struct Cell {
  int row, column;
  Cell(int lane, int r) : row(lane / 4 + r / 2 % 2 * 8), column(r / 4 * 8 + lane % 4 * 2 + r % 2) {}
};

void write_sums(const Machine& machine, Warp& warp, const Instruction& i, const Tile& tile) {
  for (int r = 0; r < i.columns / 2; ++r) {
    uint64_t* result = warp[i.results[r]];
    for (int lane = 0; lane < kLanes; ++lane) {
      const Cell cell(lane, r);
      result[lane] = sum_bits(machine, i, tile.c[cell.row][cell.column]);
    }
  }
}

}  // namespace

void multiply(Machine& machine, Warp& warp, const Instruction& i, uint32_t lanes) {
  check_whole(machine, i, lanes);
  ++machine.counts.tensor_core;
  static thread_local Tile tile;
  const int each = 4 / element_bytes(i.type);
  const int* sources = i.sources.data();
  const int a_count = i.depth / (2 * each), b_count = i.depth / (4 * each);
  read_a(warp, i, sources, tile);
  read_b(warp, i, sources + a_count, tile);
  for (int r = 0; r < 4; ++r) {
    const uint64_t* before = warp[sources[a_count + b_count + r]];
    for (int lane = 0; lane < kLanes; ++lane) {
      const Cell cell(lane, r);
      tile.c[cell.row][cell.column] = accumulator(i, before[lane]);
    }
  }
  tile.multiply(i.columns, i.depth);
  write_sums(machine, warp, i, tile);
}

// ---- wgmma: operands in shared memory, described by 64 bits

namespace {

enum Swizzle { kNone, k128Bytes, k64Bytes, k32Bytes };

struct Descriptor {
  uint64_t address, leading, stride;
  Swizzle swizzle;
  explicit Descriptor(uint64_t bits)
      : address((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        swizzle(static_cast<Swizzle>(bits >> 62)) {}

  // Bytes of a row before the next one begins.
  int width() const { return swizzle == k128Bytes ? 128 : swizzle == k64Bytes ? 64 : swizzle == k32Bytes ? 32 : 16; }

  // Where byte `along` of line `across` lies: lines follow each other in cores of 8, pieces of 16 bytes are permuted.
  uint64_t place(int across, int along, bool transposed) const {
    const int part = swizzle == kNone ? 16 : width();
    uint64_t at = address + across % 8 * part + along % part;
    if (transposed && swizzle == kNone) {
      at += across / 8 * leading + along / part * stride;
    } else {
      at += across / 8 * stride + along / part * leading;
    }
    const uint64_t permuted = swizzle == k128Bytes ? 7 : swizzle == k64Bytes ? 3 : swizzle == k32Bytes ? 1 : 0;
    return at ^ (at >> 7 & permuted) << 4;
  }
};

struct Operand {
  Descriptor descriptor;
  bool transposed;   // the columns of a, or the rows of b, follow each other in memory
  int first, count;  // rows of a or columns of b
};

// Reads an operand in pieces of 16 bytes and calls `give(row of a or column of b, place along the sum, number)`.
template <typename Give>
void read_operand(Machine& machine, Warp& warp, const Instruction& i, const Operand& operand, Give give) {
  const int bytes = element_bytes(i.type), piece = 16 / bytes;
  const int lines = operand.transposed ? i.depth : operand.count;
  const int length = operand.transposed ? operand.count : i.depth;
  const int first_line = operand.transposed ? 0 : operand.first, first = operand.transposed ? operand.first : 0;
  for (int line = 0; line < lines; ++line) {
    for (int at = 0; at < length; at += piece) {
      uint8_t memory[16];
      const int along = (first + at) * bytes;
      read_shared(machine, warp, i, operand.descriptor.place(first_line + line, along, operand.transposed), 16, memory);
      for (int e = 0; e < piece && at + e < length; ++e) {
        uint32_t bits = 0;
        std::memcpy(&bits, memory + e * bytes, bytes);
        const double number = element(i.type, bits);
        operand.transposed ? give(at + e, line, number) : give(line, at + e, number);
      }
    }
  }
}

void perform(Machine& machine, Warp& warp, const Product& product) {
  static thread_local Tile tile;
  const Instruction& i = *product.instruction;
  if (i.a_in_registers) {
    read_a(warp, i, i.sources.data(), tile);
  } else {
    // Each of four warps has 16 of the 64 rows.
    const Operand a{Descriptor(product.a), i.a_transposed, kRows * (warp.number % 4), kRows};
    read_operand(machine, warp, i, a, [&](int m, int k, double x) { tile.a[m][k] = x; });
  }
  const Operand b{Descriptor(product.b), i.b_transposed, 0, i.columns};
  read_operand(machine, warp, i, b, [&](int n, int k, double x) { tile.b[k][n] = x; });
  for (int r = 0; r < i.columns / 2; ++r) {
    const uint64_t* before = warp[i.results[r]];
    for (int lane = 0; lane < kLanes; ++lane) {
      const Cell cell(lane, r);
      tile.c[cell.row][cell.column] = (product.adds >> lane & 1) != 0 ? accumulator(i, before[lane]) : 0.0;
    }
  }
  tile.multiply(i.columns, i.depth);
  write_sums(machine, warp, i, tile);
}

// A product may start early only where none is pending before it: they happen in order.
bool at_once(Machine& machine, const Warp& warp) {
  if (machine.options.moment == Moment::Early) return true;
  return machine.options.moment == Moment::Random && warp.products.empty() && machine.chance();
}

}  // namespace

void multiply_async(Machine& machine, Warp& warp, const Instruction& i, uint32_t lanes) {
  check_whole(machine, i, lanes);
  ++machine.counts.tensor_core;
  const size_t b = i.sources.size() - 2;
  Product product;
  product.instruction = &i;
  product.a = i.a_in_registers ? 0 : warp[i.sources[0]][0];
  product.b = warp[i.sources[b]][0];
  const uint64_t* adds = warp[i.sources[b + 1]];
  for (int lane = 0; lane < kLanes; ++lane) product.adds |= static_cast<uint32_t>(adds[lane] != 0) << lane;
  if (at_once(machine, warp)) {
    perform(machine, warp, product);
  } else {
    warp.products.push_back(product);
  }
}

void commit_products(Machine&, Warp& warp, const Instruction&, uint32_t) {
  Product end;
  end.ends_group = true;
  warp.products.push_back(end);
}

void wait_for_products(Machine& machine, Warp& warp, const Instruction& i, uint32_t) {
  int pending = 0;
  for (const Product& product : warp.products) pending += product.ends_group;
  size_t done = 0;
  while (done < warp.products.size() && pending > i.count) {
    const Product& product = warp.products[done++];
    if (product.ends_group) {
      --pending;
    } else {
      perform(machine, warp, product);
    }
  }
  warp.products.erase(warp.products.begin(), warp.products.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace ptx
