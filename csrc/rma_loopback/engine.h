// Carries out the operations in a rank's inbox, on a thread of its own and without using an SM.
//
// A put is carried out by the rank that it goes to: it copies the bytes from the peer's mapped memory, then writes the
// signal, which only its owner can (NCCL's signals can't be shared), then tells the peer, all in order on one stream of
// the highest priority. A get is carried out by the rank that wants the bytes.
//
// Without chaos, operations go out in batches, each rank's as they were posted: the copies of a batch in any order, then
// its signals, then its completions. So a signal comes after the bytes of every earlier operation of its rank, whatever
// its strength and context, and bytes may overtake each other only within a batch. No network promises as much. Chaos
// takes it away: copies are cut into pieces that arrive late and in any order, a put may be complete (its source may be
// written again) long before its bytes have arrived, signals are late, contexts overtake each other. What still holds is
// what GIN promises: a signal comes after the bytes of its put, a strong one after those of every earlier put of its
// context and rank.
#pragma once

#include <cuda.h>

#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "driver.h"
#include "memory.h"
#include "ring.h"

namespace epv2::rma {

class Engine {
 public:
  // Starts the thread. `inbox` is this rank's, `device_inbox` where the device sees it. `watch` is called now and then
  // on the thread. `chaos`: the seed, if there is to be any.
  Engine(CUcontext context, Inbox& inbox, CUdeviceptr device_inbox, int ranks, int rank, const Regions& regions,
         std::optional<uint64_t> chaos, std::function<void()> watch);
  // Carries out what it has begun, then ends the thread.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Call `change` while nothing is under way on this rank: everything begun has arrived.
  void when_idle(const std::function<void()>& change);
  // A call of the driver failed; no operation is carried out any more.
  bool failed() const { return failed_; }

 private:
  using Clock = std::chrono::steady_clock;
  struct Signal {
    Region* region;
    uint64_t offset, value;
  };
  // What one call to the driver or two can do: copies in any order, then signals, then completions.
  struct Batch {
    Copies copies;
    std::vector<Signal> signals;
    std::vector<std::pair<CUdeviceptr, uint64_t>> done;
    std::vector<int> freed;  // blocks that its copies are the last to read
  };
  struct Move {
    CUdeviceptr to = 0, from = 0;
    size_t size = 0;
    Region* signal = nullptr;
  };
  // An operation that chaos has begun and not ended.
  struct Pending {
    Operation operation;
    uint64_t number;
    std::vector<Move> pieces;
    Clock::time_point due;
    int block = -1;
    bool arrived = false, signalled = false, complete = false;
  };

  void main();
  void sleep(uint32_t seen, Clock::duration longest);
  bool pass();
  void pass_in_order(Batch& batch);
  void pass_chaos(Batch& batch, bool hurry);
  void begin_chaos(Batch& batch, int source);
  bool must_wait(const std::deque<Pending>& earlier, size_t index) const;
  // The next operation of `source`; null: there is none, or one of it was refused.
  Operation* next(int source);
  Move resolve(Operation& operation) const;
  void refuse(int source, const Operation& operation, const std::string& why);
  void refuse_all(const std::string& why);
  void complete(Batch& batch, int source, uint64_t number) const;
  void submit(Batch& batch);
  std::vector<uint64_t> read_words(const std::vector<CUdeviceptr>& addresses);
  CUdeviceptr seen_by_device(const void* pointer) const;
  Clock::duration delay();
  std::vector<Move> cut(const Move& whole);

  const CUcontext context_;
  Inbox& inbox_;
  const CUdeviceptr device_inbox_;
  const int ranks_, rank_;
  const Regions& regions_;
  const std::function<void()> watch_;
  CUstream stream_ = nullptr;
  uint64_t* words_ = nullptr;  // page-locked: what was read of words that a kernel may reset
  CUdeviceptr device_words_ = 0;
  std::vector<uint64_t> taken_;  // operations taken from each ring

  std::optional<std::mt19937_64> chaos_;
  CUdeviceptr blocks_ = 0;  // where bytes of puts wait that are complete and have not arrived
  std::vector<int> free_blocks_;
  std::vector<std::deque<Pending>> pending_;
  size_t num_pending_ = 0;

  std::atomic<bool> failed_{false}, stop_{false};
  std::atomic<int> visitors_{0};
  std::mutex busy_;
  std::thread thread_;
};

// Tell the owner of `inbox` that something was posted.
void ring_bell(Inbox& inbox);

}  // namespace epv2::rma
