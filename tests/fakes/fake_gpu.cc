// A stand-in for libcuda.so.1 whose device moves data: memory that processes can share by descriptor, streams that work
// in the background and in order, copies of a batch in any order. For tests/test_rma_loopback.py.
//
// It is strict: an address that is neither device memory nor mapped host memory, as the device sees it, is fatal.
#include <cuda.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <queue>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr CUdeviceptr kMapped = CUdeviceptr{1} << 56;  // host memory lies here, as the device sees it

struct Memory {  // a physical allocation
  const int file;
  const size_t size;
  const bool shareable;
  Memory(int file, size_t size, bool shareable) : file(file), size(size), shareable(shareable) {}
  Memory(const Memory&) = delete;
  ~Memory() { close(file); }
};
using MemoryPointer = std::shared_ptr<Memory>;

struct Range {
  size_t size;
  MemoryPointer memory;  // null: page-locked host memory
};

std::mutex mutex;
std::map<uintptr_t, Range> ranges;  // what the device may access, by host address
std::map<uintptr_t, size_t> reserved;
std::map<CUmemGenericAllocationHandle, MemoryPointer> handles;
CUmemGenericAllocationHandle next_handle = 1;
std::atomic<int> streams{0}, plain{0};
std::string failing;
int context, own_context;

CUresult answer(const char* name) {
  std::lock_guard<std::mutex> lock(mutex);
  return failing == name ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

std::map<uintptr_t, Range>::iterator range_of(uintptr_t at) {
  auto found = ranges.upper_bound(at);
  if (found == ranges.begin()) return ranges.end();
  --found;
  return at < found->first + found->second.size ? found : ranges.end();
}

char* reach(CUdeviceptr address, size_t size) {
  std::lock_guard<std::mutex> lock(mutex);
  const bool on_host = address >= kMapped;
  const uintptr_t at = on_host ? address - kMapped : address;
  const auto range = range_of(at);
  if (range == ranges.end() || at + size > range->first + range->second.size ||
      on_host != (range->second.memory == nullptr)) {
    std::fprintf(stderr, "fake GPU: no access to %zu bytes at %#llx\n", size, static_cast<unsigned long long>(address));
    std::abort();
  }
  return reinterpret_cast<char*>(at);
}

struct Stream {
  std::mutex mutex;
  std::condition_variable changed;
  std::queue<std::function<void()>> work;
  bool stop = false, busy = false;
  std::mt19937 random{std::random_device{}()};
  std::thread thread{[this] { main(); }};

  void main() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      changed.wait(lock, [&] { return stop || !work.empty(); });
      if (work.empty()) return;
      const auto next = std::move(work.front());
      work.pop();
      busy = true;
      lock.unlock();
      if (random() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 50));
      next();
      lock.lock();
      busy = false;
      changed.notify_all();
    }
  }
  void add(std::function<void()> what) {
    std::lock_guard<std::mutex> lock(mutex);
    work.push(std::move(what));
    changed.notify_all();
  }
  void drain() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return work.empty() && !busy; });
  }
};

Stream& stream_of(CUstream stream) { return *reinterpret_cast<Stream*>(stream); }

void copy_now(CUdeviceptr to, CUdeviceptr from, size_t size) { std::memcpy(reach(to, size), reach(from, size), size); }

}  // namespace

extern "C" {

// ---- for the tests --------------------------------------------------------------------------------------------------

// Device memory; `shareable` = as ncclMemAlloc makes it.
void* fake_alloc(size_t size, int shareable) {
  auto memory = std::make_shared<Memory>(memfd_create("fake device memory", MFD_CLOEXEC), size, shareable != 0);
  if (ftruncate(memory->file, static_cast<off_t>(size)) != 0) return nullptr;
  void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory->file, 0);
  std::lock_guard<std::mutex> lock(mutex);
  ranges[reinterpret_cast<uintptr_t>(at)] = {size, memory};
  return at;
}

void fake_free(void* at) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto range = ranges.find(reinterpret_cast<uintptr_t>(at));
  munmap(at, range->second.size);
  ranges.erase(range);
}

// From now on `name` fails; "" = nothing does.
void fake_fail(const char* name) {
  std::lock_guard<std::mutex> lock(mutex);
  failing = name;
}

