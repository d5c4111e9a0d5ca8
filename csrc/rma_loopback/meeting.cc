#include "meeting.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "../runtime/error.h"

namespace epv2::rma {
namespace {

constexpr uint64_t kMagic = 0x314b42504f4f4c45;
constexpr auto kPatience = std::chrono::seconds(120);
constexpr int kPollMillis = 20;

// When a process started, in the kernel's ticks; 0 = there is none, or it has ended and nobody has asked how.
uint64_t born(int process) {
  char path[32], text[1024];
  std::snprintf(path, sizeof(path), "/proc/%d/stat", process);
  std::FILE* file = std::fopen(path, "re");
  if (file == nullptr) return 0;
  const size_t length = std::fread(text, 1, sizeof(text) - 1, file);
  std::fclose(file);
  text[length] = '\0';
  // The name, in brackets, may hold anything: count from behind it. State is field 3, the start field 22.
  const char* field = std::strrchr(text, ')');
  if (field == nullptr || field[1] == '\0' || field[2] == 'Z' || field[2] == 'X') return 0;
  for (int number = 2; number < 22 && field != nullptr; number++) field = std::strchr(field + 1, ' ');
  return field == nullptr ? 0 : std::strtoull(field, nullptr, 10);
}

std::string reason(const char* call) { return std::string(call) + ": " + std::strerror(errno); }

sockaddr_un address(const char* name, socklen_t* length) {
  sockaddr_un at = {};
  at.sun_family = AF_UNIX;  // and a first character of 0: an abstract name
  std::strncpy(at.sun_path + 1, name, sizeof(at.sun_path) - 2);
  *length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + std::strlen(name));
  return at;
}

}  // namespace

struct Meeting::Envelope {
  uint64_t magic, round;
  int32_t rank, unused;
  Note note;
};

void Note::say(const std::string& what) {
  std::strncpy(text, what.c_str(), sizeof(text) - 1);
  text[sizeof(text) - 1] = '\0';
}

Meeting::Meeting() : socket_(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) {
  static std::atomic<unsigned> count{0};
  if (!socket_.open()) throw Error(reason("socket"));
  self_.magic = kMagic;
  self_.process = getpid();
  self_.born = born(self_.process);
  if (self_.born == 0) throw Error("/proc/" + std::to_string(self_.process) + "/stat can't be read");
  std::snprintf(self_.name, sizeof(self_.name), "epv2-rma.%d.%llx.%u", self_.process,
                static_cast<unsigned long long>(self_.born), count++);
  socklen_t length = 0;
  const sockaddr_un at = address(self_.name, &length);
  const int yes = 1;  // the kernel then tells who sent a note
  if (setsockopt(socket_.get(), SOL_SOCKET, SO_PASSCRED, &yes, sizeof(yes)) != 0) throw Error(reason("SO_PASSCRED"));
  if (bind(socket_.get(), reinterpret_cast<const sockaddr*>(&at), length) != 0)
    throw Error(reason("bind") + " (@" + self_.name + ")");
}

void Meeting::join(const std::vector<Handle>& handles, int rank) {
  for (size_t i = 0; i < handles.size(); i++)
    if (handles[i].magic != kMagic)
      throw Error("rank " + std::to_string(i) + " does not use this plugin: its handle is another's");
  ranks_ = handles;
  rank_ = rank;
  early_.resize(handles.size());
}

std::string Meeting::name(int rank) const {
  return "rank " + std::to_string(rank) + " (process " + std::to_string(ranks_[rank].process) + ")";
}

bool Meeting::alive(int rank) const { return born(ranks_[rank].process) == ranks_[rank].born; }

void Meeting::keep(std::vector<Letter>& letters, std::vector<bool>& here, int rank, Letter&& letter) const {
  if (letter.note.failed) throw Error(name(rank) + " can't take part: " + letter.note.text);
  letters[rank] = std::move(letter);
  here[rank] = true;
}

