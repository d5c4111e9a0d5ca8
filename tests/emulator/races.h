// Which accesses of a CTA's threads to memory are ordered: vector clocks, as race detectors have them. Ordinary
// accesses are of the generic proxy, bulk copies of the async proxy; what the generic proxy wrote needs fence_proxy_async.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <unordered_map>
#include <vector>

namespace epv2::emulator {

// What somebody knows. An agent is a thread, or the loads of one mbarrier, or the stores of one thread, or what one
// thread puts or gets in a context of the network; everything that an agent did up to its clock
// value `seen[agent]` has happened before, and up to `fenced[agent]` bulk copies see it.
struct Clock {
  std::vector<uint32_t> seen, fenced;

  void join(const Clock& other) {
    join(seen, other.seen);
    join(fenced, other.fenced);
  }
  static void join(std::vector<uint32_t>& mine, const std::vector<uint32_t>& other) {
    if (mine.size() < other.size()) mine.resize(other.size());
    for (size_t i = 0; i < other.size(); i++) mine[i] = std::max(mine[i], other[i]);
  }
  static void set(std::vector<uint32_t>& mine, size_t agent, uint32_t clock) {
    if (mine.size() <= agent) mine.resize(agent + 1);
    mine[agent] = std::max(mine[agent], clock);
  }
};
using Known = std::shared_ptr<const Clock>;  // threads that know the same share it

// What threads leave at an mbarrier or a flag for those that come by later.
struct Channel {
  Clock collected;
  Known last;       // already in `collected`
  Known published;  // what an acquire gets
  uint64_t value = 0;  // of a flag, when last acquired here
};

struct Access {
  uint32_t clock = 0;  // 0: none
  int32_t place = 0;   // of the instruction, relative to the kernel's code
  uint16_t agent = 0;
  uint8_t bytes = 0;  // bits of the word's four bytes
  bool atomic = false;
};

enum class Memory { shared, global };

struct Conflict {
  Access earlier;
  uint64_t address = 0;
  bool earlier_writes = false;
  bool unfenced = false;  // in order, but not visible to the bulk copy
};

class Order {
 public:
  Order(int threads, uint32_t shared_bytes)
      : threads_(static_cast<size_t>(threads)),
        agents_(threads_),
        states_(threads_),
        words_(zeroed(shared_bytes / 4 + 1)) {
    const auto nothing = std::make_shared<const Clock>();
    for (State& state : states_) state.known = nothing;
  }

  uint16_t new_agent() { return static_cast<uint16_t>(agents_++); }
  bool is_thread(uint16_t agent) const { return agent < threads_; }
  uint32_t now(int thread) const { return states_[thread].own; }
  bool knows(int thread, uint16_t agent, uint32_t clock) const {
    if (agent == thread) return true;
    const auto& seen = states_[thread].known->seen;
    return agent < seen.size() && seen[agent] >= clock;
  }

  // Each of these returns whether it met an access that it is not in order with, described in `conflict`.
  bool access(int thread, Memory memory, uint64_t address, uint64_t bytes, bool writes, bool atomic, int32_t place,
              Conflict& conflict) {
    return each_word(memory, address, bytes, [&](Word& word, uint8_t mask, uint64_t at) {
      if (find(word.writes, thread, mask, atomic, conflict)) return found(at, true, conflict);
      if (writes && find(word.reads, thread, mask, atomic, conflict)) return found(at, false, conflict);
      const Access access{states_[thread].own, place, static_cast<uint16_t>(thread), mask, atomic};
      if (writes)
        overwrite(word, access);
      else
        remember_read(word, access, thread);
      return false;
    });
  }
  // The side in shared memory of a bulk copy that `thread` starts; `agent` will have done it at `clock`.
  bool copy(int thread, uint32_t offset, uint32_t bytes, bool writes, uint16_t agent, uint32_t clock, int32_t place,
            Conflict& conflict) {
    return each_word(Memory::shared, offset, bytes, [&](Word& word, uint8_t mask, uint64_t at) {
      if (find(word.writes, thread, mask, false, conflict)) return found(at, true, conflict);
      if (writes && find(word.reads, thread, mask, false, conflict)) return found(at, false, conflict);
      for (const Access& earlier : word.writes)
        if (earlier.clock != 0 && (earlier.bytes & mask) != 0 && is_thread(earlier.agent) && !fenced(thread, earlier)) {
          conflict.earlier = earlier;
          conflict.unfenced = true;
          return found(at, true, conflict);
        }
      const Access access{clock, place, agent, mask, false};
      if (writes)
        overwrite(word, access);
      else
        remember_read(word, access, thread);
      return false;
    });
  }