// What has not been given back: ranges, reservations, handles, streams, host memory.
int fake_live() {
  std::lock_guard<std::mutex> lock(mutex);
  return static_cast<int>(ranges.size() + reserved.size() + handles.size()) + streams + plain;
}

// ---- the driver -----------------------------------------------------------------------------------------------------

CUresult cuGetErrorName(CUresult result, const char** name) {
  *name = result == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_NOT_SUPPORTED";
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** words) {
  *words = "in words";
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* current) {
  *current = std::getenv("FAKE_NO_CONTEXT") ? nullptr : reinterpret_cast<CUcontext>(&context);
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext*) { return CUDA_SUCCESS; }
CUresult cuCtxCreate_v2(CUcontext* made, unsigned, CUdevice) {
  if (const CUresult result = answer("cuCtxCreate")) return result;
  *made = reinterpret_cast<CUcontext>(&own_context);
  plain++;
  return CUDA_SUCCESS;
}
CUresult cuCtxDestroy(CUcontext) {
  plain--;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetStreamPriorityRange(int* lowest, int* highest) {
  *lowest = 0;
  *highest = -5;
  return CUDA_SUCCESS;
}
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode*) { return CUDA_SUCCESS; }

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
  if (flags != CU_STREAM_NON_BLOCKING || priority != -5) return CUDA_ERROR_NOT_SUPPORTED;
  if (const CUresult result = answer("cuStreamCreateWithPriority")) return result;
  *stream = reinterpret_cast<CUstream>(new Stream);
  streams++;
  return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream stream) {
  stream_of(stream).drain();
  return answer("cuStreamSynchronize");
}
CUresult cuStreamDestroy(CUstream stream) {
  {
    std::lock_guard<std::mutex> lock(stream_of(stream).mutex);
    stream_of(stream).stop = true;
    stream_of(stream).changed.notify_all();
  }
  stream_of(stream).thread.join();
  delete &stream_of(stream);
  streams--;
  return CUDA_SUCCESS;
}

CUresult cuStreamBatchMemOp(CUstream stream, unsigned count, CUstreamBatchMemOpParams* given, unsigned) {
  if (count > 256) return CUDA_ERROR_NOT_SUPPORTED;
  if (const CUresult result = answer("cuStreamBatchMemOp")) return result;
  const std::vector<CUstreamBatchMemOpParams> operations(given, given + count);
  stream_of(stream).add([operations] {
    for (const auto& each : operations)
      reinterpret_cast<std::atomic<uint64_t>*>(reach(each.writeValue.address, 8))
          ->store(each.writeValue.value64, std::memory_order_release);
  });
  return CUDA_SUCCESS;
}

CUresult cuMemcpyBatchAsync(CUdeviceptr* to, CUdeviceptr* from, size_t* sizes, size_t count, CUmemcpyAttributes* how,
                            size_t*, size_t, CUstream stream) {
  if (how->flags != CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE) return CUDA_ERROR_NOT_SUPPORTED;
  if (const CUresult result = answer("cuMemcpyBatchAsync")) return result;
  struct Copy {
    CUdeviceptr to, from;
    size_t size;
  };
  std::vector<Copy> copies;
  for (size_t i = 0; i < count; i++) copies.push_back({to[i], from[i], sizes[i]});
  Stream& on = stream_of(stream);
  on.add([copies, &on]() mutable {
    std::shuffle(copies.begin(), copies.end(), on.random);
    for (const Copy& each : copies) copy_now(each.to, each.from, each.size);
  });
  return CUDA_SUCCESS;
}
CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  stream_of(stream).add([=] { copy_now(to, from, size); });
  return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, size_t size) {
  std::memcpy(to, reach(from, size), size);
  return CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr* at, size_t size) {
  if (const CUresult result = answer("cuMemAlloc")) return result;
  *at = reinterpret_cast<CUdeviceptr>(fake_alloc(size, 0));
  return CUDA_SUCCESS;
}
CUresult cuMemFree(CUdeviceptr at) {
  fake_free(reinterpret_cast<void*>(at));
  return CUDA_SUCCESS;
}

