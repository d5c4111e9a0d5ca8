// What ranks share: each has an inbox in anonymous shared memory, with a ring of operations for every rank.
//
// A ring has one producer, the rank that starts the operations, and one consumer, the owner of the inbox, which carries
// them out. Operations may be completed in any order; a place is used again when the operation in it is complete.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace epv2::rma {

constexpr uint64_t kSlots = 1024;
constexpr size_t kInlineBytes = 16;
constexpr size_t kPage = 4096;
constexpr uint32_t kNoRegion = ~uint32_t{0};
constexpr uint64_t kInboxMagic = 0x3158424e49325645;

struct Operation {
  uint32_t context;      // order is promised within one
  uint32_t source_rank;  // whose memory the bytes come from; they go to the memory of the inbox's owner
  uint32_t source_region, target_region, signal_region;
  uint32_t is_inline;    // the bytes are in `bytes`
  uint32_t is_get;
  uint32_t is_strong;    // the signal tells of every earlier put of its context, not only of its own
  uint64_t source_offset, target_offset, size;
  uint64_t signal_offset, signal_value;
  unsigned char bytes[kInlineBytes];
};

struct alignas(128) Slot {
  std::atomic<uint64_t> posted;  // number of the operation + 1, once `operation` holds it
  std::atomic<uint64_t> done;    // the same, once it is complete; a stream of the owner may write it
  Operation operation;
};

struct Ring {
  std::atomic<uint32_t> refused;  // an operation was refused: `reason` says why, and no further one is carried out
  char reason[508];
  Slot slots[kSlots];
};

struct Inbox {
  uint64_t magic;
  std::atomic<uint32_t> bell;    // counts operations posted; the owner sleeps on it
  std::atomic<uint32_t> asleep;
  std::atomic<uint32_t> closed;  // the owner has left in good order
  char rest[kPage - 20];

  Ring& ring(int source) { return reinterpret_cast<Ring*>(this + 1)[source]; }
  // Whole pages, as they are locked in memory.
  static size_t bytes(int ranks) {
    const size_t needed = sizeof(Inbox) + static_cast<size_t>(ranks) * sizeof(Ring);
    return (needed + kPage - 1) / kPage * kPage;
  }
};

// Processes built by different compilers read this.
static_assert(sizeof(Operation) == 88);
static_assert(sizeof(Slot) == 128);
static_assert(offsetof(Slot, done) == 8);
static_assert(sizeof(Ring) == 512 + kSlots * 128);
static_assert(sizeof(Inbox) == kPage);
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

}  // namespace epv2::rma
