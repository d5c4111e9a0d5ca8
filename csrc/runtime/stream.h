// Streams of our own, and what is put on a stream without a kernel: copies, fills, writes and waits of words.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

namespace epv2 {

// A stream that no other stream waits for by itself. Not one of torch's: those are 32 for each priority, handed out in
// turn, so that two users may get the same one, and a wait of the first would hold the second.
class Stream {
 public:
  explicit Stream(bool high_priority);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  void close();
  uintptr_t pointer() const { return reinterpret_cast<uintptr_t>(stream_); }

 private:
  CUstream stream_ = nullptr;
};

// What a stream had been given when it was recorded. One that is done with is given to the next who wants one, which
// streams do not mind that were told to wait for it.
class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  uintptr_t handle() const { return reinterpret_cast<uintptr_t>(event_); }
  // Whether the stream has come to it; false if it was recorded in a capture.
  bool passed() const;

 private:
  CUcontext context_ = nullptr;
  CUevent event_ = nullptr;
};

// (name, address, value): "write32", "write64", "wait32_eq", "wait32_geq" (cyclic: the difference is not negative); or
// ("copy", target, source, bytes); or ("after", stream): go on after all that this stream has been given so far; or
// ("before", stream): let that one go on only after all that was put on this one before; or ("record", event),
// ("await", event).
using WordOperation = std::tuple<std::string, uintptr_t, uint64_t>;
using CopyOperation = std::tuple<std::string, uintptr_t, uintptr_t, size_t>;
using OrderOperation = std::tuple<std::string, uintptr_t>;
using StreamOperation = std::variant<WordOperation, CopyOperation, OrderOperation>;

void copy(uintptr_t target, uintptr_t source, size_t num_bytes, uintptr_t stream);
void fill(uintptr_t target, int byte, size_t num_bytes, uintptr_t stream);
// All of them, in order. Words that follow each other are one call of the driver.
void stream_operations(uintptr_t stream, const std::vector<StreamOperation>& operations);

// A word of host memory that processes share becomes `desired` if it is `expected`. Returns what it was.
uint64_t compare_exchange(uintptr_t address, uint64_t expected, uint64_t desired);

uintptr_t current_context();
void set_context(uintptr_t context);

}  // namespace epv2