CUresult cuMemHostRegister(void* at, size_t size, unsigned) {
  if (const CUresult result = answer("cuMemHostRegister")) return result;
  std::lock_guard<std::mutex> lock(mutex);
  ranges[reinterpret_cast<uintptr_t>(at)] = {size, nullptr};
  return CUDA_SUCCESS;
}
CUresult cuMemHostUnregister(void* at) {
  std::lock_guard<std::mutex> lock(mutex);
  ranges.erase(reinterpret_cast<uintptr_t>(at));
  return CUDA_SUCCESS;
}
CUresult cuMemHostAlloc(void** at, size_t size, unsigned flags) {
  *at = std::calloc(1, size);
  plain++;
  return cuMemHostRegister(*at, size, flags);
}
CUresult cuMemFreeHost(void* at) {
  cuMemHostUnregister(at);
  std::free(at);
  plain--;
  return CUDA_SUCCESS;
}
CUresult cuMemHostGetDevicePointer(CUdeviceptr* device, void* host, unsigned) {
  *device = reinterpret_cast<CUdeviceptr>(host) + kMapped;
  return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange(CUdeviceptr* base, size_t* size, CUdeviceptr at) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto range = range_of(at);
  if (range == ranges.end()) return CUDA_ERROR_NOT_SUPPORTED;
  *base = range->first;
  *size = range->second.size;
  return CUDA_SUCCESS;
}
CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* at) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto range = range_of(reinterpret_cast<uintptr_t>(at));
  if (range == ranges.end() || range->second.memory == nullptr) return CUDA_ERROR_NOT_SUPPORTED;
  handles[*handle = next_handle++] = range->second.memory;
  return CUDA_SUCCESS;
}
CUresult cuMemExportToShareableHandle(void* file, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType,
                                      unsigned long long) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!handles[handle]->shareable) return CUDA_ERROR_NOT_SUPPORTED;
  *static_cast<int*>(file) = dup(handles[handle]->file);
  return CUDA_SUCCESS;
}
CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle, void* file, CUmemAllocationHandleType) {
  if (const CUresult result = answer("cuMemImportFromShareableHandle")) return result;
  const int mine = dup(static_cast<int>(reinterpret_cast<uintptr_t>(file)));
  std::lock_guard<std::mutex> lock(mutex);
  handles[*handle = next_handle++] = std::make_shared<Memory>(mine, static_cast<size_t>(lseek(mine, 0, SEEK_END)), true);
  return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  std::lock_guard<std::mutex> lock(mutex);
  return handles.erase(handle) == 1 ? CUDA_SUCCESS : CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuMemAddressReserve(CUdeviceptr* at, size_t size, size_t, CUdeviceptr, unsigned long long) {
  void* found = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  *at = reinterpret_cast<CUdeviceptr>(found);
  std::lock_guard<std::mutex> lock(mutex);
  reserved[*at] = size;
  return CUDA_SUCCESS;
}
CUresult cuMemAddressFree(CUdeviceptr at, size_t size) {
  munmap(reinterpret_cast<void*>(at), size);
  std::lock_guard<std::mutex> lock(mutex);
  return reserved.erase(at) == 1 ? CUDA_SUCCESS : CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuMemMap(CUdeviceptr at, size_t size, size_t, CUmemGenericAllocationHandle handle, unsigned long long) {
  if (const CUresult result = answer("cuMemMap")) return result;
  std::lock_guard<std::mutex> lock(mutex);
  const MemoryPointer memory = handles[handle];
  if (size > memory->size) return CUDA_ERROR_NOT_SUPPORTED;
  mmap(reinterpret_cast<void*>(at), size, PROT_NONE, MAP_SHARED | MAP_FIXED, memory->file, 0);
  ranges[at] = {size, memory};
  return CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr at, size_t size) {
  mmap(reinterpret_cast<void*>(at), size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  std::lock_guard<std::mutex> lock(mutex);
  return ranges.erase(at) == 1 ? CUDA_SUCCESS : CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuMemSetAccess(CUdeviceptr at, size_t size, const CUmemAccessDesc*, size_t) {
  if (const CUresult result = answer("cuMemSetAccess")) return result;
  return mprotect(reinterpret_cast<void*>(at), size, PROT_READ | PROT_WRITE) == 0 ? CUDA_SUCCESS
                                                                                    : CUDA_ERROR_NOT_SUPPORTED;
}

}  // extern "C"
