// The CUDA driver's functions, looked up in libcuda.so.1.
#pragma once

#include <cuda.h>

#include <string>

namespace epv2 {

// Names as in cuda.h, whose macros pick the version of each.
#define EPV2_DRIVER_FUNCTIONS(X)                                                                                     \
  X(cuInit) X(cuDriverGetVersion) X(cuGetErrorName) X(cuGetErrorString) X(cuCtxGetCurrent) X(cuCtxGetDevice)         \
  X(cuDeviceGetAttribute) X(cuStreamCreate) X(cuStreamSynchronize) X(cuStreamDestroy) X(cuMemsetD8Async)             \
  X(cuCtxSetCurrent) X(cuCtxGetStreamPriorityRange) X(cuStreamCreateWithPriority) X(cuMemcpyAsync)                   \
  X(cuEventCreate) X(cuEventQuery) X(cuEventRecord) X(cuStreamWaitEvent) X(cuStreamBatchMemOp) X(cuMemAlloc)         \
  X(cuMemFree) X(cuThreadExchangeStreamCaptureMode)                                                                  \
  X(cuMemcpyHtoDAsync) X(cuMemHostAlloc) X(cuMemHostGetDevicePointer) X(cuMemFreeHost) X(cuMemHostRegister)          \
  X(cuMemHostUnregister) X(cuModuleLoadData) X(cuModuleUnload)                                                       \
  X(cuModuleGetFunction) X(cuFuncGetAttribute) X(cuFuncSetAttribute) X(cuFuncGetParamInfo) X(cuLaunchKernelEx)

struct Driver {
  int version = 0;
#define EPV2_MEMBER(name) decltype(&::name) name = nullptr;
  EPV2_DRIVER_FUNCTIONS(EPV2_MEMBER)
#undef EPV2_MEMBER
#if CUDA_VERSION >= 13000
  decltype(&::cuMemcpyBatchAsync) cuMemcpyBatchAsync = nullptr;  // nullptr before CUDA 13
#endif

  // Throw Error "call (what): CUDA_ERROR_X (in words)" unless `result` is success.
  void check(CUresult result, const char* call, const std::string& what = "") const;
  // Throw Error unless this thread has a CUDA context.
  void require_context() const;
};

// Loaded and initialised at the first call. Throws Error where there is no driver.
const Driver& driver_api();

// "13.0" of CUDA's version number.
std::string cuda_version_text(int code);

}  // namespace epv2
