// Runs a kernel's threads as fibers of one OS thread, in an order drawn from a seed. Every CTA of a launch is resident;
// asynchronous copies happen at a random later time. README.md says what is modelled and what is not.

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "emulator/races.h"
// Behind the others: its macros are names that the standard library uses.
#include "emulator/device.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace epv2::emulator {
namespace {

constexpr size_t kPage = 4096, kStack = 64 << 10, kMaxShared = 232448;  // bytes; the last is sm_90's limit of a CTA
constexpr int kWarp = 32, kMaxThreads = 1024, kBarriers = 16;
constexpr uint32_t kFull = 0xffffffffu, kMaxCount = (1u << 20) - 1;  // the last is what an mbarrier's counts can hold
constexpr uint8_t kUninitialised = 0xCD, kInFlight = 0xEE;
constexpr uint64_t kMbarrierTag = 0xE9B2C47A5D31ull;  // upper 48 bits of an initialised mbarrier; the rest is its index

const char* const kCollectiveNames[] = {"__syncwarp",       "__shfl_sync",   "__shfl_xor_sync", "__shfl_up_sync",
                                        "__shfl_down_sync", "__ballot_sync", "__any_sync",      "__all_sync",
                                        "__match_any_sync"};

struct Cta;
struct Warp;

enum class Wait { nothing, collective, barrier, mbarrier, store_reads, store_writes, flush };

struct Transfer;

struct StoreGroup {
  int unread = 0, unwritten = 0;  // bulk stores whose source was not yet read, whose destination not yet written
};

struct Fiber {
  jmp_buf context;
  jmp_buf begin;  // in entry()
  bool begun = false;
  uint8_t* stack = nullptr;
  Cta* cta = nullptr;
  Warp* warp = nullptr;
  int thread = 0;
  bool started = false, done = false;
  Wait wait = Wait::nothing;
  uint32_t wait_object = 0, wait_value = 0;  // barrier and threads; mbarrier and parity; -, groups that may be pending
  std::vector<std::shared_ptr<Transfer>> flushes;  // what it waits for in network_flush
  uint64_t result = 0;                       // of the last collective
  std::deque<StoreGroup> groups;             // the last is not yet committed
  uint64_t first_group = 0;                  // number of groups.front()
  uint16_t store_agent = 0;                  // of its bulk stores in `order`; 0: none so far
  const void* place = nullptr;               // in the kernel's code, of the last call of anything here
};

struct Warp {
  Cta* cta = nullptr;
  Fiber* fibers = nullptr;
  int index = 0;
  uint32_t ready = 0, paused = 0, done = 0;  // bits of lanes
  int position = -1;                         // in Launch::ready
  uint32_t priority = 0;
  uint32_t arrived = 0;  // lanes that wait in `op`
  Collective op{};
  uint64_t values[kWarp];
  int parameters[kWarp], widths[kWarp];
};

struct Barrier {
  int expected = 0;  // 0: nobody waits
  std::vector<Fiber*> arrived;
};

struct Mbarrier {
  uint32_t offset = 0, expected = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
  uint16_t agent = 0;       // of its bulk loads in `order`
  int init_thread = 0;      // who initialised it, and at which of its clock values
  uint32_t init_clock = 0;
  bool init_fenced = false;
  Channel channel;
  uint64_t observed = 0, loading = 0;  // phases that some thread has seen complete; phases that bulk_loads belong to
  std::vector<Fiber*> waiters;
};

// Of a message that its kernel has left: kind as in Message, communicator and context, peer, target, source, bytes of a
// put, whether its source was read (and is gone after the call), value.
using CarryOn = void (*)(int, uint64_t, int, uint8_t*, const uint8_t*, uint64_t, int, uint64_t);
CarryOn carry_on = nullptr;

// A window, or the signals of a network, as this process sees them.
struct Symmetric {
  std::vector<uint8_t*> parts;  // by rank
  uint64_t bytes = 0;           // of each
  int rank = 0, lsa_size = 0;
  bool ordered = false;  // words of it may be raised by the network

  int first() const { return rank / lsa_size * lsa_size; }  // rank of this node
};

struct Communicator {
  Symmetric signals;  // uint64 [contexts][signals]
  int num_contexts = 0, num_signals = 0;
  bool rail = false;
};

// What a flush waits for: the reading of a network_put's source, the writing of a network_get's destination.
struct Transfer {
  bool is_get = false;
  int thread = 0;
  uint32_t issued = 0;  // the thread's clock
  uint64_t communicator = 0;
  int context = 0;
  uint16_t agent = 0;  // in `order`, with a clock of its own
  uint32_t clock = 0;
  bool done = false, flushed = false;  // by a thread that knows of it
  const void* place = nullptr;
};

// What the network was given and has not done yet.
struct Message {
  enum class Kind { put, get, value, signal } kind{};
  uint64_t communicator = 0;
  int context = 0, peer = 0;
  uint64_t number = 0;  // they are not kept in order
  std::shared_ptr<Transfer> transfer;
  const uint8_t* source = nullptr;
  uint8_t* target = nullptr;
  uint64_t value = 0;
  size_t begin = 0, end = 0;  // bytes of a put or get that are not yet written
  std::vector<uint8_t> data;  // of a put that was read
  bool to_word = false;       // a signal that raises a word of a window
  bool left = false;          // may be under way when its kernel ends

  bool same_way(const Message& other) const {
    return communicator == other.communicator && context == other.context && peer == other.peer;
  }
};

struct Cta {
  int index = 0, alive = 0;
  uint8_t* shared = nullptr;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  std::vector<Mbarrier> mbarriers;
  std::unique_ptr<Order> order;
  std::vector<std::shared_ptr<Transfer>> transfers;
  // Agent in `order` and its clock, by thread, communicator, context, and whether it gets.
  std::map<std::tuple<int, uint64_t, int, bool>, std::pair<uint16_t, uint32_t>> transferring;
};

struct Copy {
  bool is_load = false, read = false;
  Fiber* issuer = nullptr;
  uint32_t offset = 0, bytes = 0, mbarrier = 0;
  uint8_t* global = nullptr;
  uint64_t group = 0;
  std::vector<uint8_t> data;  // of a store that was read and not yet written
};

// Longer than a dispatch of another process takes to run into what this CTA has not done yet.
constexpr double kLateSeconds = 0.03;

// How the next warp is chosen: any ready one; the same until it blocks; the one with the highest (changing) priority.
enum class Policy { uniform, burst, priority };

struct Launch {
  const char* name = nullptr;
  Body body = nullptr;
  const void* args = nullptr;
  uint32_t shared_bytes = 0;
  std::vector<Cta> ctas;
  std::vector<Warp*> ready;
  std::vector<Warp*> paused;
  std::vector<Copy> copies;
  std::vector<Message> messages;
  uint64_t num_messages = 0;
  uint32_t message_one_in = 0;  // 0: only when no thread is ready
  std::vector<Fiber*> flushing;
  Warp* current_warp = nullptr;
  Fiber* current = nullptr;
  const Copy* copying = nullptr;
  int alive = 0;
  bool progress = false;
  Policy policy = Policy::uniform;
  int late_cta = -1;  // begins only when the others are done, or at this time: what must wait for it has to wait
  double late_until = 0;
  uint32_t copy_one_in = 1;
  uint32_t switch_one_in = 0, accesses_left = 0;  // an ordinary access to memory in so many switches threads; 0: none
  uint64_t random = 0;
  std::string error;
  jmp_buf scheduler, abort;
};

struct Pool {
  std::vector<Fiber> fibers;
  std::vector<uint8_t*> shared;  // end of each CTA's shared memory, a guard page there
};

Launch run;
Pool pool;
std::mutex launching;
pthread_t owner;
volatile sig_atomic_t active = 0;
double limit_seconds = 120;
std::map<uint64_t, Symmetric> windows;
std::map<uint64_t, Communicator> communicators;
struct sigaction old_segv, old_bus;

uint64_t draw() {
  run.random += 0x9E3779B97F4A7C15ull;
  uint64_t z = run.random;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ z >> 27) * 0x94D049BB133111EBull;
  return z ^ z >> 31;
}
uint32_t draw_below(uint32_t n) { return static_cast<uint32_t>((draw() >> 32) * n >> 32); }
bool one_in(uint32_t n) { return draw_below(n) == 0; }

double seconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

std::string format(const char* text, va_list arguments) {
  char line[1024];
  vsnprintf(line, sizeof line, text, arguments);
  return line;
}

__attribute__((format(printf, 1, 2))) std::string print(const char* text, ...) {
  va_list arguments;
  va_start(arguments, text);
  std::string line = format(text, arguments);
  va_end(arguments);
  return line;
}

