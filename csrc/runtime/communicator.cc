#include "communicator.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "driver_api.h"
#include "error.h"

namespace epv2 {
namespace {

using Lock = std::lock_guard<std::recursive_mutex>;

std::string seconds_text(double seconds) {
  std::ostringstream text;
  text << seconds << " s";
  return text.str();
}

// Do `start`, a call on a stream, on one of its own: the legacy stream would wait for kernels that may be waiting for
// peers.
template <typename Start>
void do_apart(const char* call, const char* what, Start start) {
  const Driver& cuda = driver_api();
  CUstream stream = nullptr;
  cuda.check(cuda.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
  const CUresult started = start(stream);
  const CUresult done = started == CUDA_SUCCESS ? cuda.cuStreamSynchronize(stream) : started;
  cuda.cuStreamDestroy(stream);
  cuda.check(done, started == CUDA_SUCCESS ? "cuStreamSynchronize" : call, what);
}

}  // namespace

std::string unique_id() {
  ncclUniqueId id;
  nccl_api().check(nccl_api().ncclGetUniqueId(&id), "ncclGetUniqueId");
  return std::string(id.internal, sizeof(id.internal));
}

// ---- Communicator ----------------------------------------------------------------------------------------------------

std::shared_ptr<Communicator> Communicator::borrow(uintptr_t pointer, double timeout_seconds) {
  nccl_api();
  if (pointer == 0)
    throw Error(
        "the process group has no NCCL communicator yet: torch makes it at the group's first collective, or at once "
        "where the group is bound to a device. Pass device_id=torch.device(\"cuda\", LOCAL_RANK) to init_process_group, "
        "or call torch.distributed.barrier(group) on all its ranks first");
  return std::shared_ptr<Communicator>(new Communicator(reinterpret_cast<ncclComm_t>(pointer), false, timeout_seconds));
}

std::shared_ptr<Communicator> Communicator::create(const std::string& unique_id, int rank, int size,
                                                   bool cta_policy_zero, double timeout_seconds) {
  ncclUniqueId id;
  if (unique_id.size() != sizeof(id.internal))
    throw std::invalid_argument("unique_id has " + std::to_string(unique_id.size()) + " bytes: must be " +
                                std::to_string(sizeof(id.internal)));
  if (size < 1 || rank < 0 || rank >= size)
    throw std::invalid_argument("rank " + std::to_string(rank) + " of " + std::to_string(size) +
                                ": must be 0 or more and below the number of ranks");
  const Nccl& api = nccl_api();
  driver_api().require_context();
  std::memcpy(id.internal, unique_id.data(), sizeof(id.internal));
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;  // a peer that never comes must cost the timeout, not for ever
  if (cta_policy_zero) config.CTAPolicy = NCCL_CTA_POLICY_ZERO;
  ncclComm_t comm = nullptr;
  const ncclResult_t result = api.ncclCommInitRankConfig(&comm, size, id, rank, &config);
  std::shared_ptr<Communicator> made(new Communicator(comm, true, timeout_seconds));
  try {
    made->settle(result, "ncclCommInitRankConfig");
  } catch (const Error&) {
    made->abort();
    throw;
  }
  return made;
}

void Communicator::require_open() const {
  if (comm_ == nullptr) throw Error("the communicator is closed");
}

void Communicator::settle(ncclResult_t result, const char* call) {
  const Nccl& api = nccl_api();
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_seconds_);
  auto pause = std::chrono::microseconds(20);
  // On a communicator that does not block, ncclCommWindowRegister and ncclDevCommCreate (2.30.7) answer ncclSuccess
  // while a thread is still at work: only ncclCommGetAsyncError knows.
  if (result == ncclSuccess && comm_ != nullptr) result = ncclInProgress;
  while (result == ncclInProgress) {
    if (std::chrono::steady_clock::now() > deadline) {
      if (owned_) abort_locked();
      throw TimedOut(std::string(call) + ": not every rank came within " + seconds_text(timeout_seconds_) +
                     "; a rank has died, or makes other calls");
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, std::chrono::microseconds(5000));
    const ncclResult_t asked = api.ncclCommGetAsyncError(comm_, &result);
    if (asked != ncclSuccess) result = asked;
  }
  api.check(result, call, comm_);
}

Properties Communicator::properties() {
  Lock lock(mutex_);
  require_open();
  const Nccl& api = nccl_api();
  Properties found = {NCCL_COMM_PROPERTIES_INITIALIZER, {}};
  api.check(api.ncclCommQueryProperties(comm_, &found.nccl), "ncclCommQueryProperties", comm_);
  found.lsa = api.ncclTeamLsa(comm_);  // has no result: an empty team says that it failed
  if (found.lsa.nRanks < 1) throw Error(api.describe(ncclInternalError, "ncclTeamLsa", comm_));
  return found;
}

std::string Communicator::async_error() {
  Lock lock(mutex_);
  require_open();
  const Nccl& api = nccl_api();
  ncclResult_t state = ncclSuccess;
  api.check(api.ncclCommGetAsyncError(comm_, &state), "ncclCommGetAsyncError", comm_);
  if (state == ncclSuccess || state == ncclInProgress) return "";
  return api.describe(state, "an earlier call", comm_);
}

std::shared_ptr<Window> Communicator::allocate(size_t num_bytes) {
  Lock lock(mutex_);
  require_open();
  auto window = std::make_shared<Window>(shared_from_this(), num_bytes);
  window->allocate();
  resources_.push_back(window);
  return window;
}

std::shared_ptr<DeviceCommunicator> Communicator::device_communicator(const ncclDevCommRequirements_t& requirements) {
  Lock lock(mutex_);
  require_open();
  driver_api().require_context();
  const Nccl& api = nccl_api();
  auto made = std::make_shared<DeviceCommunicator>(shared_from_this());
  // Kept from here on, as NCCL may be writing to it after a timeout.
  resources_.push_back(made);
  try {
    settle(api.ncclDevCommCreate(comm_, &requirements, &made->device_), "ncclDevCommCreate");
  } catch (const TimedOut&) {
    throw;
  } catch (const Error&) {
    drop(made.get());
    throw;
  }
  made->open_ = true;
  try {
    made->copy_to_device();
  } catch (const Error&) {
    drop(made.get());
    made->release();
    throw;
  }
  return made;
}

void Communicator::drop(Resource* resource) {
  const auto is_it = [&](const std::shared_ptr<Resource>& each) { return each.get() == resource; };
  resources_.erase(std::remove_if(resources_.begin(), resources_.end(), is_it), resources_.end());
}

std::string Communicator::release_resources(void (Resource::*how)()) {
  std::string failure;
  const auto resources = std::move(resources_);
  resources_.clear();
  for (auto each = resources.rbegin(); each != resources.rend(); ++each) try {
      ((**each).*how)();
    } catch (const Error& error) {
      if (failure.empty()) failure = error.what();
    }
  return failure;
}

void Communicator::close() {
  Lock lock(mutex_);
  if (comm_ == nullptr) return;
  std::string failure = release_resources(&Resource::release);
  if (owned_) {
    const Nccl& api = nccl_api();
    try {
      settle(api.ncclCommFinalize(comm_), "ncclCommFinalize");
      const ncclComm_t comm = std::exchange(comm_, nullptr);
      api.check(api.ncclCommDestroy(comm), "ncclCommDestroy");
    } catch (const Error& error) {
      if (failure.empty()) failure = error.what();
      abort_locked();
    }
  }
  comm_ = nullptr;
  if (!failure.empty()) throw Error(failure);
}

void Communicator::abort() {
  Lock lock(mutex_);
  abort_locked();
}

void Communicator::abort_locked() {
  const ncclComm_t comm = comm_;
  if (comm == nullptr) return;
  if (owned_) {
    comm_ = nullptr;
    nccl_api().ncclCommAbort(comm);  // deregisters its windows, too; a failure here leaves nothing to be done
    release_resources(&Resource::forget);
  } else {
    release_resources(&Resource::release);
    comm_ = nullptr;
  }
}

void Communicator::forget() {
  Lock lock(mutex_);
  if (comm_ == nullptr) return;
  comm_ = nullptr;
  const std::string failure = release_resources(&Resource::forget);
  if (!failure.empty()) throw Error(failure);
}

// ---- Window ----------------------------------------------------------------------------------------------------------

void Window::allocate() {
  if (num_bytes_ == 0) throw std::invalid_argument("a window of 0 bytes: must have at least 1");
  driver_api().require_context();
  const Nccl& api = nccl_api();
  const ncclResult_t result = api.ncclMemAlloc(&memory_, num_bytes_);
  if (result != ncclSuccess)
    throw Error(api.describe(result, "ncclMemAlloc", nullptr) + "; a window of " + std::to_string(num_bytes_) +
                " bytes was asked for");
  try {
    do_apart("cuMemsetD8Async", "zeroing a window", [&](CUstream stream) {
      return driver_api().cuMemsetD8Async(reinterpret_cast<CUdeviceptr>(memory_), 0, num_bytes_, stream);
    });
  } catch (const Error&) {
    forget();
    throw;
  }
}

void Window::enroll(bool ordered) {
  Lock lock(communicator_->mutex_);
  if (memory_ == nullptr) throw Error("the window is closed");
  if (window_ != nullptr) return;
  communicator_->require_open();
  driver_api().require_context();
  const ncclComm_t comm = communicator_->comm_;
  try {
    communicator_->settle(
        nccl_api().ncclCommWindowRegister(comm, memory_, num_bytes_, &window_,
                                          NCCL_WIN_COLL_SYMMETRIC | (ordered ? NCCL_WIN_STRICT_ORDERING : 0)),
        "ncclCommWindowRegister");
  } catch (const TimedOut&) {
    throw;  // ours was aborted and the memory freed; a borrowed one may still be registering it
  } catch (const Error&) {
    close();
    throw;
  }
  if (window_ == nullptr) {
    close();
    throw Error(
        "ncclCommWindowRegister: made no window, as NCCL can't share memory between these ranks. It needs a driver for "
        "CUDA 12.5 or newer, memory by cuMem (unset NCCL_CUMEM_ENABLE=0) and GPUs of a node that reach each other; "
        "NCCL_DEBUG=INFO says which is missing");
  }
}

uintptr_t Window::handle() const {
  if (window_ == nullptr) throw Error(memory_ == nullptr ? "the window is closed" : "the window is not registered yet");
  return reinterpret_cast<uintptr_t>(window_);
}

uintptr_t Window::lsa_pointer(int peer, size_t offset) {
  Lock lock(communicator_->mutex_);
  handle();
  if (offset >= num_bytes_)
    throw std::invalid_argument("offset " + std::to_string(offset) + ": must be below the window's " +
                                std::to_string(num_bytes_) + " bytes");
  const int size = nccl_api().ncclTeamLsa(communicator_->comm_).nRanks;
  if (peer < 0 || peer >= size)
    throw std::invalid_argument("peer " + std::to_string(peer) + ": must be 0 or more and below the LSA size " +
                                std::to_string(size));
  void* pointer = nullptr;
  nccl_api().check(nccl_api().ncclGetLsaDevicePointer(window_, offset, peer, &pointer), "ncclGetLsaDevicePointer",
               communicator_->comm_);
  return reinterpret_cast<uintptr_t>(pointer);
}

void Window::close() {
  Lock lock(communicator_->mutex_);
  const auto self = shared_from_this();
  communicator_->drop(this);
  release();
}

void Window::release() {
  if (memory_ == nullptr) return;
  const Nccl& api = nccl_api();
  const ncclWindow_t window = std::exchange(window_, nullptr);
  ncclResult_t result = ncclSuccess;
  if (window != nullptr) result = api.ncclCommWindowDeregister(communicator_->comm_, window);
  // Freed even so: a deregistration that failed leaves the pages to NCCL's own references.
  forget();
  api.check(result, "ncclCommWindowDeregister", communicator_->comm_);
}

void Window::forget() {
  window_ = nullptr;
  void* memory = std::exchange(memory_, nullptr);
  if (memory != nullptr) nccl_api().check(nccl_api().ncclMemFree(memory), "ncclMemFree");
}

// ---- DeviceCommunicator ----------------------------------------------------------------------------------------------

std::string DeviceCommunicator::data() const {
  if (!open_) throw Error("the device communicator is closed");
  return std::string(reinterpret_cast<const char*>(&device_), sizeof(device_));
}

void DeviceCommunicator::copy_to_device() {
  const Driver& cuda = driver_api();
  cuda.check(cuda.cuMemAlloc(&copy_, sizeof(device_)), "cuMemAlloc", "a device communicator");
  do_apart("cuMemcpyHtoDAsync", "a device communicator",
           [&](CUstream stream) { return cuda.cuMemcpyHtoDAsync(copy_, &device_, sizeof(device_), stream); });
}

void DeviceCommunicator::close() {
  Lock lock(communicator_->mutex_);
  release();
}

void DeviceCommunicator::release() {
  if (!open_) return;
  const Nccl& api = nccl_api();
  const ncclResult_t result = api.ncclDevCommDestroy(communicator_->comm_, &device_);
  forget();
  api.check(result, "ncclDevCommDestroy", communicator_->comm_);
}

void DeviceCommunicator::forget() {
  open_ = false;
  const CUdeviceptr copy = std::exchange(copy_, 0);
  if (copy != 0) driver_api().check(driver_api().cuMemFree(copy), "cuMemFree");
}

}  // namespace epv2
