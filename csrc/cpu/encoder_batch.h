// The batch of the packed encoder, read and checked, and how it is divided among threads.
//
// A group is some whole sequences. Either each thread carries groups of its own through all layers, with no waiting,
// or, where there are too few for that, all threads share the work of each step of one group.
#pragma once

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "encoder_model.h"

namespace sentfast::cpu::packed {

// Tokens of a group: enough to use a panel of weights often, few enough that their activations stay in cache.
constexpr int64_t kGroupTokens = 192;
// The same where weights lie in rows: they are read once for every kInPlaceRows of them.
constexpr int64_t kGroupTokensInRows = 384;
// Multiply-adds of a layer below which threads cost more than they bring.
constexpr int64_t kWorthSharing = int64_t{2} << 20;
// The threads that share a group must be idle for less than this, else the group is shared step by step.
constexpr double kBalanced = 0.8;

struct Batch {
  const int32_t *ids, *types, *cu_seqlens;  // types may be nullptr
  const int32_t* position_ids;
  std::vector<int32_t> made_position_ids;
  int64_t tokens, sequences;
};

inline const int32_t* read_ids(const Tensor& x, const char* name, int64_t count, int64_t limit) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.dim() == 1 && x.scalar_type() == ScalarType::Int, name,
                  ": expected a contiguous int32 CPU tensor of one dimension");
  STD_TORCH_CHECK(count < 0 || x.numel() == count, name, ": expected ", count, " elements, got ", x.numel());
  const auto* ids = static_cast<const int32_t*>(x.const_data_ptr());
  for (int64_t i = 0; limit >= 0 && i < x.numel(); ++i) {
    STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < limit, name, ": expected 0 to ", limit - 1, ", got ", ids[i]);
  }
  return ids;
}

inline Batch read_batch(const Model& m, const Tensor& input_ids, const Tensor& cu_seqlens,
                        const std::optional<Tensor>& token_type_ids, const std::optional<Tensor>& position_ids,
                        int64_t position_offset) {
  Batch b = {};
  b.ids = read_ids(input_ids, "input_ids", -1, m.vocabulary);
  b.tokens = input_ids.numel();
  STD_TORCH_CHECK(cu_seqlens.numel() >= 1, "cu_seqlens: expected shape [B + 1]");
  b.cu_seqlens = read_ids(cu_seqlens, "cu_seqlens", -1, -1);
  b.sequences = cu_seqlens.numel() - 1;
  int64_t longest = 0;
  bool rising = b.cu_seqlens[0] == 0 && b.cu_seqlens[b.sequences] == b.tokens;
  for (int64_t i = 0; i < b.sequences; ++i) {
    const int64_t length = int64_t{b.cu_seqlens[i + 1]} - b.cu_seqlens[i];
    rising = rising && length >= 0;
    longest = std::max(longest, length);
  }
  STD_TORCH_CHECK(rising, "cu_seqlens: expected to rise from 0 to ", b.tokens, " (the number of tokens)");
  STD_TORCH_CHECK(m.attention_bias == nullptr || longest <= m.bias_reach, "input_ids: expected sequences of at most ",
                  m.bias_reach, " tokens, got ", longest);
  if (token_type_ids.has_value() && m.types != nullptr) {
    b.types = read_ids(*token_type_ids, "token_type_ids", b.tokens, m.type_count);
  }
  int64_t limit = INT32_MAX;
  if (m.positions != nullptr) limit = m.position_count;
  if (m.rotary != nullptr) limit = std::min(limit, m.rotary_positions);
  if (position_ids.has_value()) {
    b.position_ids = read_ids(*position_ids, "position_ids", b.tokens, limit);
    return b;
  }
  STD_TORCH_CHECK(position_offset >= 0 && position_offset <= limit - longest,
                  "input_ids: expected sequences of at most ", limit - position_offset, " tokens, got ", longest);
  b.made_position_ids.resize(static_cast<size_t>(b.tokens));
  for (int64_t i = 0; i < b.sequences; ++i) {
    const auto begin = b.made_position_ids.begin();
    std::iota(begin + b.cu_seqlens[i], begin + b.cu_seqlens[i + 1], static_cast<int32_t>(position_offset));
  }
  b.position_ids = b.made_position_ids.data();
  return b;
}

// ---- groups ----

struct Group {
  int64_t begin, end, tokens;  // sequences
};

struct Plan {
  std::vector<Group> groups;  // largest first
  bool shared;                // all threads work on one group at a time
};

// Cuts the sequences into `count` groups of about as many tokens each; fewer where sequences are long.
inline std::vector<Group> cut(const Batch& b, int64_t count) {
  std::vector<Group> groups;
  int64_t begin = 0;
  for (int64_t i = 0; i < count && begin < b.sequences; ++i) {
    const int64_t target = b.tokens * (i + 1) / count;
    int64_t end = begin + 1;
    // Up to the sequence whose end is nearest to the target.
    while (end < b.sequences && 2 * target > int64_t{b.cu_seqlens[end]} + b.cu_seqlens[end + 1]) ++end;
    if (i + 1 == count) end = b.sequences;
    groups.push_back({begin, end, int64_t{b.cu_seqlens[end]} - b.cu_seqlens[begin]});
    begin = end;
  }
  if (begin < b.sequences) groups.push_back({begin, b.sequences, b.tokens - b.cu_seqlens[begin]});
  std::stable_sort(groups.begin(), groups.end(), [](const Group& x, const Group& y) { return x.tokens > y.tokens; });
  return groups;
}

// The share of the threads' time in which they have something to do, if each takes the next group when it is free.
inline double balance(const std::vector<Group>& groups, int64_t threads, int64_t tokens) {
  std::vector<int64_t> load(static_cast<size_t>(threads));
  for (const Group& group : groups) *std::min_element(load.begin(), load.end()) += group.tokens;
  const int64_t longest = *std::max_element(load.begin(), load.end());
  return static_cast<double>(tokens) / static_cast<double>(std::max<int64_t>(longest, 1) * threads);
}

inline Plan make_plan(const Model& m, const Batch& b) {
  const int64_t threads = torch::stable::get_num_threads(), most = m.in_rows() ? kGroupTokensInRows : kGroupTokens;
  if (threads == 1 || b.tokens * m.multiply_adds_per_token() < kWorthSharing) {
    return {cut(b, (b.tokens + most - 1) / most), false};
  }
  const int64_t rounds = (b.tokens + threads * most - 1) / (threads * most);
  std::vector<Group> groups = cut(b, threads * rounds);
  const bool shared = balance(groups, threads, b.tokens) < kBalanced;
  if (shared) groups = cut(b, (b.tokens + threads * most - 1) / (threads * most));
  return {groups, shared};
}

}  // namespace sentfast::cpu::packed