// "[library+0x123]", which runtime.py turns into file and line.
std::string source(const void* code) {
  Dl_info info;
  if (code == nullptr || dladdr(code, &info) == 0) return "[?]";
  // A return address is behind the call; one less is in it.
  const auto offset = static_cast<const uint8_t*>(code) - static_cast<const uint8_t*>(info.dli_fbase) - 1;
  return print("[%s+0x%llx]", info.dli_fname, static_cast<unsigned long long>(offset));
}

int32_t relative(const void* code) {
  return static_cast<int32_t>(static_cast<const uint8_t*>(code) - reinterpret_cast<const uint8_t*>(run.body));
}
std::string source(int32_t relative) { return source(reinterpret_cast<const uint8_t*>(run.body) + relative); }

// Ends the launch: nobody of it runs again.
[[noreturn]] void stop(std::string message) {
  run.error = std::move(message);
  _longjmp(run.abort, 1);
}

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* text, ...) {
  va_list arguments;
  va_start(arguments, text);
  const std::string line = format(text, arguments);
  va_end(arguments);
  const Fiber* fiber = run.current != nullptr ? run.current : run.copying != nullptr ? run.copying->issuer : nullptr;
  if (fiber == nullptr) stop(line);
  stop(print("CTA %d thread %d at ", fiber->cta->index, fiber->thread) + source(fiber->place) + ": " + line);
}

// Ready, paused, blocked.

void add_ready(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  if (warp.position < 0) {
    warp.position = static_cast<int>(run.ready.size());
    run.ready.push_back(&warp);
  }
}

void remove_ready(Warp& warp) {
  Warp* last = run.ready.back();
  run.ready[warp.position] = last;
  last->position = warp.position;
  run.ready.pop_back();
  warp.position = -1;
}

uint32_t lane_bit(const Fiber& fiber) { return 1u << (fiber.thread % kWarp); }

void wake(Fiber& fiber) {
  fiber.wait = Wait::nothing;
  run.progress = true;
  add_ready(*fiber.warp, lane_bit(fiber));
}

void suspend() {
  if (_setjmp(run.current->context) == 0) _longjmp(run.scheduler, 1);
}

void block(Wait wait, uint32_t object, uint32_t value) {
  run.current->wait = wait;
  run.current->wait_object = object;
  run.current->wait_value = value;
  run.progress = true;
  suspend();
}

void yield() {
  add_ready(*run.current->warp, lane_bit(*run.current));
  suspend();
}

void yield_one_in(uint32_t n) {
  if (one_in(n)) yield();
}

// Asynchronous copies.

void complete(Mbarrier& bar) {
  if (bar.pending != 0 || bar.bytes != 0) return;
  bar.phase++;
  bar.pending = bar.expected;
  Order::publish(bar.channel, bar.agent, static_cast<uint32_t>(bar.phase));
  for (Fiber* fiber : bar.waiters) wake(*fiber);
  bar.waiters.clear();
}

void check_group(Fiber& fiber) {
  if (fiber.wait != Wait::store_reads && fiber.wait != Wait::store_writes) return;
  const size_t committed = fiber.groups.size() - 1;
  for (size_t i = 0; i + fiber.wait_value < committed; i++)
    if ((fiber.wait == Wait::store_reads ? fiber.groups[i].unread : fiber.groups[i].unwritten) > 0) return;
  wake(fiber);
}

void forget_finished_groups(Fiber& fiber) {
  while (fiber.groups.size() > 1 && fiber.groups.front().unwritten == 0) {
    fiber.groups.pop_front();
    fiber.first_group++;
  }
}

// One step of one copy: a load as a whole, or the reading or the writing half of a store.
void advance_copy(size_t index) {
  Copy& copy = run.copies[index];
  Cta& cta = *copy.issuer->cta;
  run.copying = &copy;
  run.progress = true;
  bool finished = true;
  if (copy.is_load) {
    std::memcpy(cta.shared + copy.offset, copy.global, copy.bytes);
    Mbarrier& bar = cta.mbarriers[copy.mbarrier];
    bar.bytes -= copy.bytes;
    if (bar.bytes < -int64_t{kMaxCount}) fail("mbarrier at %u: more bytes loaded than its count can hold", bar.offset);
    complete(bar);
  } else {
    StoreGroup& group = copy.issuer->groups[copy.group - copy.issuer->first_group];
    if (!copy.read) {
      copy.data.assign(cta.shared + copy.offset, cta.shared + copy.offset + copy.bytes);
      copy.read = true;
      group.unread--;
      finished = false;
    } else {
      std::memcpy(copy.global, copy.data.data(), copy.bytes);
      group.unwritten--;
    }
    check_group(*copy.issuer);
  }
  run.copying = nullptr;
  if (finished) {
    std::swap(run.copies[index], run.copies.back());
    run.copies.pop_back();
  }
}

// The network.

void check_flush(Fiber& fiber) {
  for (const auto& transfer : fiber.flushes)
    if (!transfer->done) return;
  wake(fiber);
}

void finish_transfer(Transfer& transfer) {
  transfer.done = true;
  const auto waiting = std::move(run.flushing);
  run.flushing.clear();
  for (Fiber* fiber : waiting) {
    check_flush(*fiber);
    if (fiber->wait == Wait::flush) run.flushing.push_back(fiber);
  }
}

// One step of one message: a put is read, then written part by part; a get is read and written part by part; others are
// done at once.
void advance_message(size_t index) {
  using Kind = Message::Kind;
  Message& message = run.messages[index];
  if (message.kind == Kind::signal)  // comes after what was put before it: that instead, if there is any
    for (size_t other = 0; other < run.messages.size(); other++)
      if (const Message& earlier = run.messages[other]; (earlier.kind == Kind::put || earlier.kind == Kind::value) &&
                                                        earlier.number < message.number && earlier.same_way(message))
        return advance_message(other);
  if (message.to_word && run.alive > 0) return;  // what earlier kernels have left must come before it
  run.progress = true;
  if (message.kind == Kind::put && !message.transfer->done) {
    message.data.assign(message.source, message.source + message.end);
    finish_transfer(*message.transfer);
    return;
  }
  if (message.kind == Kind::put || message.kind == Kind::get) {
    const uint8_t* source = message.kind == Kind::put ? message.data.data() : message.source;
    const auto left = static_cast<uint32_t>(message.end - message.begin);
    const uint32_t bytes = one_in(2) ? left : 1 + draw_below(left);
    const bool front = one_in(2);
    const size_t at = front ? message.begin : message.end - bytes;
    std::memcpy(message.target + at, source + at, bytes);
    if (front)
      message.begin += bytes;
    else
      message.end -= bytes;
    if (message.begin < message.end) return;
    if (message.kind == Kind::get) finish_transfer(*message.transfer);
  } else if (message.kind == Kind::value) {
    __atomic_store_n(reinterpret_cast<uint64_t*>(message.target), message.value, __ATOMIC_SEQ_CST);
  } else {
    __atomic_fetch_add(reinterpret_cast<uint64_t*>(message.target), message.value, __ATOMIC_SEQ_CST);
  }
  std::swap(run.messages[index], run.messages.back());
  run.messages.pop_back();
}

void advance_a_message() { advance_message(draw_below(static_cast<uint32_t>(run.messages.size()))); }

const Communicator& find_communicator(const char* what, const Network& network) {
  const auto found = communicators.find(network.communicator);
  if (found == communicators.end())
    fail("%s: %llu is no communicator of a network", what, static_cast<unsigned long long>(network.communicator));
  const Communicator& communicator = found->second;
  if (network.context < 0 || network.context >= communicator.num_contexts)
    fail("%s: context %d; the network has %d", what, network.context, communicator.num_contexts);
  if ((network.rail != 0) != communicator.rail)
    fail("%s: rail = %d, but the network was made with %s connections", what, network.rail,
         communicator.rail ? "RAIL" : "FULL");
  return communicator;
}

uint64_t* signal_word(const char* what, const Network& network, int rank, uint32_t signal) {
  const Communicator& communicator = find_communicator(what, network);
  if (signal >= static_cast<uint32_t>(communicator.num_signals))
    fail("%s: signal %u; the network has %d", what, signal, communicator.num_signals);
  auto* words = reinterpret_cast<uint64_t*>(communicator.signals.parts[static_cast<size_t>(rank)]);
  return words + network.context * communicator.num_signals + signal;
}