  // The network's reading of what `thread` puts, or writing of what it gets; `agent` will have done it at `clock`. It sees
  // what the thread sees.
  bool transfer(int thread, uint64_t address, uint64_t bytes, bool writes, uint16_t agent, uint32_t clock,
                int32_t place, Conflict& conflict) {
    return each_word(Memory::global, address, bytes, [&](Word& word, uint8_t mask, uint64_t at) {
      if (find(word.writes, thread, mask, false, conflict)) return found(at, true, conflict);
      if (writes && find(word.reads, thread, mask, false, conflict)) return found(at, false, conflict);
      const Access access{clock, place, agent, mask, false};
      if (writes)
        overwrite(word, access);
      else
        remember_read(word, access, thread);
      return false;
    });
  }

  // All of them know from now on what any of them knew: a barrier.
  void meet(const std::vector<int>& threads) {
    std::vector<const Clock*> different;
    for (const int thread : threads) different.push_back(states_[thread].known.get());
    std::sort(different.begin(), different.end());
    different.erase(std::unique(different.begin(), different.end()), different.end());
    auto all = std::make_shared<Clock>(*different[0]);
    all->seen.resize(agents_);
    all->fenced.resize(agents_);
    for (size_t i = 1; i < different.size(); i++) all->join(*different[i]);
    for (const int thread : threads) add_own(*all, thread);
    for (const int thread : threads) {
      states_[thread].known = all;
      states_[thread].own++;
    }
  }
  void fence_proxy(int thread) {
    State& state = states_[thread];
    state.own_fenced = state.own++;
    if (fence_before_ != state.known) {
      auto after = std::make_shared<Clock>(*state.known);
      Clock::join(after->fenced, after->seen);
      fence_before_ = state.known;
      fence_after_ = after;
    }
    state.known = fence_after_;
  }
  void release(int thread, Channel& channel) {
    State& state = states_[thread];
    if (channel.last != state.known) channel.collected.join(*state.known);
    channel.last = state.known;
    add_own(channel.collected, thread);
    state.own++;
  }
  static void publish(Channel& channel) { channel.published = std::make_shared<const Clock>(channel.collected); }
  static void publish(Channel& channel, uint16_t agent, uint32_t clock) {
    Clock::set(channel.collected.seen, agent, clock);
    publish(channel);
  }
  void acquire(int thread, const Channel& channel) {
    State& state = states_[thread];
    if (channel.published == nullptr || channel.published == state.known) return;
    // Lanes that come one after the other mostly know the same.
    if (acquire_before_ != state.known || acquired_ != channel.published) {
      auto after = std::make_shared<Clock>(*state.known);
      after->join(*channel.published);
      acquire_before_ = state.known;
      acquired_ = channel.published;
      acquire_after_ = after;
    }
    state.known = acquire_after_;
  }
  void learn(int thread, uint16_t agent, uint32_t clock) {
    State& state = states_[thread];
    if (knows(thread, agent, clock)) return;
    auto after = std::make_shared<Clock>(*state.known);
    Clock::set(after->seen, agent, clock);
    state.known = after;
  }
  Channel& flag(const void* address) { return flags_[address]; }
  // `thread` has acquired something new from a peer: bulk loads see the data behind it only after a fence_proxy.
  void acquired_from_peer(int thread, int32_t place) {
    State& state = states_[thread];
    state.from_peer = {state.own, place, static_cast<uint16_t>(thread), 0, false};
  }
  // Whether `thread` knows of such data without a fence.
  bool reads_unfenced_peer(int thread, Access& acquire) const {
    for (const State& state : states_)
      if (state.from_peer.clock != 0 && knows(thread, state.from_peer.agent, state.from_peer.clock) &&
          !fenced(thread, state.from_peer)) {
        acquire = state.from_peer;
        return true;
      }
    return false;
  }

