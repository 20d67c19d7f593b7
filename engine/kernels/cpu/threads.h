// A team of threads that all run the same function, phase after phase, with a barrier between phases.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include <immintrin.h>

namespace octavo {

// Within `run`, every member calls the same sequence of `share` (which hands out pieces of a phase, whoever is free takes the next, and ends with
// all members there). A member that the system has put aside for a moment thus takes fewer pieces, and nobody a fixed part.
// Between runs the workers sleep: the cores belong to others then.
class Team {
 public:
  explicit Team(int size) : size_(size) {
    for (int i = 1; i < size; i++) workers_.emplace_back([this, i] { work(i); });
  }

  ~Team() {
    stopping_ = true;
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int size() const { return size_; }

  // Runs job(member) on every member, the caller being member 0.
  void run(const std::function<void(int)>& job) {
    if (size_ == 1) {
      job(0);
      return;
    }
    job_ = &job;
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    job(0);
    barrier();
  }

  // One phase: body(i) once for each piece i of `count`, over all members; returns when all pieces are done.
  template <class Body>
  void share(int64_t count, const Body& body) {
    if (size_ == 1) {
      for (int64_t i = 0; i < count; i++) body(i);
      return;
    }
    std::atomic<int64_t>& next = next_[phase() % 3];
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
    barrier();
  }

 private:
  // The counter of a phase is set back while nobody can hold it: by the last to arrive at the barrier of the phase after it.
  int64_t phase() const { return passed_.load(std::memory_order_relaxed); }

  void barrier() {
    int64_t passed = passed_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      next_[(passed + 2) % 3].store(0, std::memory_order_relaxed);
      arrived_.store(0, std::memory_order_relaxed);
      passed_.store(passed + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; passed_.load(std::memory_order_acquire) == passed; spins++) {
      if (spins < 100) {
        _mm_pause();
      } else {
        sched_yield();  // the one that is missing may be waiting for this very core
      }
    }
  }

  void work(int member) {
    for (uint32_t seen = 0;;) {
      epoch_.wait(seen, std::memory_order_acquire);
      seen = epoch_.load(std::memory_order_acquire);
      if (stopping_) return;
      (*job_)(member);
      barrier();
    }
  }

  int size_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* job_ = nullptr;
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int64_t> next_[3] = {};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> passed_{0};
};

}  // namespace octavo