const Communicator& check_network_peer(const char* what, const Network& network, int peer) {
  const Communicator& communicator = find_communicator(what, network);
  const auto& [parts, bytes, rank, lsa_size, ordered] = communicator.signals;
  const int ranks = static_cast<int>(parts.size());
  if (peer < 0 || peer >= ranks) fail("%s: peer %d; the group has %d ranks", what, peer, ranks);
  if (peer / lsa_size == rank / lsa_size)
    fail("%s: peer %d is on this node (ranks %d to %d), where the network does not lead", what, peer,
         communicator.signals.first(), communicator.signals.first() + lsa_size - 1);
  if (communicator.rail && peer % lsa_size != rank % lsa_size)
    fail("%s: peer %d is not on the rail of rank %d: its LSA rank is %d, not %d", what, peer, rank, peer % lsa_size,
         rank % lsa_size);
  return communicator;
}

uint8_t* window_part(const char* what, uint64_t window, int rank, uint64_t offset, uint64_t bytes) {
  const auto found = windows.find(window);
  if (found == windows.end()) fail("%s: %llu is no window", what, static_cast<unsigned long long>(window));
  const Symmetric& memory = found->second;
  if (offset > memory.bytes || bytes > memory.bytes - offset)
    fail("%s: %llu bytes at offset %llu in a window of %llu bytes", what, static_cast<unsigned long long>(bytes),
         static_cast<unsigned long long>(offset), static_cast<unsigned long long>(memory.bytes));
  return memory.parts.at(static_cast<size_t>(rank)) + offset;
}

void send(const Network& network, int peer, Message message) {
  if (run.num_messages == 0) run.message_one_in = one_in(3) ? 0 : one_in(2) ? 2 : 64;
  message.communicator = network.communicator;
  message.context = network.context;
  message.peer = peer;
  message.number = run.num_messages++;
  run.messages.push_back(std::move(message));
  yield_one_in(8);
}

uint32_t shared_offset(const char* what, const void* address, uint64_t bytes) {
  const auto offset = static_cast<const uint8_t*>(address) - run.current->cta->shared;
  if (offset < 0 || static_cast<uint64_t>(offset) + bytes > run.shared_bytes)
    fail("%s: %llu bytes at offset %lld are not within the %u bytes of shared memory", what,
         static_cast<unsigned long long>(bytes), static_cast<long long>(offset), run.shared_bytes);
  return static_cast<uint32_t>(offset);
}

// Races.

[[noreturn]] void report(const char* what, bool writes, Memory memory, const Conflict& conflict) {
  const Cta& cta = *run.current->cta;
  const Access& earlier = conflict.earlier;
  std::string who = print("thread %u", earlier.agent);
  if (!cta.order->is_thread(earlier.agent)) {
    for (const Mbarrier& bar : cta.mbarriers)
      if (bar.agent == earlier.agent) who = print("a bulk_load on the mbarrier at %u", bar.offset);
    for (const Warp& warp : cta.warps)
      for (int lane = 0; lane < kWarp; lane++)
        if (warp.fibers[lane].store_agent == earlier.agent)
          who = print("a bulk_store of thread %d", warp.fibers[lane].thread);
    for (const auto& [key, agent_and_clock] : cta.transferring)
      if (agent_and_clock.first == earlier.agent)
        who = print("a network_%s of thread %d", std::get<3>(key) ? "get" : "put", std::get<0>(key));
  }
  const std::string place = source(earlier.place);
  const std::string where = memory == Memory::shared
                                ? print("shared memory offset %llu", static_cast<unsigned long long>(conflict.address))
                                : print("global memory 0x%llx", static_cast<unsigned long long>(conflict.address));
  if (conflict.unfenced)
    fail("%s: %s was written by %s at %s, and no fence_proxy_async makes that visible to it", what, where.c_str(),
         who.c_str(), place.c_str());
  fail("race: %s %s %s, which %s %s at %s; nothing orders the two", what, writes ? "writes" : "reads", where.c_str(),
       who.c_str(), conflict.earlier_writes ? "wrote" : "read", place.c_str());
}

// An ordinary or atomic access to any memory. Races in global memory are found between threads of one CTA only.
void watch(const void* address, uint64_t bytes, bool writes, bool atomic, const char* what) {
  Cta& cta = *run.current->cta;
  const auto offset = static_cast<uint64_t>(static_cast<const uint8_t*>(address) - cta.shared);
  const bool shared = offset < (run.shared_bytes + 127u) / 128 * 128;
  if (shared && offset + bytes > run.shared_bytes)
    fail("%s of %llu bytes at offset %llu of %u bytes of shared memory", what, static_cast<unsigned long long>(bytes),
         static_cast<unsigned long long>(offset), run.shared_bytes);
  const uint8_t* stack = run.current->stack;
  if (address >= stack && address < stack + kStack) return;
  const Memory memory = shared ? Memory::shared : Memory::global;
  const uint64_t at = shared ? offset : reinterpret_cast<uint64_t>(address);
  Conflict conflict;
  if (cta.order->access(run.current->thread, memory, at, bytes, writes, atomic, relative(run.current->place), conflict))
    report(what, writes, memory, conflict);
}

// Called for every load and store of the kernel that is not through a function here (-fsanitize=thread).
void ordinary_access(const void* address, uint64_t bytes, bool writes, const void* code) {
  if (run.current == nullptr) return;
  if (run.accesses_left != 0 && --run.accesses_left == 0) {
    run.accesses_left = 1 + draw_below(2 * run.switch_one_in);
    yield();
  }
  run.current->place = code;
  watch(address, bytes, writes, false, writes ? "a store" : "a load");
}

Mbarrier& find_mbarrier(const char* what, const uint64_t* address) {
  const uint32_t offset = shared_offset(what, address, 8);
  if (offset % 8 != 0) fail("%s: mbarrier at offset %u is not 8-byte aligned", what, offset);
  auto& all = run.current->cta->mbarriers;
  const uint64_t index = *address & 0xffff;
  if (*address >> 16 != kMbarrierTag || index >= all.size() || all[index].offset != offset)
    fail("%s: the mbarrier at offset %u was never initialised, or was overwritten", what, offset);
  const Mbarrier& bar = all[index];
  if (!run.current->cta->order->knows(run.current->thread, static_cast<uint16_t>(bar.init_thread), bar.init_clock))
    fail("%s: the mbarrier at offset %u was initialised by thread %d, and nothing orders this after that", what, offset,
         bar.init_thread);
  return all[index];
}

uint32_t index_of(const Mbarrier& bar) { return static_cast<uint32_t>(&bar - run.current->cta->mbarriers.data()); }

void arrive(const char* what, Mbarrier& bar, uint32_t bytes) {
  if (bar.pending == 0)
    fail("%s: mbarrier at %u has all %u arrivals of phase %llu already", what, bar.offset, bar.expected,
         static_cast<unsigned long long>(bar.phase));
  bar.bytes += bytes;
  if (bar.bytes > kMaxCount)
    fail("%s: mbarrier at %u expects %lld bytes, more than %u", what, bar.offset, static_cast<long long>(bar.bytes),
         kMaxCount);
  run.current->cta->order->release(run.current->thread, bar.channel);
  bar.pending--;
  complete(bar);
}

bool passed(Mbarrier& bar, uint32_t parity) {
  if ((bar.phase & 1) == parity) return false;
  bar.observed = bar.phase;
  run.current->cta->order->acquire(run.current->thread, bar.channel);
  return true;
}

bool in_window(const void* address) {
  const auto* byte = static_cast<const uint8_t*>(address);
  for (const auto& [handle, window] : windows)
    for (const uint8_t* part : window.parts)
      if (byte >= part && byte < part + window.bytes) return true;
  return false;
}

void check_bulk(const char* what, const void* shared, const void* global, uint32_t bytes) {
  if (bytes == 0 || bytes % 16 != 0) fail("%s: %u bytes; must be a positive multiple of 16", what, bytes);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("%s: global address %p is not 16-byte aligned", what, global);
  const uint32_t offset = shared_offset(what, shared, bytes);
  if (offset % 16 != 0) fail("%s: shared offset %u is not 16-byte aligned", what, offset);
}

void check_overlap(const char* what, bool is_load, uint32_t offset, uint32_t bytes) {
  for (const Copy& copy : run.copies) {
    if (copy.issuer->cta != run.current->cta || copy.read || (!is_load && !copy.is_load)) continue;
    if (offset < copy.offset + copy.bytes && copy.offset < offset + bytes)
      fail("%s: shared memory %u to %u is in use by a bulk_%s of thread %d in flight (%u to %u)", what, offset,
           offset + bytes, copy.is_load ? "load" : "store", copy.issuer->thread, copy.offset, copy.offset + copy.bytes);
  }
}

// Collectives and barriers.

uint64_t shuffle(const Warp& warp, int lane) {
  const int width = warp.widths[lane], parameter = warp.parameters[lane];
  const int begin = lane & ~(width - 1), end = begin + width;
  int source = lane;
  switch (warp.op) {
    case Collective::shfl: source = begin + (parameter & (width - 1)); break;
    case Collective::shfl_up: source = lane - parameter < begin ? lane : lane - parameter; break;
    case Collective::shfl_down: source = lane + parameter >= end ? lane : lane + parameter; break;
    default: source = (lane ^ parameter) >= end ? lane : lane ^ parameter; break;
  }
  return warp.values[source];
}