 private:
  struct State {
    Known known;
    uint32_t own = 1, own_fenced = 0;  // this thread's entries, newer than those in `known`
    Access from_peer;                  // the last acquire of a peer's flag that was news
  };
  struct Word {
    Access writes[4], reads[4];  // writes have different bytes; of many readers some are forgotten
  };
  using Words = std::unique_ptr<Word[], decltype(&std::free)>;

  bool fenced(int thread, const Access& write) const {
    const State& state = states_[thread];
    if (write.agent == thread) return state.own_fenced >= write.clock;
    return write.agent < state.known->fenced.size() && state.known->fenced[write.agent] >= write.clock;
  }
  void add_own(Clock& clock, int thread) const {
    Clock::set(clock.seen, static_cast<size_t>(thread), states_[thread].own);
    Clock::set(clock.fenced, static_cast<size_t>(thread), states_[thread].own_fenced);
  }
  bool find(const Access (&accesses)[4], int thread, uint8_t mask, bool atomic, Conflict& conflict) const {
    for (const Access& earlier : accesses)
      if (earlier.clock != 0 && (earlier.bytes & mask) != 0 && !(atomic && earlier.atomic) &&
          !knows(thread, earlier.agent, earlier.clock)) {
        conflict.earlier = earlier;
        return true;
      }
    return false;
  }
  static bool found(uint64_t address, bool earlier_writes, Conflict& conflict) {
    conflict.address = address;
    conflict.earlier_writes = earlier_writes;
    return true;
  }
  static void overwrite(Word& word, const Access& access) {
    for (auto* accesses : {word.writes, word.reads})
      for (int i = 0; i < 4; i++)
        if ((accesses[i].bytes &= static_cast<uint8_t>(~access.bytes)) == 0) accesses[i].clock = 0;
    for (Access& slot : word.writes)
      if (slot.clock == 0) {
        slot = access;
        return;
      }
  }
  void remember_read(Word& word, const Access& access, int thread) {
    Access* place = nullptr;
    for (Access& slot : word.reads) {
      const bool known = slot.agent == access.agent || knows(thread, slot.agent, slot.clock);
      if (slot.clock == 0) {
        place = &slot;
      } else if (known && (slot.bytes & ~access.bytes) == 0) {  // whoever races with it races with this, too
        place = &slot;
        break;
      }
    }
    if (place == nullptr) place = &word.reads[forget_++ % 4];
    *place = access;
  }
  template <typename Visit>
  bool each_word(Memory memory, uint64_t address, uint64_t bytes, Visit visit) {
    const uint64_t end = address + bytes;
    for (uint64_t at = address; at < end;) {
      const uint64_t word = at / 4, word_end = std::min(end, word * 4 + 4);
      const auto mask = static_cast<uint8_t>((0xf << at % 4) & (0xf >> (word * 4 + 4 - word_end)));
      if (visit(memory == Memory::shared ? words_[word] : global_word(word), mask, at)) return true;
      at = word_end;
    }
    return false;
  }

  Word& global_word(uint64_t word) {
    Words& block = blocks_.try_emplace(word / kBlock, nullptr, &std::free).first->second;
    if (block == nullptr) block = zeroed(kBlock);
    return block[word % kBlock];
  }
  static Words zeroed(size_t words) {
    Words memory(static_cast<Word*>(std::calloc(words, sizeof(Word))), &std::free);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
  }

  static constexpr uint64_t kBlock = 64;
  size_t threads_, agents_;
  std::vector<State> states_;
  Words words_;  // of shared memory; calloc: pages that nobody touches cost nothing
  std::unordered_map<uint64_t, Words> blocks_;  // of global memory
  std::unordered_map<const void*, Channel> flags_;
  Known fence_before_, fence_after_, acquire_before_, acquired_, acquire_after_;
  uint32_t forget_ = 0;
};

}  // namespace epv2::emulator
