// The driver's functions that move data and signals, looked up in libcuda.so.1.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace epv2::rma {

#define EPV2_RMA_DRIVER_FUNCTIONS(X)                                                                                \
  X(cuGetErrorName) X(cuGetErrorString) X(cuCtxGetCurrent) X(cuCtxSetCurrent) X(cuCtxPopCurrent) X(cuCtxGetDevice)  \
  X(cuCtxDestroy)                                                                                                   \
  X(cuCtxGetStreamPriorityRange) X(cuThreadExchangeStreamCaptureMode) X(cuStreamCreateWithPriority)                 \
  X(cuStreamSynchronize) X(cuStreamDestroy) X(cuStreamBatchMemOp) X(cuMemcpyAsync) X(cuMemcpyDtoH) X(cuMemAlloc)    \
  X(cuMemFree) X(cuMemHostAlloc) X(cuMemFreeHost) X(cuMemHostRegister) X(cuMemHostUnregister)                       \
  X(cuMemHostGetDevicePointer) X(cuMemGetAddressRange) X(cuMemRetainAllocationHandle)                               \
  X(cuMemExportToShareableHandle) X(cuMemImportFromShareableHandle) X(cuMemRelease) X(cuMemAddressReserve)          \
  X(cuMemAddressFree) X(cuMemMap) X(cuMemUnmap) X(cuMemSetAccess)

// CUmemcpyAttributes, which CUDA's headers have since 12.8.
struct CopyAttributes {
  int source_order;
  CUmemLocation source, target;
  unsigned flags;
};
#if CUDA_VERSION >= 12080
static_assert(sizeof(CopyAttributes) == sizeof(CUmemcpyAttributes));
static_assert(offsetof(CopyAttributes, flags) == offsetof(CUmemcpyAttributes, flags));
#endif

// Copies that may happen in any order among themselves.
struct Copies {
  std::vector<CUdeviceptr> to, from;
  std::vector<size_t> sizes;

  bool empty() const { return to.empty(); }
  void add(CUdeviceptr target, CUdeviceptr source, size_t size) {
    to.push_back(target);
    from.push_back(source);
    sizes.push_back(size);
  }
};

struct Driver {
#define EPV2_MEMBER(name) decltype(&::name) name = nullptr;
  EPV2_RMA_DRIVER_FUNCTIONS(EPV2_MEMBER)
#undef EPV2_MEMBER

  // Throw Error "call (what): CUDA_ERROR_X (in words)" unless `result` is success.
  void check(CUresult result, const char* call, const std::string& what = "") const;
  // Start `copies` on `stream`, on copy engines where the driver can be asked for them (CUDA 12.8 or newer): kernels
  // that wait for these bytes may hold every SM.
  void copy(Copies& copies, CUstream stream) const;

  // By its versioned name: the headers' latest form takes other arguments.
  CUresult (*create_context)(CUcontext*, unsigned flags, CUdevice) = nullptr;
  // Both forms of cuMemcpyBatchAsync; drivers for CUDA 13 have both, 12.8 and 12.9 the first.
  CUresult (*batch_v1)(CUdeviceptr*, CUdeviceptr*, size_t*, size_t, CopyAttributes*, size_t*, size_t, size_t*,
                       CUstream) = nullptr;
  CUresult (*batch_v2)(CUdeviceptr*, CUdeviceptr*, size_t*, size_t, CopyAttributes*, size_t*, size_t,
                       CUstream) = nullptr;
};

// Loaded at the first call. Throws Error where there is no driver, or one that lacks a function.
const Driver& driver();

// Makes a context current on this thread for a while: NCCL's threads may have none, or another.
class WithContext {
 public:
  explicit WithContext(CUcontext context);
  ~WithContext();
  WithContext(const WithContext&) = delete;
  WithContext& operator=(const WithContext&) = delete;

 private:
  CUcontext previous_ = nullptr;
};

// A context of the plugin's own. The driver lets a thread wait for a whole context in places: a copy to pageable memory
// holds the context's lock until its stream is through, and so may the first use of a kernel. In the application's
// context that stream may hold a kernel that waits for what this plugin is to bring.
class OwnContext {
 public:
  // On the device of the current context; one for all communicators that are open. Throws Error.
  static std::shared_ptr<OwnContext> get();
  ~OwnContext();
  OwnContext(const OwnContext&) = delete;
  OwnContext& operator=(const OwnContext&) = delete;

  const CUcontext context;

 private:
  explicit OwnContext(CUcontext made) : context(made) {}
};

}  // namespace epv2::rma