void finish_collective(Warp& warp) {
  if (warp.op == Collective::syncwarp) {  // the others don't order memory
    std::vector<int> threads;
    for (int lane = 0; lane < kWarp; lane++) threads.push_back(warp.index * kWarp + lane);
    warp.cta->order->meet(threads);
  }
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarp; lane++) votes |= static_cast<uint32_t>(warp.values[lane] != 0) << lane;
  for (int lane = 0; lane < kWarp; lane++) {
    uint64_t result = 0;
    switch (warp.op) {
      case Collective::syncwarp: break;
      case Collective::ballot: result = votes; break;
      case Collective::any: result = votes != 0; break;
      case Collective::all: result = votes == kFull; break;
      case Collective::match_any:
        for (int other = 0; other < kWarp; other++)
          result |= static_cast<uint64_t>(warp.values[other] == warp.values[lane]) << other;
        break;
      default: result = shuffle(warp, lane);
    }
    warp.fibers[lane].result = result;
  }
  warp.arrived = 0;
}

void release(Barrier& barrier) {
  std::vector<int> threads;
  for (const Fiber* fiber : barrier.arrived) threads.push_back(fiber->thread);
  barrier.arrived[0]->cta->order->meet(threads);
  for (Fiber* fiber : barrier.arrived)
    if (fiber != run.current) wake(*fiber);
  barrier.arrived.clear();
  barrier.expected = 0;
}

bool syncthreads_complete(const Cta& cta) {
  return static_cast<int>(cta.barriers[0].arrived.size()) == cta.alive && cta.alive > 0;
}

void arrive_at_barrier(int id, int threads, bool everybody) {
  Cta& cta = *run.current->cta;
  Barrier& barrier = cta.barriers[id];
  if (barrier.expected != 0 && barrier.expected != threads)
    fail("barrier_sync(%d, %d): others wait there for %d threads", id, threads, barrier.expected);
  barrier.expected = threads;
  barrier.arrived.push_back(run.current);
  if (everybody ? syncthreads_complete(cta) : static_cast<int>(barrier.arrived.size()) == threads) {
    if (!everybody) {
      std::vector<int> lanes(cta.warps.size());
      for (const Fiber* fiber : barrier.arrived) lanes[fiber->warp->index]++;
      for (size_t warp = 0; warp < lanes.size(); warp++)
        if (lanes[warp] % kWarp != 0)
          fail("barrier_sync(%d, %d): only %d lanes of warp %zu take part", id, threads, lanes[warp], warp);
    }
    release(barrier);
    yield();
  } else {
    block(Wait::barrier, static_cast<uint32_t>(id), static_cast<uint32_t>(threads));
  }
}

void finish_fiber() {
  Fiber& fiber = *run.current;
  Warp& warp = *fiber.warp;
  Cta& cta = *fiber.cta;
  if (warp.arrived != 0) fail("returned while other lanes of its warp wait in %s", kCollectiveNames[int(warp.op)]);
  if (fiber.groups.back().unread > 0 || fiber.groups.back().unwritten > 0)
    fail("returned with bulk stores not waited for (nor committed)");
  for (const StoreGroup& group : fiber.groups)
    if (group.unread > 0) fail("returned with bulk stores not waited for");
  fiber.done = true;
  warp.done |= lane_bit(fiber);
  run.progress = true;
  run.alive--;
  if (--cta.alive == 0) {
    for (const Mbarrier& bar : cta.mbarriers)
      if (bar.observed < bar.loading)
        fail("the CTA's last thread returned, and nobody has waited for the last bulk_load on mbarrier %u", bar.offset);
    for (const auto& transfer : cta.transfers)
      if (!transfer->flushed)
        fail("the CTA's last thread returned, and a network_%s of thread %d at %s is not flushed",
             transfer->is_get ? "get" : "put", transfer->thread, source(transfer->place).c_str());
  } else if (cta.barriers[0].expected == static_cast<int>(cta.warps.size()) * kWarp && syncthreads_complete(cta)) {
    release(cta.barriers[0]);
  }
}

// Messages about who waits for what.

std::string waiting_for(const Fiber& fiber) {
  const Cta& cta = *fiber.cta;
  const std::string at = " at " + source(fiber.place);
  switch (fiber.wait) {
    case Wait::collective: {
      const uint32_t missing = ~fiber.warp->arrived;
      return print("%s (lanes missing: 0x%08x)", kCollectiveNames[int(fiber.warp->op)], missing) + at;
    }
    case Wait::barrier: {
      const Barrier& barrier = cta.barriers[fiber.wait_object];
      const size_t there = barrier.arrived.size();
      return print("barrier %u (%zu of %u threads there)", fiber.wait_object, there, fiber.wait_value) + at;
    }
    case Wait::mbarrier: {
      const Mbarrier& bar = cta.mbarriers[fiber.wait_object];
      return print("mbarrier at %u, parity %u (phase %llu, %u of %u arrivals missing, %lld bytes missing)", bar.offset,
                   fiber.wait_value, static_cast<unsigned long long>(bar.phase), bar.pending, bar.expected,
                   static_cast<long long>(bar.bytes)) +
             at;
    }
    case Wait::store_reads: return "bulk_wait_read" + at;
    case Wait::store_writes: return "bulk_wait_all" + at;
    case Wait::flush: return "network_flush" + at;
    case Wait::nothing: break;
  }
  if (fiber.done) return "returned";
  return ((fiber.warp->paused & lane_bit(fiber)) != 0 ? "spins with pause()" : "ready") + at;
}

// "threads 0 to 31, 40: barrier ...; thread 41: ...", in the order of the first thread of each state.
std::string describe(const Cta& cta) {
  std::vector<std::string> states, ranges;
  const int threads = static_cast<int>(cta.warps.size()) * kWarp;
  std::vector<size_t> state_of(static_cast<size_t>(threads) + 1, SIZE_MAX);
  for (int thread = 0; thread < threads; thread++) {
    const std::string state = waiting_for(cta.warps[thread / kWarp].fibers[thread % kWarp]);
    size_t index = 0;
    while (index < states.size() && states[index] != state) index++;
    if (index == states.size()) {
      states.push_back(state);
      ranges.emplace_back();
    }
    state_of[thread] = index;
  }
  for (int begin = 0, thread = 1; thread <= threads; thread++) {
    if (state_of[thread] == state_of[begin]) continue;
    std::string& range = ranges[state_of[begin]];
    if (!range.empty()) range += ", ";
    range += thread - begin > 1 ? print("%d to %d", begin, thread - 1) : print("%d", begin);
    begin = thread;
  }
  std::string text;
  for (size_t i = 0; i < states.size(); i++)
    text += (i == 0 ? "threads " : "; threads ") + ranges[i] + ": " + states[i];
  return text;
}

std::string describe() {
  std::string text;
  size_t begin = 0;
  std::string state = describe(run.ctas[0]);
  for (size_t cta = 1; cta <= run.ctas.size(); cta++) {
    const std::string next = cta < run.ctas.size() ? describe(run.ctas[cta]) : std::string();
    if (next == state) continue;
    text += print(cta - begin > 1 ? "\n  CTAs %zu to %zu: " : "\n  CTA %zu: ", begin, cta - 1) + state;
    begin = cta;
    state = next;
  }
  return text;
}

// A kernel's bad address must not kill the test process.
void on_fault(int signal, siginfo_t* info, void*) {
  if (active == 0 || pthread_equal(pthread_self(), owner) == 0) {
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    return;  // the instruction runs again and meets the old handler
  }
  const auto* address = static_cast<const uint8_t*>(info->si_addr);
  std::string where = print("%p", static_cast<const void*>(address));
  for (const Cta& cta : run.ctas) {
    const auto offset = address - cta.shared;
    if (offset >= -static_cast<int64_t>(kPage) && offset < static_cast<int64_t>(run.shared_bytes + kPage))
      where = print("shared memory offset %lld of CTA %d (it has %u bytes)", static_cast<long long>(offset), cta.index,
                    run.shared_bytes);
  }
  if (run.current != nullptr && address >= run.current->stack && address < run.current->stack + kPage)
    where = print("the end of its stack of %zu bytes", kStack - kPage);
  fail("%s: bad access at %s%s", signal == SIGBUS ? "bus error" : "segmentation fault", where.c_str(),
       run.copying == nullptr ? "" : run.copying->is_load ? " by bulk_load" : " by bulk_store");
}

// Switching.

