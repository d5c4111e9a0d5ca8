// How the processes of a communicator find each other, exchange notes and descriptors, and notice that one has died.
//
// Addresses are abstract sockets and everything shared is a descriptor: nothing has a name in a file system, so that
// nothing is left over, whichever way a process ends.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "abi.h"
#include "descriptor.h"

namespace epv2::rma {

// One rank, as the others are told of it by NCCL.
struct Handle {
  uint64_t magic;
  uint64_t born;  // when the process started: its number alone may be another's by now
  int32_t process;
  char name[64];  // of its socket
};
static_assert(sizeof(Handle) <= kHandleBytes);

// What a rank says in one exchange.
struct Note {
  uint32_t failed = 0;
  uint32_t has_descriptor = 0;
  uint64_t id = 0, size = 0, offset = 0, mapped = 0;
  char text[208] = {};  // why it failed, or why there is no descriptor

  void say(const std::string& what);
};

struct Letter {
  Note note;
  Descriptor descriptor;
};

class Meeting {
 public:
  // Opens this rank's address.
  Meeting();
  const Handle& handle() const { return self_; }

  // From now on rank `rank` of the ranks with these handles.
  void join(const std::vector<Handle>& handles, int rank);
  // Collective: give `note` (and `descriptor`, unless negative) to every other rank; returns theirs, by rank. Throws
  // Error naming the rank that does not come, has died or says that it failed.
  std::vector<Letter> exchange(const Note& note, int descriptor = -1);

  // Whether rank `rank`'s process is there.
  bool alive(int rank) const;
  // "rank 3 (process 1234)".
  std::string name(int rank) const;

 private:
  struct Envelope;

  enum class Sent { kYes, kNotYet, kNobodyThere };

  Sent send(int rank, Envelope& envelope, int descriptor);
  bool receive(std::vector<Letter>& letters, std::vector<bool>& here);
  void keep(std::vector<Letter>& letters, std::vector<bool>& here, int rank, Letter&& letter) const;

  Descriptor socket_;
  Handle self_ = {};
  std::vector<Handle> ranks_;
  int rank_ = 0;
  uint64_t round_ = 0;
  // Ranks that have all notes of a round may be one round ahead.
  std::vector<std::unique_ptr<Letter>> early_;
};

}  // namespace epv2::rma
