// Threads that share out the tiles of one job at a time.
//
// Completion is counted in tiles and never in threads: the caller works too, and if another process holds the cores of
// the workers, it does every tile itself. It only ever waits for tiles that have been begun. OpenMP's barriers wait for
// each thread to be scheduled, which costs a time slice a loop as soon as a core is shared.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace draftsmith {

using Clock = std::chrono::steady_clock;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Polls `ready` for at most `limit`; whether it became true.
template <typename Ready>
bool spin_until(Ready ready, std::chrono::microseconds limit) {
  const auto deadline = Clock::now() + limit;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      pause();
    }
  } while (Clock::now() < deadline);
  return ready();
}

class Pool {
 public:
  using Function = void (*)(const void* context, int64_t tile);

  /// Calls function(context, tile) for each tile in [0, tiles); returns when all are done.
  void run(int64_t tiles, Function function, const void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (tiles == 1 || threads_ == 1 || !turn.owns_lock()) {  // busy with another caller's job: this one works alone
      for (int64_t tile = 0; tile < tiles; ++tile) function(context, tile);
      return;
    }
    if (workers_.empty())
      for (int i = 1; i < threads_; ++i) workers_.emplace_back([this] { work(); });
    function_ = function, context_ = context, tiles_ = tiles;
    finished_.store(0);
    unclaimed_.store(tiles);
    if (sleepers_.load() > 0) {
      { std::lock_guard<std::mutex> guard(sleep_); }  // a worker between its last look and its sleep is woken as well
      wake_.notify_all();
    }
    while (run_one_tile()) {
    }
    const auto complete = [this] { return finished_.load() == tiles_; };
    if (spin_until(complete, std::chrono::microseconds(30))) return;
    std::unique_lock<std::mutex> guard(sleep_);  // an idle core can take over a worker that was pushed off its own
    caller_sleeps_.store(true);
    complete_.wait(guard, complete);
    caller_sleeps_.store(false);
  }

  int threads() const { return threads_; }

  void set_threads(int threads) {
    std::lock_guard<std::mutex> turn(turn_);
    {
      std::lock_guard<std::mutex> guard(sleep_);
      stop_.store(true);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stop_.store(false);
    threads_ = threads;
  }

 private:
  bool run_one_tile() {
    int64_t left = unclaimed_.load();
    while (left > 0 && !unclaimed_.compare_exchange_weak(left, left - 1)) {
    }
    if (left <= 0) return false;
    const int64_t tiles = tiles_;  // the job cannot change while a tile of it is unfinished, nor be read after
    function_(context_, tiles - left);
    if (finished_.fetch_add(1) + 1 == tiles && caller_sleeps_.load()) {
      { std::lock_guard<std::mutex> guard(sleep_); }
      complete_.notify_one();
    }
    return true;
  }

  void work() {
    const auto wanted = [this] { return unclaimed_.load() > 0 || stop_.load(); };
    while (!stop_.load()) {
      while (run_one_tile()) {
      }
      if (spin_until(wanted, std::chrono::microseconds(80))) continue;  // the next layer's job comes soon
      std::unique_lock<std::mutex> guard(sleep_);
      ++sleepers_;
      wake_.wait(guard, wanted);
      --sleepers_;
    }
  }

  // Cores of this process, or as few as OMP_NUM_THREADS asks for: whoever shares a machine sets it for all libraries.
  static int available_cores() {
    int cores = std::max(1u, std::thread::hardware_concurrency());
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) cores = std::max(1, CPU_COUNT(&allowed));
#endif
    const char* requested = std::getenv("OMP_NUM_THREADS");
    const int limit = requested ? std::atoi(requested) : 0;
    return limit > 0 ? std::min(cores, limit) : cores;
  }

  std::mutex turn_;  // held while a job runs
  std::atomic<int> threads_{available_cores()};
  std::vector<std::thread> workers_;

  Function function_ = nullptr;
  const void* context_ = nullptr;
  int64_t tiles_ = 0;
  alignas(64) std::atomic<int64_t> unclaimed_{0};
  alignas(64) std::atomic<int64_t> finished_{0};

  alignas(64) std::mutex sleep_;
  std::condition_variable wake_, complete_;
  std::atomic<int> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false}, stop_{false};
};

/// The process's pool. It is never deleted: threads may still be inside it while the process ends.
class PoolHolder {
 public:
  static Pool& get() { return *instance().pool_; }

 private:
  static PoolHolder& instance() {
    static PoolHolder holder;
    return holder;
  }
  PoolHolder() {
    pthread_atfork(nullptr, nullptr, [] { instance().pool_ = new Pool; });  // threads do not survive a fork
  }
  ~PoolHolder() { pool_->set_threads(1); }

  Pool* pool_ = new Pool;
};

/// body(tile) for each tile in [0, tiles), shared among the pool's threads.
template <typename Body>
void for_each_tile(int64_t tiles, const Body& body) {
  const auto call = [](const void* context, int64_t tile) { (*static_cast<const Body*>(context))(tile); };
  PoolHolder::get().run(tiles, call, &body);
}

}  // namespace draftsmith