void entry() {
  // Later launches come here at once: ucontext's functions make system calls.
  run.current->begun = true;
  _setjmp(run.current->begin);
  run.body(run.args);
  finish_fiber();
  _longjmp(run.scheduler, 1);
}

void start(Fiber& fiber) {
  if (fiber.begun) _longjmp(fiber.begin, 1);
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack + kPage;
  context.uc_stack.ss_size = kStack - kPage;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  setcontext(&context);
}

void resume(Fiber& fiber) {
  run.current = &fiber;
  threadIdx.x = static_cast<unsigned>(fiber.thread);
  blockIdx.x = static_cast<unsigned>(fiber.cta->index);
  if (_setjmp(run.scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    start(fiber);
  }
  run.current = nullptr;
}

Warp& choose_warp() {
  if (run.policy == Policy::uniform) return *run.ready[draw_below(static_cast<uint32_t>(run.ready.size()))];
  Warp* current = run.current_warp;
  if (current != nullptr && current->position >= 0 && !one_in(256)) return *current;
  if (run.policy == Policy::burst) {
    current = run.ready[draw_below(static_cast<uint32_t>(run.ready.size()))];
  } else {
    run.ready[draw_below(static_cast<uint32_t>(run.ready.size()))]->priority ^= one_in(32) ? draw() : 0;
    current = run.ready[0];
    for (Warp* warp : run.ready)
      if (warp->priority > current->priority) current = warp;
  }
  return *(run.current_warp = current);
}

Fiber& choose_lane(Warp& warp) {
  const auto turn = draw_below(kWarp);
  const uint32_t turned = warp.ready >> turn | (turn == 0 ? 0 : warp.ready << (kWarp - turn));
  const auto lane = (static_cast<uint32_t>(__builtin_ctz(turned)) + turn) % kWarp;
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) remove_ready(warp);
  return warp.fibers[lane];
}

void unpause() {
  for (Warp* warp : run.paused) {
    add_ready(*warp, warp->paused);
    warp->paused = 0;
  }
  run.paused.clear();
}

void begin_late_cta() {
  if (run.late_cta < 0) return;
  for (Warp& warp : run.ctas[static_cast<size_t>(run.late_cta)].warps) add_ready(warp, kFull);
  run.late_cta = -1;
}

void schedule() {
  const double deadline = seconds() + limit_seconds;
  int idle = 0;
  for (uint64_t step = 1; run.alive > 0; step++) {
    if (run.late_cta >= 0 && ((run.ready.empty() && run.paused.empty()) || (step % 64 == 0 && seconds() > run.late_until)))
      begin_late_cta();
    if (step % 4096 == 0 && seconds() > deadline) stop(print("still running after %g s:", limit_seconds) + describe());
    if (!run.copies.empty() && one_in(run.copy_one_in))
      advance_copy(draw_below(static_cast<uint32_t>(run.copies.size())));
    if (!run.messages.empty() && run.message_one_in != 0 && one_in(run.message_one_in)) advance_a_message();
    if (run.ready.empty()) {
      if (!run.copies.empty() && (run.paused.empty() || one_in(2))) {
        advance_copy(draw_below(static_cast<uint32_t>(run.copies.size())));
        continue;
      }
      if (!run.messages.empty() && (run.paused.empty() || one_in(4))) {
        advance_a_message();
        continue;
      }
      if (run.paused.empty()) stop("deadlock:" + describe());
      // Everybody spins: on peers, which need this core too.
      idle = run.progress ? 0 : idle + 1;
      run.progress = false;
      if (idle > 3) usleep(50);
      if (idle > 0) {
        sched_yield();
        if (seconds() > deadline) stop(print("still running after %g s:", limit_seconds) + describe());
      }
      unpause();
    } else if (!run.paused.empty() && one_in(64)) {
      // With many that spin somebody is always ready; what they spin for may still be on its way.
      if (!run.messages.empty() && one_in(4)) advance_a_message();
      unpause();
    }
    resume(choose_lane(choose_warp()));
  }
  while (!run.copies.empty()) advance_copy(draw_below(static_cast<uint32_t>(run.copies.size())));
}

// Memory that launches share.

uint8_t* map_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return pages == MAP_FAILED ? nullptr : static_cast<uint8_t*>(pages);
}

bool grow_pool(size_t fibers, size_t ctas) {
  while (pool.fibers.size() < fibers) {
    const size_t count = kMaxThreads / 4;
    uint8_t* stacks = map_pages(count * kStack);
    if (stacks == nullptr) return false;
    for (size_t i = 0; i < count; i++) {
      mprotect(stacks + i * kStack, kPage, PROT_NONE);
      pool.fibers.emplace_back().stack = stacks + i * kStack;
    }
  }
  constexpr size_t room = (kMaxShared + kPage - 1) / kPage * kPage;
  while (pool.shared.size() < ctas) {
    uint8_t* pages = map_pages(room + 2 * kPage);
    if (pages == nullptr) return false;
    mprotect(pages, kPage, PROT_NONE);
    mprotect(pages + kPage + room, kPage, PROT_NONE);
    pool.shared.push_back(pages + kPage + room);
  }
  return true;
}

void prepare(int ctas, int threads) {
  run.ctas.clear();
  run.ctas.resize(static_cast<size_t>(ctas));
  run.ready.clear();
  run.paused.clear();
  run.copies.clear();
  run.messages.clear();
  run.num_messages = 0;
  run.flushing.clear();
  run.current_warp = nullptr;
  run.current = nullptr;
  run.copying = nullptr;
  run.progress = false;
  run.error.clear();
  run.alive = ctas * threads;
  run.policy = static_cast<Policy>(draw_below(3));
  run.late_cta = ctas > 1 && one_in(2) ? static_cast<int>(draw_below(static_cast<uint32_t>(ctas))) : -1;
  run.late_until = seconds() + kLateSeconds;
  run.copy_one_in = draw_below(3) == 0 ? 2 : one_in(2) ? 32 : 4096;
  run.switch_one_in = one_in(2) ? 0 : one_in(2) ? 32 : 1024;
  run.accesses_left = run.switch_one_in;
  const size_t shared_room = (run.shared_bytes + 127) / 128 * 128;
  for (int c = 0; c < ctas; c++) {
    Cta& cta = run.ctas[static_cast<size_t>(c)];
    cta.index = c;
    cta.alive = threads;
    cta.shared = pool.shared[static_cast<size_t>(c)] - shared_room;
    std::memset(cta.shared, kUninitialised, shared_room);
    cta.order = std::make_unique<Order>(threads, run.shared_bytes);
    cta.warps.resize(static_cast<size_t>(threads / kWarp));
    for (size_t w = 0; w < cta.warps.size(); w++) {
      Warp& warp = cta.warps[w];
      warp.cta = &cta;
      warp.index = static_cast<int>(w);
      warp.priority = static_cast<uint32_t>(draw());
      warp.fibers = &pool.fibers[static_cast<size_t>(c * threads) + w * kWarp];
      for (int lane = 0; lane < kWarp; lane++) {
        Fiber& fiber = warp.fibers[lane];
        fiber.cta = &cta;
        fiber.warp = &warp;
        fiber.thread = static_cast<int>(w) * kWarp + lane;
        fiber.started = fiber.done = false;
        fiber.wait = Wait::nothing;
        fiber.groups.resize(1);
        fiber.groups[0] = {};
        fiber.first_group = 0;
        fiber.store_agent = 0;
        fiber.flushes.clear();
        fiber.place = nullptr;
      }
      if (c != run.late_cta) add_ready(warp, kFull);
    }
  }
}

// Give what may be under way when a kernel ends to whoever carries it on, in the order in which it was sent.
void hand_over_what_is_left() {
  std::sort(run.messages.begin(), run.messages.end(),
            [](const Message& a, const Message& b) { return a.number < b.number; });
  for (const Message& message : run.messages) {
    if (!message.left) continue;
    const bool is_put = message.kind == Message::Kind::put, was_read = is_put && message.transfer->done;
    const uint8_t* source = was_read ? message.data.data() : message.source;
    const uint64_t way = message.communicator << 16 | static_cast<uint64_t>(message.context);
    carry_on(static_cast<int>(message.kind), way, message.peer, message.target + message.begin,
             is_put ? source + message.begin : nullptr, message.end - message.begin, was_read, message.value);
  }
  std::erase_if(run.messages, [](const Message& message) { return message.left; });
}

}  // namespace

// Notes who calls, for messages; first in every function that kernels call.
#define EPV2_PLACE() run.current->place = __builtin_return_address(0)

