// Where an encoder's time goes, by stage; measured only while somebody asks for it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace sentfast::cpu {

enum Stage : int { kEmbedding, kQkv, kAttend, kOutput, kNorm, kUp, kDown, kResult, kStages };

constexpr const char* kStageNames[kStages] = {"embedding",       "query, key, value", "attention", "output projection",
                                              "residual + norm", "up + activation",   "down",      "result"};

// Nanoseconds, summed over the threads that carry groups of their own.
struct Profile {
  std::atomic<bool> enabled{false};
  std::atomic<int64_t> nanoseconds[kStages] = {};
};

inline Profile& profile() {
  static Profile instance;
  return instance;
}

// Counts its own lifetime for a stage.
class Timed {
 public:
  explicit Timed(Stage stage) : stage_(stage), enabled_(profile().enabled.load(std::memory_order_relaxed)) {
    if (enabled_) start_ = std::chrono::steady_clock::now();
  }
  ~Timed() {
    if (!enabled_) return;
    const auto elapsed = std::chrono::steady_clock::now() - start_;
    profile().nanoseconds[stage_] += std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count();
  }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  Stage stage_;
  bool enabled_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace sentfast::cpu
