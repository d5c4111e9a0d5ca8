// An NCCL communicator and what is made of it: symmetric windows and device communicators.
//
// Nothing here is released by a destructor: NCCL wants some of its calls in step on all ranks, and a borrowed
// communicator may be gone by then. What is not closed lives until the process ends.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "nccl_api.h"

namespace epv2 {

class Window;
class DeviceCommunicator;

// What a communicator closes before itself. Called with the communicator's lock held.
class Resource {
 public:
  virtual ~Resource() = default;
  // Give everything back; nothing if done. Throws the first failure after having tried all steps.
  virtual void release() = 0;
  // The communicator does not exist any more: give back what needs no call on it.
  virtual void forget() = 0;
};

struct Properties {
  ncclCommProperties_t nccl;
  ncclTeam_t lsa;
};

class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  static std::shared_ptr<Communicator> borrow(uintptr_t pointer, double timeout_seconds);
  static std::shared_ptr<Communicator> create(const std::string& unique_id, int rank, int size, bool cta_policy_zero,
                                              double timeout_seconds);

  uintptr_t pointer() const { return reinterpret_cast<uintptr_t>(comm_); }
  bool owned() const { return owned_; }
  Properties properties();
  std::string async_error();

  // Memory for a window, zeroed; Window::enroll makes it one.
  std::shared_ptr<Window> allocate(size_t num_bytes);
  std::shared_ptr<DeviceCommunicator> device_communicator(const ncclDevCommRequirements_t& requirements);

  void close();
  void abort();
  void forget();

 private:
  friend class Window;
  friend class DeviceCommunicator;

  Communicator(ncclComm_t comm, bool owned, double timeout_seconds)
      : comm_(comm), owned_(owned), timeout_seconds_(timeout_seconds) {}

  // Throw Error if closed.
  void require_open() const;
  // Take the result of a call that may go on in the background; returns when it is done. Throws TimedOut, after having
  // aborted the communicator where it is ours: then nothing of the call is running any more.
  void settle(ncclResult_t result, const char* call);
  void drop(Resource* resource);
  // Release all resources, newest first; returns the first failure's text.
  std::string release_resources(void (Resource::*how)());
  void abort_locked();

  std::recursive_mutex mutex_;
  ncclComm_t comm_;
  bool owned_;
  double timeout_seconds_;
  std::vector<std::shared_ptr<Resource>> resources_;
};

class Window : public Resource, public std::enable_shared_from_this<Window> {
 public:
  Window(std::shared_ptr<Communicator> communicator, size_t num_bytes)
      : communicator_(std::move(communicator)), num_bytes_(num_bytes) {}

  // Register the memory (collective). `ordered`: a signal to a word of it comes behind the data of earlier puts, which no
  // network promises otherwise.
  void enroll(bool ordered);
  void close();

  uintptr_t pointer() const { return reinterpret_cast<uintptr_t>(memory_); }
  uintptr_t handle() const;
  size_t num_bytes() const { return num_bytes_; }
  uintptr_t lsa_pointer(int peer, size_t offset);

  void release() override;
  void forget() override;

 private:
  friend class Communicator;

  void allocate();

  std::shared_ptr<Communicator> communicator_;
  size_t num_bytes_;
  void* memory_ = nullptr;
  ncclWindow_t window_ = nullptr;
};

class DeviceCommunicator : public Resource {
 public:
  explicit DeviceCommunicator(std::shared_ptr<Communicator> communicator) : communicator_(std::move(communicator)) {}

  // The ncclDevComm, as kernels take it by value.
  std::string data() const;
  // Address of the same in device memory; 0 once closed.
  uintptr_t pointer() const { return static_cast<uintptr_t>(copy_); }
  // May be other than was asked for.
  uint32_t gin_contexts() const { return device_.ginContextCount; }
  void close();

  void release() override;
  void forget() override;

 private:
  friend class Communicator;

  std::shared_ptr<Communicator> communicator_;
  void copy_to_device();

  ncclDevComm_t device_ = {};
  CUdeviceptr copy_ = 0;
  bool open_ = false;
};

std::string unique_id();

}  // namespace epv2