uint64_t collective(Collective op, unsigned mask, uint64_t value, int parameter, int width) {
  EPV2_PLACE();
  Fiber& fiber = *run.current;
  Warp& warp = *fiber.warp;
  const char* name = kCollectiveNames[int(op)];
  if (mask != kFull) fail("%s: mask 0x%08x; only 0xffffffff is supported", name, mask);
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) fail("%s: width %d is not a power of two", name, width);
  if (warp.done != 0) fail("%s: lanes 0x%08x of the warp have returned", name, warp.done);
  if (warp.arrived != 0 && warp.op != op)
    fail("%s: lanes 0x%08x of the warp wait in %s", name, warp.arrived, kCollectiveNames[int(warp.op)]);
  const int lane = fiber.thread % kWarp;
  warp.op = op;
  warp.values[lane] = value;
  warp.parameters[lane] = parameter;
  warp.widths[lane] = width;
  warp.arrived |= 1u << lane;
  if (warp.arrived != kFull) {
    block(Wait::collective, 0, 0);
  } else {
    finish_collective(warp);
    for (int other = 0; other < kWarp; other++)
      if (other != lane) wake(warp.fibers[other]);
    yield();
  }
  return fiber.result;
}

template <typename T>
uint64_t apply(Atomic op, T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_SEQ_CST), desired;
  do {
    switch (op) {
      case Atomic::add: desired = static_cast<T>(static_cast<uint64_t>(old) + static_cast<uint64_t>(value)); break;
      case Atomic::bit_or: desired = old | value; break;
      case Atomic::bit_and: desired = old & value; break;
      case Atomic::maximum: desired = old > value ? old : value; break;
      case Atomic::minimum: desired = old < value ? old : value; break;
      default: desired = value;
    }
  } while (!__atomic_compare_exchange_n(address, &old, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return to_bits(old);
}

void check_aligned(const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % static_cast<unsigned>(bytes) != 0)
    fail("atomic on %p, which is not %d-byte aligned", address, bytes);
}

uint64_t atomic(Atomic op, void* address, int bytes, bool is_signed, uint64_t value) {
  EPV2_PLACE();
  check_aligned(address, bytes);
  yield_one_in(4);
  watch(address, static_cast<uint64_t>(bytes), true, true, "an atomic");
  const uint64_t old =
      bytes == 8   ? apply(op, static_cast<unsigned long long*>(address), from_bits<unsigned long long>(value))
      : is_signed ? apply(op, static_cast<int*>(address), from_bits<int>(value))
                  : apply(op, static_cast<unsigned*>(address), from_bits<unsigned>(value));
  yield_one_in(4);
  return old;
}

uint64_t compare_and_swap(void* address, int bytes, uint64_t expected, uint64_t desired) {
  EPV2_PLACE();
  check_aligned(address, bytes);
  yield_one_in(4);
  watch(address, static_cast<uint64_t>(bytes), true, true, "an atomic");
  if (bytes == 8) {
    __atomic_compare_exchange_n(static_cast<uint64_t*>(address), &expected, desired, false, __ATOMIC_SEQ_CST,
                                __ATOMIC_SEQ_CST);
  } else {
    auto old = static_cast<uint32_t>(expected);
    __atomic_compare_exchange_n(static_cast<uint32_t*>(address), &old, static_cast<uint32_t>(desired), false,
                                __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    expected = old;
  }
  yield_one_in(4);
  return expected;
}

void fence() {
  EPV2_PLACE();
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  yield_one_in(4);
}

void bulk_wait(int groups, bool read_only) {
  EPV2_PLACE();
  Fiber& fiber = *run.current;
  forget_finished_groups(fiber);
  const auto committed = static_cast<int64_t>(fiber.groups.size()) - 1;
  const uint64_t read = fiber.first_group + static_cast<uint64_t>(std::max(committed - groups, int64_t{0}));
  for (int64_t i = 0; i + groups < committed; i++)
    if ((read_only ? fiber.groups[i].unread : fiber.groups[i].unwritten) > 0) {
      block(read_only ? Wait::store_reads : Wait::store_writes, 0, static_cast<uint32_t>(groups));
      break;
    }
  if (fiber.store_agent != 0) fiber.cta->order->learn(fiber.thread, fiber.store_agent, static_cast<uint32_t>(read));
}

int launch(const char* name, Body body, const void* args, uint64_t args_bytes, int max_threads, int ctas, int threads,
           int shared_bytes, uint64_t seed, char* message, int message_bytes) {
  auto refuse = [&](const std::string& text) {
    snprintf(message, static_cast<size_t>(message_bytes), "%s: %s", name, text.c_str());
    return 1;
  };
  if (ctas < 1) return refuse(print("%d CTAs; must be 1 or more", ctas));
  if (threads < kWarp || threads % kWarp != 0 || threads > max_threads || max_threads > kMaxThreads)
    return refuse(print("%d threads; must be a multiple of 32, at most %d", threads, max_threads));
  if (shared_bytes < 0 || static_cast<size_t>(shared_bytes) > kMaxShared)
    return refuse(print("%d bytes of shared memory; must be 0 to %zu", shared_bytes, kMaxShared));
  const std::lock_guard<std::mutex> one_launch(launching);
  if (!grow_pool(static_cast<size_t>(ctas) * static_cast<size_t>(threads), static_cast<size_t>(ctas)))
    return refuse(print("no memory for %d x %d threads", ctas, threads));
  const std::vector<uint64_t> copy((args_bytes + 7) / 8);  // as launches on a GPU: changes by the caller are not seen
  std::memcpy(const_cast<uint64_t*>(copy.data()), args, args_bytes);
  run.name = name;
  run.body = body;
  run.args = copy.data();
  run.shared_bytes = static_cast<uint32_t>(shared_bytes);
  run.random = seed;
  prepare(ctas, threads);
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(ctas);

  static std::vector<uint8_t> signal_stack(64 << 10);
  stack_t alternative{}, old_stack{};
  alternative.ss_sp = signal_stack.data();
  alternative.ss_size = signal_stack.size();
  sigaltstack(&alternative, &old_stack);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  owner = pthread_self();
  active = 1;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  if (_setjmp(run.abort) == 0) schedule();
  run.alive = 0;
  if (carry_on != nullptr) hand_over_what_is_left();
  while (!run.messages.empty()) advance_a_message();  // after an error, too: peers need not wait for what was sent
  active = 0;
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaltstack(&old_stack, nullptr);
  return run.error.empty() ? 0 : refuse(print("(seed %llu) ", static_cast<unsigned long long>(seed)) + run.error);
}

}  // namespace epv2::emulator

void __syncthreads() {
  using namespace epv2::emulator;
  EPV2_PLACE();
  const auto threads = static_cast<int>(blockDim.x);
  arrive_at_barrier(0, threads, true);
}

