#include "engine.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <ctime>
#include <map>

#include "../runtime/error.h"

namespace epv2::rma {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr size_t kBatch = 64;        // operations in one batch
constexpr size_t kMostMemOps = 250;  // of one cuStreamBatchMemOp, which takes 256
constexpr size_t kWords = 512;
constexpr int kSpins = 2000, kYields = 200;  // before the thread sleeps: a wake-up costs about 50 us
constexpr auto kWatchEvery = milliseconds(100);

constexpr size_t kBlockBytes = 256 << 10;
constexpr int kBlocks = 256;
constexpr size_t kMostPending = 256;  // of one rank
constexpr size_t kMostPieces = 4;
// NCCL cuts larger puts into pieces of this size, and only the last piece carries the signal.
constexpr uint64_t kNcclPiece = uint64_t{1} << 30;

long futex(std::atomic<uint32_t>& word, int what, uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), what, value, timeout, nullptr, 0);
}

}  // namespace

void ring_bell(Inbox& inbox) {
  inbox.bell.fetch_add(1);
  if (inbox.asleep.load() != 0) futex(inbox.bell, FUTEX_WAKE, 1, nullptr);
}

Engine::Engine(CUcontext context, Inbox& inbox, CUdeviceptr device_inbox, int ranks, int rank, const Regions& regions,
               std::optional<uint64_t> chaos, std::function<void()> watch)
    : context_(context),
      inbox_(inbox),
      device_inbox_(device_inbox),
      ranks_(ranks),
      rank_(rank),
      regions_(regions),
      watch_(std::move(watch)),
      taken_(ranks),
      pending_(ranks) {
  const Driver& cuda = driver();
  int lowest = 0, highest = 0;
  try {
    cuda.check(cuda.cuCtxGetStreamPriorityRange(&lowest, &highest), "cuCtxGetStreamPriorityRange");
    // The highest priority has hardware queues of its own: never behind a kernel that waits for what comes here.
    cuda.check(cuda.cuStreamCreateWithPriority(&stream_, CU_STREAM_NON_BLOCKING, highest),
               "cuStreamCreateWithPriority");
    void* words = nullptr;
    cuda.check(cuda.cuMemHostAlloc(&words, kWords * 8, CU_MEMHOSTALLOC_DEVICEMAP | CU_MEMHOSTALLOC_PORTABLE),
               "cuMemHostAlloc");
    words_ = static_cast<uint64_t*>(words);
    cuda.check(cuda.cuMemHostGetDevicePointer(&device_words_, words, 0), "cuMemHostGetDevicePointer");
    if (chaos) {
      chaos_.emplace(*chaos * 1000003 + static_cast<uint64_t>(rank));
      cuda.check(cuda.cuMemAlloc(&blocks_, kBlockBytes * kBlocks), "cuMemAlloc", "64 MiB for chaos");
      for (int block = 0; block < kBlocks; block++) free_blocks_.push_back(block);
    }
    sigset_t every, before;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);  // signals are for the process's own threads
    thread_ = std::thread([this] { main(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_setname_np(thread_.native_handle(), "epv2 loopback");
  } catch (...) {
    if (blocks_ != 0) cuda.cuMemFree(blocks_);
    if (words_ != nullptr) cuda.cuMemFreeHost(words_);
    if (stream_ != nullptr) cuda.cuStreamDestroy(stream_);
    throw;
  }
}

Engine::~Engine() {
  stop_ = true;
  ring_bell(inbox_);
  thread_.join();
  const Driver& cuda = driver();
  if (blocks_ != 0) cuda.cuMemFree(blocks_);
  cuda.cuMemFreeHost(words_);
  cuda.cuStreamDestroy(stream_);
}

void Engine::main() {
  const Driver& cuda = driver();
  cuda.cuCtxSetCurrent(context_);
  // A capture that another thread has begun must not forbid this one its calls.
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  cuda.cuThreadExchangeStreamCaptureMode(&mode);
  int idle = 0;
  auto watched = Clock::now();
  while (!stop_) {
    const uint32_t seen = inbox_.bell.load();
    while (visitors_ != 0) std::this_thread::yield();  // a mutex is not fair
    bool moved = false;
    Clock::duration longest = kWatchEvery;
    {
      std::lock_guard<std::mutex> lock(busy_);
      moved = pass();
      if (num_pending_ != 0) longest = microseconds(20);
    }
    if (Clock::now() - watched > kWatchEvery) {
      watch_();
      watched = Clock::now();
    }
    idle = moved ? 0 : idle + 1;
    if (idle > kSpins + kYields) {
      sleep(seen, longest);
    } else if (idle > kSpins) {
      std::this_thread::yield();
    }
  }
  std::lock_guard<std::mutex> lock(busy_);
  try {
    Batch batch;
    if (chaos_) pass_chaos(batch, true);
    submit(batch);
    if (!failed_) cuda.cuStreamSynchronize(stream_);
  } catch (const Error& error) {
    refuse_all(error.what());
  }
}

// Until something is posted, or for `longest`.
void Engine::sleep(uint32_t seen, Clock::duration longest) {
  inbox_.asleep = 1;
  const auto nanos = std::chrono::duration_cast<std::chrono::nanoseconds>(longest).count();
  const timespec timeout = {nanos / 1000000000, nanos % 1000000000};
  if (inbox_.bell.load() == seen && !stop_) futex(inbox_.bell, FUTEX_WAIT, seen, &timeout);
  inbox_.asleep = 0;
}

void Engine::when_idle(const std::function<void()>& change) {
  visitors_++;
  {
    std::lock_guard<std::mutex> lock(busy_);
    const WithContext current(context_);
    try {
      Batch batch;
      if (chaos_) pass_chaos(batch, true);
      submit(batch);
      if (!failed_) driver().check(driver().cuStreamSynchronize(stream_), "cuStreamSynchronize");
    } catch (const Error& error) {
      refuse_all(error.what());
    }
    change();
  }
  visitors_--;
}

bool Engine::pass() {
  if (failed_) return false;
  Batch batch;
  try {
    if (chaos_)
      pass_chaos(batch, false);
    else
      pass_in_order(batch);
    submit(batch);
  } catch (const Error& error) {
    refuse_all(error.what());
  }
  return !batch.done.empty() || !batch.copies.empty() || !batch.signals.empty();
}

Operation* Engine::next(int source) {
  Ring& ring = inbox_.ring(source);
  if (ring.refused.load(std::memory_order_relaxed) != 0) return nullptr;
  Slot& slot = ring.slots[taken_[source] % kSlots];
  return slot.posted.load(std::memory_order_acquire) == taken_[source] + 1 ? &slot.operation : nullptr;
}

void Engine::pass_in_order(Batch& batch) {
  for (int source = 0; source < ranks_; source++) {
    size_t count = 0;
    while (Operation* operation = count < kBatch ? next(source) : nullptr) {
      try {
        const Move move = resolve(*operation);
        if (move.size != 0) batch.copies.add(move.to, move.from, move.size);
        if (move.signal != nullptr)
          batch.signals.push_back({move.signal, operation->signal_offset, operation->signal_value});
        complete(batch, source, taken_[source]);
      } catch (const Error& error) {
        refuse(source, *operation, error.what());
        break;
      }
      taken_[source]++;
      count++;
    }
  }
}

// What `operation` moves, checked as the hardware of a network adapter does. Throws Error.
Engine::Move Engine::resolve(Operation& operation) const {
  const auto region = [&](uint32_t id, const char* what) {
    Region* found = regions_.find(id);
    if (found == nullptr)
      throw Error(std::string(what) + " is region " + std::to_string(id) + ", which is not registered (any more) here");
    return found;
  };
  Move move;
  if (operation.size != 0) {
    move.size = operation.size;
    move.to = region(operation.target_region, "the target")->at(rank_, operation.target_offset, operation.size);
    move.from = operation.is_inline != 0 ? seen_by_device(operation.bytes)
                                         : region(operation.source_region, "the source")
                                               ->at(static_cast<int>(operation.source_rank), operation.source_offset,
                                                    operation.size);
  }
  if (operation.signal_region != kNoRegion) {
    move.signal = region(operation.signal_region, "the signal");
    move.signal->at(rank_, operation.signal_offset, sizeof(uint64_t));
    if (operation.signal_offset % sizeof(uint64_t) != 0)
      throw Error("a signal at byte " + std::to_string(operation.signal_offset) + ": must be a multiple of 8");
  }
  return move;
}

CUdeviceptr Engine::seen_by_device(const void* pointer) const {
  return device_inbox_ + static_cast<size_t>(static_cast<const char*>(pointer) - reinterpret_cast<char*>(&inbox_));
}

void Engine::complete(Batch& batch, int source, uint64_t number) const {
  batch.done.emplace_back(seen_by_device(&inbox_.ring(source).slots[number % kSlots].done), number + 1);
}

void Engine::refuse(int source, const Operation& operation, const std::string& why) {
  Ring& ring = inbox_.ring(source);
  const std::string what = operation.is_get != 0 ? "get of rank " + std::to_string(source) + " from rank " +
                                                       std::to_string(operation.source_rank)
                                                 : "put of rank " + std::to_string(source) + " to rank " +
                                                       std::to_string(rank_);
  const std::string text = what + ", " + std::to_string(operation.size) + " bytes, refused: " + why;
  std::strncpy(ring.reason, text.c_str(), sizeof(ring.reason) - 1);
  ring.refused.store(1, std::memory_order_release);
}

void Engine::refuse_all(const std::string& why) {
  failed_ = true;
  for (int source = 0; source < ranks_; source++) {
    Ring& ring = inbox_.ring(source);
    if (ring.refused.load() != 0) continue;
    std::strncpy(ring.reason, ("rank " + std::to_string(rank_) + " can't go on: " + why).c_str(),
                 sizeof(ring.reason) - 1);
    ring.refused.store(1, std::memory_order_release);
  }
}

void Engine::submit(Batch& batch) {
  if (failed_) return;
  const Driver& cuda = driver();
  cuda.copy(batch.copies, stream_);
  // Words that somebody else may write, too, are read first. Those on the host are added to in place.
  std::vector<CUdeviceptr> unknown;
  bool on_host = false;
  for (const Signal& signal : batch.signals) {
    if (signal.region->on_host)
      on_host = true;
    else if (signal.region->counts.empty())
      unknown.push_back(signal.region->at(rank_, signal.offset, 8));
  }
  std::map<CUdeviceptr, uint64_t> values;
  if (!unknown.empty()) {
    std::sort(unknown.begin(), unknown.end());
    unknown.erase(std::unique(unknown.begin(), unknown.end()), unknown.end());
    const std::vector<uint64_t> read = read_words(unknown);
    for (size_t i = 0; i < unknown.size(); i++) values[unknown[i]] = read[i];
  } else if (on_host) {
    cuda.check(cuda.cuStreamSynchronize(stream_), "cuStreamSynchronize");
  }
  std::vector<CUstreamBatchMemOpParams> writes;
  const auto write = [&](CUdeviceptr address, uint64_t value) {
    CUstreamBatchMemOpParams operation = {};
    operation.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
    operation.writeValue.address = address;
    operation.writeValue.value64 = value;
    operation.writeValue.flags = CU_STREAM_WRITE_VALUE_DEFAULT;  // behind a fence of the stream
    writes.push_back(operation);
  };
  for (const Signal& signal : batch.signals) {
    const CUdeviceptr address = signal.region->at(rank_, signal.offset, 8);
    if (signal.region->on_host)
      __atomic_fetch_add(reinterpret_cast<uint64_t*>(signal.region->data + signal.offset), signal.value,
                         __ATOMIC_RELEASE);
    else if (signal.region->counts.empty())
      write(address, values[address] += signal.value);
    else
      write(address, signal.region->counts[signal.offset / 8] += signal.value);
  }
  for (const auto& [address, value] : batch.done) write(address, value);
  for (size_t first = 0; first < writes.size(); first += kMostMemOps) {
    const auto count = static_cast<unsigned>(std::min(kMostMemOps, writes.size() - first));
    cuda.check(cuda.cuStreamBatchMemOp(stream_, count, writes.data() + first, 0), "cuStreamBatchMemOp");
  }
  free_blocks_.insert(free_blocks_.end(), batch.freed.begin(), batch.freed.end());
}

std::vector<uint64_t> Engine::read_words(const std::vector<CUdeviceptr>& addresses) {
  const Driver& cuda = driver();
  std::vector<uint64_t> values;
  for (size_t first = 0; first < addresses.size(); first += kWords) {
    Copies copies;
    const size_t count = std::min(kWords, addresses.size() - first);
    for (size_t i = 0; i < count; i++) copies.add(device_words_ + i * 8, addresses[first + i], 8);
    cuda.copy(copies, stream_);
    cuda.check(cuda.cuStreamSynchronize(stream_), "cuStreamSynchronize");
    values.insert(values.end(), words_, words_ + count);
  }
  return values;
}

// ---- chaos ----------------------------------------------------------------------------------------------------------

Engine::Clock::duration Engine::delay() {
  const uint64_t drawn = (*chaos_)();
  const uint64_t most = drawn % 4 < 2 ? 20 : drawn % 4 == 2 ? 200 : 1000;
  return microseconds((drawn >> 8) % most);
}

std::vector<Engine::Move> Engine::cut(const Move& whole) {
  std::vector<size_t> ends = {whole.size};
  const size_t cuts = whole.size == 0 ? 0 : (*chaos_)() % kMostPieces;
  for (size_t i = 0; i < cuts; i++) ends.push_back((*chaos_)() % whole.size);
  std::sort(ends.begin(), ends.end());
  std::vector<Move> pieces;
  size_t begin = 0;
  for (const size_t end : ends) {
    if (end > begin) pieces.push_back({whole.to + begin, whole.from + begin, end - begin, nullptr});
    begin = end;
  }
  std::shuffle(pieces.begin(), pieces.end(), *chaos_);
  return pieces;
}

void Engine::pass_chaos(Batch& batch, bool hurry) {
  const auto now = Clock::now();
  num_pending_ = 0;
  for (int source = 0; source < ranks_; source++) {
    std::deque<Pending>& all = pending_[source];
    for (Pending& each : all) {
      while (!each.arrived && (hurry || now >= each.due)) {
        if (!each.pieces.empty()) {
          const Move& piece = each.pieces.back();
          batch.copies.add(piece.to, piece.from, piece.size);
          each.pieces.pop_back();
          each.due = now + delay();
        }
        each.arrived = each.pieces.empty();
      }
    }
    for (size_t i = 0; i < all.size(); i++) {
      Pending& each = all[i];
      if (!each.arrived || (!hurry && now < each.due)) continue;
      if (!each.signalled && each.operation.signal_region != kNoRegion) {
        if (must_wait(all, i)) continue;
        Region* region = regions_.find(each.operation.signal_region);
        if (region != nullptr)
          batch.signals.push_back({region, each.operation.signal_offset, each.operation.signal_value});
      }
      each.signalled = true;
      if (!each.complete) complete(batch, source, each.number);
      each.complete = true;
      if (each.block >= 0) batch.freed.push_back(std::exchange(each.block, -1));
    }
    // From wherever they are: the oldest may well be the latest.
    all.erase(std::remove_if(all.begin(), all.end(), [](const Pending& each) { return each.signalled; }), all.end());
    // Last, so that bytes are not brought to a block and taken from it by one batch.
    if (!hurry) begin_chaos(batch, source);
    num_pending_ += all.size();
  }
}

// Whether GIN promises that the signal of `all[index]` comes after bytes that have not arrived.
bool Engine::must_wait(const std::deque<Pending>& all, size_t index) const {
  const Operation& signal = all[index].operation;
  // A signal without bytes is the second half of a put with a signal in a window: NCCL makes it two operations.
  const bool strong = signal.is_strong != 0 || signal.size == 0;
  for (size_t i = 0; i < index; i++) {
    const Operation& put = all[i].operation;
    if (put.is_get == 0 && put.context == signal.context && !all[i].arrived && (strong || put.size == kNcclPiece))
      return true;
  }
  return false;
}

void Engine::begin_chaos(Batch& batch, int source) {
  std::deque<Pending>& all = pending_[source];
  const auto now = Clock::now();
  while (all.size() < kMostPending) {
    Operation* operation = next(source);
    if (operation == nullptr) return;
    Move move;
    try {
      move = resolve(*operation);
    } catch (const Error& error) {
      refuse(source, *operation, error.what());
      return;
    }
    Pending begun = {*operation, taken_[source]++, {}, now + microseconds(1) + delay()};
    // Bytes in the ring are lost with the place, so they must be moved away before the operation is complete.
    const bool early = operation->is_get == 0 && move.size != 0 && move.size <= kBlockBytes && !free_blocks_.empty() &&
                       (*chaos_)() % 2 == 0;
    if (early) {
      begun.block = free_blocks_.back();
      free_blocks_.pop_back();
      const CUdeviceptr block = blocks_ + static_cast<size_t>(begun.block) * kBlockBytes;
      batch.copies.add(block, move.from, move.size);
      move.from = block;
      complete(batch, source, begun.number);
      begun.complete = true;
    }
    begun.pieces = cut(move);
    all.push_back(std::move(begun));
  }
}

}  // namespace epv2::rma
