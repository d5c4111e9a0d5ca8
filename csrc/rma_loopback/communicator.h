// One connected group of ranks: inboxes of all of them, memory registered together, operations of this rank.
#pragma once

#include <cuda.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "engine.h"
#include "meeting.h"
#include "memory.h"
#include "ring.h"

namespace epv2::rma {

class Communicator {
 public:
  // Collective, on a thread with a CUDA context. Throws Error.
  Communicator(std::unique_ptr<Meeting> meeting, const std::vector<Handle>& handles, int rank,
               std::optional<uint64_t> chaos);
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int ranks() const { return static_cast<int>(peers_.size()); }
  int rank() const { return rank_; }
  // A number that tells the first of `count` contexts from all others.
  uint32_t take_contexts(int count) { return contexts_.fetch_add(static_cast<uint32_t>(count)); }

  // Collective; the number of the region. Throws Error.
  uint32_t add_region(void* data, size_t size, int type, uint64_t flags);
  void remove_region(uint32_t id);

  // Have rank `executor` carry out `operation`; a number to ask `test` for. Waits while its ring is full. Throws Error.
  uint64_t post(int executor, const Operation& operation);
  // The bytes of `operation` are put into it, if they are few and on the host: nobody else can read them there.
  void take_inline(Operation& operation) const;
  // Whether it is complete. Throws Error where it never will be.
  bool test(uint64_t request);
  // Whether operations fail here, or a rank has died.
  bool failed() const;

 private:
  struct Peer {
    SharedMemory memory;
    Inbox* inbox = nullptr;
    std::mutex posting;
    std::atomic<uint64_t> posted{0};
    std::atomic<bool> dead{false};
  };

  void watch();
  // Throws Error where `executor` will never carry out what it was given.
  void check(int executor);

  const std::unique_ptr<Meeting> meeting_;
  const int rank_;
  CUcontext context_ = nullptr;  // the application's
  std::shared_ptr<OwnContext> own_;
  std::vector<std::unique_ptr<Peer>> peers_;
  bool pinned_ = false;
  std::atomic<bool> met_{false};  // every inbox is mapped
  std::mutex registering_;
  uint32_t next_region_ = 0;
  Regions regions_;
  std::atomic<uint32_t> contexts_{0};
  std::unique_ptr<Engine> engine_;
};

// A line for NCCL's log; warnings are also what ncclGetLastError tells.
void report(LogLevel level, const std::string& text);

}  // namespace epv2::rma