namespace epv2 {

using namespace emulator;

void barrier_sync(int id, int threads) {
  EPV2_PLACE();
  if (id < 0 || id >= kBarriers) fail("barrier_sync(%d, %d): ids are 0 to %d", id, threads, kBarriers - 1);
  if (threads < kWarp || threads % kWarp != 0 || threads > static_cast<int>(blockDim.x))
    fail("barrier_sync(%d, %d): threads must be a multiple of 32, at most the CTA's %u", id, threads, blockDim.x);
  arrive_at_barrier(id, threads, false);
}

uint8_t* shared_memory() { return run.current->cta->shared; }

void mbarrier_init(uint64_t* address, uint32_t arrivals) {
  EPV2_PLACE();
  const uint32_t offset = shared_offset("mbarrier_init", address, 8);
  if (offset % 8 != 0) fail("mbarrier_init: offset %u is not 8-byte aligned", offset);
  if (arrivals < 1 || arrivals > kMaxCount) fail("mbarrier_init: %u arrivals; must be 1 to %u", arrivals, kMaxCount);
  auto& all = run.current->cta->mbarriers;
  size_t index = 0;
  while (index < all.size() && all[index].offset != offset) index++;
  watch(address, 8, true, false, "mbarrier_init");
  if (index == all.size()) {
    all.emplace_back().agent = run.current->cta->order->new_agent();
  } else if (!all[index].waiters.empty()) {
    fail("mbarrier_init: thread %d waits for the mbarrier at %u", all[index].waiters[0]->thread, offset);
  }
  Mbarrier& bar = all[index];
  bar.offset = offset;
  bar.expected = bar.pending = arrivals;
  bar.bytes = 0;
  bar.phase += bar.phase & 1;  // the next one is even; numbers never repeat
  bar.observed = bar.loading = bar.phase;
  bar.init_thread = run.current->thread;
  bar.init_clock = run.current->cta->order->now(run.current->thread);
  bar.init_fenced = false;
  *address = kMbarrierTag << 16 | index;
}

void mbarrier_init_fence() {
  EPV2_PLACE();
  Cta& cta = *run.current->cta;
  for (Mbarrier& bar : cta.mbarriers) bar.init_fenced |= bar.init_thread == run.current->thread;
  cta.order->fence_proxy(run.current->thread);
}

void mbarrier_arrive(uint64_t* address) {
  EPV2_PLACE();
  yield_one_in(8);
  arrive("mbarrier_arrive", find_mbarrier("mbarrier_arrive", address), 0);
  yield_one_in(8);
}

void mbarrier_arrive_expect(uint64_t* address, uint32_t bytes) {
  EPV2_PLACE();
  yield_one_in(8);
  arrive("mbarrier_arrive_expect", find_mbarrier("mbarrier_arrive_expect", address), bytes);
  yield_one_in(8);
}

bool mbarrier_test(uint64_t* address, uint32_t parity) {
  EPV2_PLACE();
  if (parity > 1) fail("mbarrier_test: parity %u; must be 0 or 1", parity);
  if (passed(find_mbarrier("mbarrier_test", address), parity)) return true;
  pause();
  return passed(find_mbarrier("mbarrier_test", address), parity);
}

void mbarrier_wait(uint64_t* address, uint32_t parity) {
  EPV2_PLACE();
  if (parity > 1) fail("mbarrier_wait: parity %u; must be 0 or 1", parity);
  yield_one_in(8);
  // A thread that is woken may run so late that the next phase is over too: as on a GPU it then waits on.
  while (true) {
    Mbarrier& bar = find_mbarrier("mbarrier_wait", address);
    if (passed(bar, parity)) return;
    bar.waiters.push_back(run.current);
    block(Wait::mbarrier, index_of(bar), parity);
  }
}

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* address) {
  EPV2_PLACE();
  yield_one_in(8);
  check_bulk("bulk_load", shared, global, bytes);
  Mbarrier& bar = find_mbarrier("bulk_load", address);
  Copy copy;
  copy.is_load = true;
  copy.issuer = run.current;
  copy.offset = shared_offset("bulk_load", shared, bytes);
  copy.bytes = bytes;
  copy.mbarrier = index_of(bar);
  copy.global = static_cast<uint8_t*>(const_cast<void*>(global));
  check_overlap("bulk_load", true, copy.offset, bytes);
  if (!bar.init_fenced) fail("bulk_load: the mbarrier at %u was initialised without mbarrier_init_fence", bar.offset);
  if (Access acquire; in_window(global) && run.current->cta->order->reads_unfenced_peer(run.current->thread, acquire))
    fail("bulk_load: reads a window after thread %u acquired a flag there at %s, without fence_proxy_async between",
         acquire.agent, source(acquire.place).c_str());
  Conflict conflict;
  if (run.current->cta->order->copy(run.current->thread, copy.offset, bytes, true, bar.agent,
                                    static_cast<uint32_t>(bar.phase + 1), relative(run.current->place), conflict))
    report("bulk_load", true, Memory::shared, conflict);
  std::memset(shared, kInFlight, bytes);
  bar.loading = bar.phase + 1;
  run.copies.push_back(std::move(copy));
  yield_one_in(8);
}

void bulk_store(void* global, const void* shared, uint32_t bytes) {
  EPV2_PLACE();
  yield_one_in(8);
  check_bulk("bulk_store", shared, global, bytes);
  Fiber& fiber = *run.current;
  Copy copy;
  copy.issuer = &fiber;
  copy.offset = shared_offset("bulk_store", shared, bytes);
  copy.bytes = bytes;
  copy.global = static_cast<uint8_t*>(global);
  copy.group = fiber.first_group + fiber.groups.size() - 1;
  check_overlap("bulk_store", false, copy.offset, bytes);
  if (fiber.store_agent == 0) fiber.store_agent = fiber.cta->order->new_agent();
  Conflict conflict;
  if (fiber.cta->order->copy(fiber.thread, copy.offset, bytes, false, fiber.store_agent,
                             static_cast<uint32_t>(copy.group + 1), relative(fiber.place), conflict))
    report("bulk_store", false, Memory::shared, conflict);
  fiber.groups.back().unread++;
  fiber.groups.back().unwritten++;
  run.copies.push_back(std::move(copy));
  yield_one_in(8);
}

void bulk_commit() {
  forget_finished_groups(*run.current);
  run.current->groups.emplace_back();
}

void fence_proxy_async() {
  EPV2_PLACE();
  run.current->cta->order->fence_proxy(run.current->thread);
  yield_one_in(8);
}

// Flags order accesses to shared memory within a CTA, too. (What they do between CTAs is this CPU's memory order.)
uint32_t load_acquire_system(const uint32_t* address) {
  EPV2_PLACE();
  check_aligned(address, 4);
  yield_one_in(4);
  const uint32_t value = __atomic_load_n(address, __ATOMIC_SEQ_CST);
  Order& order = *run.current->cta->order;
  Channel& flag = order.flag(address);
  order.acquire(run.current->thread, flag);
  if (value != flag.value && in_window(address))
    order.acquired_from_peer(run.current->thread, relative(run.current->place));
  flag.value = value;
  return value;
}

void store_release_system(uint32_t* address, uint32_t value) {
  EPV2_PLACE();
  check_aligned(address, 4);
  yield_one_in(4);
  Order& order = *run.current->cta->order;
  order.release(run.current->thread, order.flag(address));
  Order::publish(order.flag(address));
  __atomic_store_n(address, value, __ATOMIC_SEQ_CST);
  yield_one_in(4);
}

uint32_t atomic_add_acq_rel(uint32_t* address, uint32_t value) {
  EPV2_PLACE();
  check_aligned(address, 4);
  yield_one_in(4);
  Order& order = *run.current->cta->order;
  order.release(run.current->thread, order.flag(address));
  Order::publish(order.flag(address));
  order.acquire(run.current->thread, order.flag(address));
  const uint32_t old = __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
  yield_one_in(4);
  return old;
}

uint32_t load_relaxed(const uint32_t* address) {
  EPV2_PLACE();
  check_aligned(address, 4);
  yield_one_in(4);
  return __atomic_load_n(address, __ATOMIC_RELAXED);
}

uint64_t global_nanoseconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1000000000ull + static_cast<uint64_t>(t.tv_nsec);
}

void pause() {
  EPV2_PLACE();
  Fiber& fiber = *run.current;
  if (fiber.warp->paused == 0) run.paused.push_back(fiber.warp);
  fiber.warp->paused |= lane_bit(fiber);
  suspend();
}

uint8_t* peer_pointer(uint64_t window, uint64_t offset, int peer) {
  EPV2_PLACE();
  window_part("peer_pointer", window, 0, offset, 0);
  const Symmetric& memory = windows.at(window);
  if (peer < 0 || peer >= memory.lsa_size)
    fail("peer_pointer: peer %d; the LSA team has %d", peer, memory.lsa_size);
  return memory.parts[static_cast<size_t>(memory.first() + peer)] + offset;
}

// Hand a put or get of `bytes` to the network. `own` is what it reads or writes here.
void start_transfer(const Network& network, int peer, Message message, uint8_t* own, uint32_t bytes) {
  const bool is_get = message.kind == Message::Kind::get;
  const Fiber& fiber = *run.current;
  Cta& cta = *fiber.cta;
  auto& [agent, clock] = cta.transferring[{fiber.thread, network.communicator, network.context, is_get}];
  if (agent == 0) agent = cta.order->new_agent();
  clock++;
  Conflict conflict;
  if (cta.order->transfer(fiber.thread, reinterpret_cast<uint64_t>(own), bytes, is_get, agent, clock,
                          relative(fiber.place), conflict))
    report(is_get ? "network_get" : "network_put", is_get, Memory::global, conflict);
  message.end = bytes;
  message.transfer = std::make_shared<Transfer>();
  message.transfer->is_get = is_get;
  message.transfer->thread = fiber.thread;
  message.transfer->issued = cta.order->now(fiber.thread);
  message.transfer->communicator = network.communicator;
  message.transfer->context = network.context;
  message.transfer->agent = agent;
  message.transfer->clock = clock;
  message.transfer->place = fiber.place;
  cta.transfers.push_back(message.transfer);
  if (is_get) std::memset(own, kInFlight, bytes);
  send(network, peer, std::move(message));
}

void network_put(Network network, int peer, uint64_t window, uint64_t to, uint64_t from, uint32_t bytes) {
  EPV2_PLACE();
  yield_one_in(8);
  const int rank = check_network_peer("network_put", network, peer).signals.rank;
  if (bytes == 0) fail("network_put: 0 bytes; must be at least 1");
  uint8_t* source = window_part("network_put", window, rank, from, bytes);
  for (const Copy& copy : run.copies)
    if (!copy.is_load && copy.global < source + bytes && source < copy.global + copy.bytes)
      fail("network_put: its source is being written by a bulk_store of CTA %d thread %d in flight",
           copy.issuer->cta->index, copy.issuer->thread);
  Message message;
  message.kind = Message::Kind::put;
  message.source = source;
  message.target = window_part("network_put", window, peer, to, bytes);
  start_transfer(network, peer, std::move(message), source, bytes);
}

