#include "communicator.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <set>
#include <thread>

#include "../runtime/error.h"

namespace epv2::rma {
namespace {

// A request is the rank that carries it out, above its number there; never 0, which NCCL reads as "done".
constexpr int kRankShift = 48;

Descriptor new_inbox(size_t bytes) {
  Descriptor file(memfd_create("epv2 inbox", MFD_CLOEXEC));
  if (!file.open() || ftruncate(file.get(), static_cast<off_t>(bytes)) != 0)
    throw Error("memfd_create of " + std::to_string(bytes) + " bytes: " + std::strerror(errno));
  return file;
}

// Inboxes of open communicators. A process that ends in order without closing them has left, not died: its peers may
// still have work of their own to end.
struct OpenInboxes {
  std::mutex mutex;
  std::set<Inbox*> all;
};

OpenInboxes& open_inboxes() {
  // Never destroyed: NCCL may close a communicator later.
  static OpenInboxes* const made = [] {
    std::atexit([] {
      std::lock_guard<std::mutex> lock(open_inboxes().mutex);
      for (Inbox* inbox : open_inboxes().all) inbox->closed = 1;
    });
    return new OpenInboxes;
  }();
  return *made;
}

}  // namespace

Communicator::Communicator(std::unique_ptr<Meeting> meeting, const std::vector<Handle>& handles, int rank,
                           std::optional<uint64_t> chaos)
    : meeting_(std::move(meeting)), rank_(rank) {
  meeting_->join(handles, rank);
  const int ranks = static_cast<int>(handles.size());
  for (int i = 0; i < ranks; i++) peers_.push_back(std::make_unique<Peer>());
  const size_t bytes = Inbox::bytes(ranks);
  CUdeviceptr device_inbox = 0;
  Note note;
  Descriptor mine;
  const auto map = [&](int peer, const Descriptor& file) {
    peers_[peer]->memory = SharedMemory(file, bytes);
    if (peers_[peer]->memory.data() == nullptr)
      throw Error("mmap of " + std::to_string(bytes) + " bytes: " + std::strerror(errno));
    peers_[peer]->inbox = static_cast<Inbox*>(peers_[peer]->memory.data());
  };
  try {
    const Driver& cuda = driver();
    cuda.check(cuda.cuCtxGetCurrent(&context_), "cuCtxGetCurrent");
    if (context_ == nullptr) throw Error("no CUDA context on the thread that connects");
    own_ = OwnContext::get();
    const WithContext current(own_->context);
    mine = new_inbox(bytes);
    map(rank, mine);
    Inbox* inbox = peers_[rank]->inbox;
    inbox->magic = kInboxMagic;
    cuda.check(cuda.cuMemHostRegister(inbox, bytes, CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP),
               "cuMemHostRegister", std::to_string(bytes) + " bytes of shared memory");
    pinned_ = true;
    cuda.check(cuda.cuMemHostGetDevicePointer(&device_inbox, inbox, 0), "cuMemHostGetDevicePointer");
    engine_ = std::make_unique<Engine>(own_->context, *inbox, device_inbox, ranks, rank, regions_, chaos,
                                       [this] { watch(); });
  } catch (const Error& error) {
    note.failed = 1;
    note.say(error.what());
  }
  try {
    const std::vector<Letter> letters = meeting_->exchange(note, mine.get());
    Note mapped;
    try {
      for (int peer = 0; peer < ranks; peer++) {
        if (peer == rank) continue;
        map(peer, letters[peer].descriptor);
        if (peers_[peer]->inbox->magic != kInboxMagic)
          throw Error(meeting_->name(peer) + " uses another version of this plugin");
      }
    } catch (const Error& error) {
      mapped.failed = 1;
      mapped.say(error.what());
    }
    meeting_->exchange(mapped);
    std::lock_guard<std::mutex> lock(open_inboxes().mutex);
    open_inboxes().all.insert(peers_[rank]->inbox);
    met_ = true;
  } catch (...) {
    if (!own_) throw;
    const WithContext current(own_->context);
    engine_.reset();
    if (pinned_) driver().cuMemHostUnregister(peers_[rank]->inbox);
    throw;
  }
}

Communicator::~Communicator() {
  const WithContext current(own_->context);
  engine_.reset();
  peers_[rank_]->inbox->closed = 1;
  {
    std::lock_guard<std::mutex> lock(open_inboxes().mutex);
    open_inboxes().all.erase(peers_[rank_]->inbox);
  }
  driver().cuMemHostUnregister(peers_[rank_]->inbox);
  regions_.clear();
}

uint32_t Communicator::add_region(void* data, size_t size, int type, uint64_t flags) {
  std::lock_guard<std::mutex> lock(registering_);
  const WithContext current(context_);
  const uint32_t id = next_region_++;
  auto region = std::make_unique<Region>(*meeting_, ranks(), rank_, id, data, size, type, flags, own_->context);
  Note note;
  note.failed = !region->problem.empty();
  note.say(region->problem);
  // Known here before the last rank is told that all have it: operations may come at once.
  regions_.add(std::move(region));
  try {
    meeting_->exchange(note);
  } catch (...) {
    remove_region(id);
    throw;
  }
  return id;
}

void Communicator::remove_region(uint32_t id) {
  const WithContext current(own_->context);
  engine_->when_idle([&] { regions_.remove(id); });
}

void Communicator::take_inline(Operation& operation) const {
  const Region* source = regions_.find(operation.source_region);
  if (source == nullptr) throw Error("the source is region " + std::to_string(operation.source_region) +
                                     ", which is not registered (any more)");
  if (!source->on_host) return;
  if (operation.size > kInlineBytes)
    throw Error("a put of " + std::to_string(operation.size) + " bytes from host memory: at most " +
                std::to_string(kInlineBytes) + " (put from a window in device memory)");
  if (operation.source_offset > source->size || operation.size > source->size - operation.source_offset)
    throw Error("a put from byte " + std::to_string(operation.source_offset) + " of host memory of " +
                std::to_string(source->size) + " bytes");
  std::memcpy(operation.bytes, source->data + operation.source_offset, operation.size);
  operation.is_inline = 1;
}

uint64_t Communicator::post(int executor, const Operation& operation) {
  Peer& peer = *peers_[executor];
  std::lock_guard<std::mutex> lock(peer.posting);
  const uint64_t number = peer.posted;
  Slot& slot = peer.inbox->ring(rank_).slots[number % kSlots];
  // The place is free once what was in it before is complete.
  const uint64_t before = number < kSlots ? 0 : number - kSlots + 1;
  while (slot.done.load(std::memory_order_acquire) != before) {
    check(executor);
    std::this_thread::yield();
  }
  slot.operation = operation;
  slot.posted.store(number + 1, std::memory_order_release);
  peer.posted++;
  ring_bell(*peer.inbox);
  return static_cast<uint64_t>(executor + 1) << kRankShift | number;
}

bool Communicator::test(uint64_t request) {
  const int executor = static_cast<int>(request >> kRankShift) - 1;
  const uint64_t number = request & ((uint64_t{1} << kRankShift) - 1);
  if (executor < 0 || executor >= ranks() || number >= peers_[executor]->posted)
    throw Error("request " + std::to_string(request) + " is none of this communicator's");
  const Slot& slot = peers_[executor]->inbox->ring(rank_).slots[number % kSlots];
  const auto is_done = [&] { return slot.done.load(std::memory_order_acquire) > number; };
  if (is_done()) return true;
  try {
    check(executor);
  } catch (const Error&) {
    if (is_done()) return true;  // it was the last one
    throw;
  }
  return false;
}

void Communicator::check(int executor) {
  const Peer& peer = *peers_[executor];
  Ring& ring = peer.inbox->ring(rank_);
  if (ring.refused.load(std::memory_order_acquire) != 0) throw Error(std::string(ring.reason));
  if (peer.inbox->closed != 0) throw Error(meeting_->name(executor) + " has closed the communicator");
  if (peer.dead) throw Error(meeting_->name(executor) + " has died");
}

bool Communicator::failed() const {
  for (const auto& peer : peers_)
    if (peer->dead) return true;
  return engine_->failed();
}

void Communicator::watch() {
  if (!met_) return;
  for (int rank = 0; rank < ranks(); rank++) {
    Peer& peer = *peers_[rank];
    if (rank == rank_ || peer.dead || meeting_->alive(rank)) continue;
    if (peer.inbox->closed != 0) continue;  // it left in good order
    peer.dead = true;
    report(kWarn, meeting_->name(rank) + " has died: operations on it fail from now on");
  }
}

}  // namespace epv2::rma