std::vector<Letter> Meeting::exchange(const Note& note, int descriptor) {
  const int ranks = static_cast<int>(ranks_.size());
  Envelope mine = {kMagic, ++round_, rank_, 0, note};
  mine.note.has_descriptor = descriptor >= 0;
  std::vector<Letter> letters(ranks);
  std::vector<bool> sent(ranks), here(ranks), gone(ranks);
  letters[rank_].note = note;
  sent[rank_] = here[rank_] = true;
  for (int rank = 0; rank < ranks; rank++)
    if (early_[rank]) keep(letters, here, rank, std::move(*std::exchange(early_[rank], nullptr)));
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  const auto all = [](const std::vector<bool>& which) {
    return std::find(which.begin(), which.end(), false) == which.end();
  };
  while (true) {
    bool moved = false;
    for (int i = 1; i < ranks; i++) {
      const int rank = (rank_ + i) % ranks;
      if (sent[rank]) continue;
      const Sent how = send(rank, mine, descriptor);
      if (how == Sent::kYes) sent[rank] = moved = true;
      gone[rank] = how == Sent::kNobodyThere;
    }
    while (receive(letters, here)) moved = true;
    // A rank that failed has said so, and leaves with an error of its own once the others have been told.
    if (note.failed && all(sent)) throw Error(note.text);
    if (all(sent) && all(here)) return letters;
    if (moved) continue;
    const bool late = std::chrono::steady_clock::now() > deadline;
    for (int rank = 0; rank < ranks; rank++) {
      if (sent[rank] && here[rank]) continue;
      const bool dead = !alive(rank);
      if (dead || gone[rank]) {
        // Its last words may have come between looking for them and looking for it.
        while (receive(letters, here)) {}
        if (!sent[rank] || !here[rank]) throw Error(name(rank) + (dead ? " has died" : " has left the communicator"));
      } else if (late) {
        throw Error(name(rank) + " did not come within " + std::to_string(kPatience.count()) + " s");
      }
    }
    pollfd waiting = {socket_.get(), POLLIN, 0};
    poll(&waiting, 1, all(sent) ? kPollMillis : 1);
  }
}

Meeting::Sent Meeting::send(int rank, Envelope& envelope, int descriptor) {
  iovec data = {&envelope, sizeof(envelope)};
  msghdr message = {};
  sockaddr_un to = address(ranks_[rank].name, &message.msg_namelen);
  message.msg_name = &to;
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (descriptor >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &descriptor, sizeof(int));
  }
  const ssize_t size = sendmsg(socket_.get(), &message, MSG_NOSIGNAL);
  if (size == static_cast<ssize_t>(sizeof(envelope))) return Sent::kYes;
  if (errno == EAGAIN || errno == EINTR || errno == ENOBUFS) return Sent::kNotYet;  // the other's queue is full
  if (errno == ECONNREFUSED || errno == ENOENT) return Sent::kNobodyThere;
  throw Error(reason("sendmsg") + " (to " + name(rank) + ")");
}

// Take one note; false: there is none.
bool Meeting::receive(std::vector<Letter>& letters, std::vector<bool>& here) {
  Envelope envelope = {};
  iovec data = {&envelope, sizeof(envelope)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int)) + CMSG_SPACE(sizeof(ucred))];
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  const ssize_t size = recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
  if (size < 0) {
    if (errno == EAGAIN || errno == EINTR) return false;
    throw Error(reason("recvmsg"));
  }
  Letter letter;
  ucred sender = {};
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET) continue;
    if (header->cmsg_type == SCM_CREDENTIALS) std::memcpy(&sender, CMSG_DATA(header), sizeof(sender));
    int number = -1;
    if (header->cmsg_type == SCM_RIGHTS) std::memcpy(&number, CMSG_DATA(header), sizeof(number));
    if (number >= 0) letter.descriptor = Descriptor(number);
  }
  const bool known = size == static_cast<ssize_t>(sizeof(envelope)) && envelope.magic == kMagic && envelope.rank >= 0 &&
                     envelope.rank < static_cast<int>(ranks_.size()) && envelope.rank != rank_;
  // Any process of this machine can write to an abstract socket: only what the kernel says a rank sent is taken.
  if (!known || sender.pid != ranks_[envelope.rank].process) return true;
  if (envelope.note.has_descriptor && !letter.descriptor.open())
    throw Error("no descriptor came with the note of " + name(envelope.rank) + ": too many open files (ulimit -n)?");
  letter.note = envelope.note;
  letter.note.text[sizeof(letter.note.text) - 1] = '\0';
  if (envelope.round == round_) {
    keep(letters, here, envelope.rank, std::move(letter));
  } else if (envelope.round == round_ + 1) {
    early_[envelope.rank] = std::make_unique<Letter>(std::move(letter));
  } else {
    throw Error(name(envelope.rank) + " is at exchange " + std::to_string(envelope.round) + ", this rank at " +
                std::to_string(round_) + ": the ranks make different calls");
  }
  return true;
}

}  // namespace epv2::rma