void network_get(Network network, int peer, uint64_t window, uint64_t to, uint64_t from, uint32_t bytes) {
  EPV2_PLACE();
  yield_one_in(8);
  const int rank = check_network_peer("network_get", network, peer).signals.rank;
  if (bytes == 0) fail("network_get: 0 bytes; must be at least 1");
  Message message;
  message.kind = Message::Kind::get;
  message.source = window_part("network_get", window, peer, from, bytes);
  message.target = window_part("network_get", window, rank, to, bytes);
  uint8_t* target = message.target;
  start_transfer(network, peer, std::move(message), target, bytes);
}

void network_put_value(Network network, int peer, uint64_t window, uint64_t to, uint64_t value) {
  EPV2_PLACE();
  yield_one_in(8);
  check_network_peer("network_put_value", network, peer);
  if (to % 8 != 0) fail("network_put_value: offset %llu is not a multiple of 8", static_cast<unsigned long long>(to));
  Message message;
  message.kind = Message::Kind::value;
  message.target = window_part("network_put_value", window, peer, to, 8);
  message.value = value;
  send(network, peer, std::move(message));
}

void network_signal(Network network, int peer, uint32_t signal, uint64_t value) {
  EPV2_PLACE();
  yield_one_in(8);
  check_network_peer("network_signal", network, peer);
  Message message;
  message.kind = Message::Kind::signal;
  message.target = reinterpret_cast<uint8_t*>(signal_word("network_signal", network, peer, signal));
  message.value = value;
  send(network, peer, std::move(message));
}

void network_signal_word(Network network, int peer, uint64_t window, uint64_t word, uint64_t value) {
  EPV2_PLACE();
  yield_one_in(8);
  check_network_peer("network_signal_word", network, peer);
  if (word % 8 != 0)
    fail("network_signal_word: offset %llu is not a multiple of 8", static_cast<unsigned long long>(word));
  Message message;
  message.kind = Message::Kind::signal;
  message.to_word = true;
  message.target = window_part("network_signal_word", window, peer, word, 8);
  if (!windows.at(window).ordered) fail("network_signal_word: the window is not one that the network keeps in order");
  message.value = value;
  send(network, peer, std::move(message));
}

uint64_t network_signal_value(Network network, uint32_t signal) {
  EPV2_PLACE();
  yield_one_in(4);
  const int rank = find_communicator("network_signal_value", network).signals.rank;
  const uint64_t* word = signal_word("network_signal_value", network, rank, signal);
  const uint64_t value = __atomic_load_n(word, __ATOMIC_SEQ_CST);
  Order& order = *run.current->cta->order;
  Channel& flag = order.flag(word);
  if (value != flag.value) order.acquired_from_peer(run.current->thread, relative(run.current->place));
  flag.value = value;
  return value;
}

void network_flush(Network network) {
  EPV2_PLACE();
  yield_one_in(8);
  find_communicator("network_flush", network);
  Fiber& fiber = *run.current;
  Cta& cta = *fiber.cta;
  bool waits = false, gets = false;
  for (const auto& transfer : cta.transfers)  // those that this thread does not know of might as well come later
    if (transfer->communicator == network.communicator && transfer->context == network.context &&
        cta.order->knows(fiber.thread, static_cast<uint16_t>(transfer->thread), transfer->issued)) {
      fiber.flushes.push_back(transfer);
      waits |= !transfer->done;
      gets |= transfer->is_get && !transfer->flushed;
    }
  if (waits) {
    run.flushing.push_back(&fiber);
    block(Wait::flush, 0, 0);
  }
  for (const auto& transfer : fiber.flushes) {
    transfer->flushed = true;
    cta.order->learn(fiber.thread, transfer->agent, transfer->clock);
  }
  if (gets) cta.order->acquired_from_peer(fiber.thread, relative(fiber.place));
  fiber.flushes.clear();
}

void network_abandon(Network network) {
  find_communicator("network_abandon", network);
  for (const auto& transfer : run.current->cta->transfers)
    if (transfer->communicator == network.communicator && transfer->context == network.context)
      transfer->flushed = true;
}

void network_leave(Network network) {
  EPV2_PLACE();
  yield_one_in(8);
  find_communicator("network_leave", network);
  const Fiber& fiber = *run.current;
  const Cta& cta = *fiber.cta;
  for (const auto& transfer : cta.transfers)  // as for a flush
    if (!transfer->is_get && transfer->communicator == network.communicator && transfer->context == network.context &&
        cta.order->knows(fiber.thread, static_cast<uint16_t>(transfer->thread), transfer->issued))
      transfer->flushed = true;
  for (Message& message : run.messages)
    message.left |= message.communicator == network.communicator && message.context == network.context &&
                    message.kind != Message::Kind::get;
}

}  // namespace epv2

// For runtime.py.
extern "C" void epv2_emulator_window(uint64_t window, uint8_t* const* parts, uint64_t bytes, int ranks, int rank,
                                     int lsa_size, int ordered) {
  epv2::emulator::windows[window] = {{parts, parts + ranks}, bytes, rank, lsa_size, ordered != 0};
}

extern "C" void epv2_emulator_network(uint64_t communicator, uint8_t* const* signals, int num_contexts,
                                      int num_signals, int is_rail, int ranks, int rank, int lsa_size) {
  const auto bytes = 8 * static_cast<uint64_t>(num_contexts) * static_cast<uint64_t>(num_signals);
  epv2::emulator::communicators[communicator] = {
      {{signals, signals + ranks}, bytes, rank, lsa_size}, num_contexts, num_signals, is_rail != 0};
}

// Of a window or a network.
extern "C" void epv2_emulator_forget(uint64_t handle) {
  epv2::emulator::windows.erase(handle);
  epv2::emulator::communicators.erase(handle);
}

// Of a word that processes share.
extern "C" uint64_t epv2_emulator_exchange(uint64_t address, uint64_t expected, uint64_t value) {
  __atomic_compare_exchange_n(reinterpret_cast<uint64_t*>(address), &expected, value, false, __ATOMIC_SEQ_CST,
                              __ATOMIC_SEQ_CST);
  return expected;
}

extern "C" void epv2_emulator_carry_on(epv2::emulator::CarryOn carry_on) { epv2::emulator::carry_on = carry_on; }

extern "C" void epv2_emulator_limit_seconds(double seconds) { epv2::emulator::limit_seconds = seconds; }

// What -fsanitize=thread makes kernels call; libtsan itself is not linked.
#define EPV2_ACCESS(bytes)                                                                                             \
  extern "C" void __tsan_read##bytes(void* address) {                                                                  \
    epv2::emulator::ordinary_access(address, bytes, false, __builtin_return_address(0));                               \
  }                                                                                                                    \
  extern "C" void __tsan_write##bytes(void* address) {                                                                 \
    epv2::emulator::ordinary_access(address, bytes, true, __builtin_return_address(0));                                \
  }                                                                                                                    \
  extern "C" void __tsan_unaligned_read##bytes(void* address) {                                                        \
    epv2::emulator::ordinary_access(address, bytes, false, __builtin_return_address(0));                               \
  }                                                                                                                    \
  extern "C" void __tsan_unaligned_write##bytes(void* address) {                                                       \
    epv2::emulator::ordinary_access(address, bytes, true, __builtin_return_address(0));                                \
  }
EPV2_ACCESS(1)
EPV2_ACCESS(2)
EPV2_ACCESS(4)
EPV2_ACCESS(8)
EPV2_ACCESS(16)
extern "C" void __tsan_read_range(void* address, uint64_t bytes) {
  epv2::emulator::ordinary_access(address, bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, uint64_t bytes) {
  epv2::emulator::ordinary_access(address, bytes, true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}

// Of -fsanitize=alignment and shift-exponent: a GPU faults, or shifts to 0, where this CPU does neither.
struct UndefinedBehaviour {
  const char* file;
  uint32_t line, column;
  const void* type;
  uint8_t log2_alignment;
};
extern "C" void __ubsan_handle_type_mismatch_v1(UndefinedBehaviour* data, const void* address) {
  using namespace epv2::emulator;
  run.current->place = __builtin_return_address(0);
  fail("%p is used as an address of something that is aligned to %d bytes", address, 1 << data->log2_alignment);
}
extern "C" void __ubsan_handle_shift_out_of_bounds(UndefinedBehaviour*, uint64_t, uint64_t bits) {
  using namespace epv2::emulator;
  run.current->place = __builtin_return_address(0);
  fail("shift by %lld bits", static_cast<long long>(bits));
}
