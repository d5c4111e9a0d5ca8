// A stand-in for libcuda.so.1: "device memory" is the host's, a "kernel" is any name that starts with "kernel".
// FAKE_CUDA_VERSION chooses what it claims to be, FAKE_NO_CONTEXT leaves the thread without a context.
#include <cuda.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "fake.h"

namespace {

int context, module_handle, function, stream, event;  // their addresses are the handles

CUresult answer(const char* name) { return listed("FAKE_FAIL", name) ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS; }

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return answer("cuInit"); }

CUresult cuDriverGetVersion(int* version) {
  *version = *setting("FAKE_CUDA_VERSION") ? std::atoi(setting("FAKE_CUDA_VERSION")) : CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult result, const char** name) {
  *name = result == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_NOT_FOUND";
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, const char** words) {
  *words = "in words";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* current) {
  *current = *setting("FAKE_NO_CONTEXT") ? nullptr : reinterpret_cast<CUcontext>(&context);
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext current) {
  note("cuCtxSetCurrent%s", current == reinterpret_cast<CUcontext>(&context) ? "" : " OF ANOTHER");
  return answer("cuCtxSetCurrent");
}

CUresult cuCtxGetStreamPriorityRange(int* lowest, int* highest) {
  *lowest = 0;
  *highest = -5;
  return CUDA_SUCCESS;
}

CUresult cuStreamCreateWithPriority(CUstream* made, unsigned flags, int priority) {
  note("cuStreamCreateWithPriority %u %d", flags, priority);
  *made = reinterpret_cast<CUstream>(&stream);
  return answer("cuStreamCreateWithPriority");
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute, CUdevice) {
  *value = 232448;
  return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* made, unsigned flags) {
  note("cuStreamCreate %u", flags);
  *made = reinterpret_cast<CUstream>(&stream);
  return answer("cuStreamCreate");
}

CUresult cuStreamSynchronize(CUstream) {
  note("cuStreamSynchronize");
  return answer("cuStreamSynchronize");
}

CUresult cuStreamDestroy(CUstream) {
  note("cuStreamDestroy");
  return CUDA_SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr memory, unsigned char value, size_t size, CUstream) {
  note("cuMemsetD8Async %zu", size);
  const CUresult result = answer("cuMemsetD8Async");
  if (result == CUDA_SUCCESS) std::memset(reinterpret_cast<void*>(memory), value, size);
  return result;
}

CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream on) {
  note("cuMemcpyAsync %zu stream=%zu", size, reinterpret_cast<size_t>(on));
  const CUresult result = answer("cuMemcpyAsync");
  if (result == CUDA_SUCCESS) std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size);
  return result;
}

#if CUDA_VERSION >= 13000
CUresult cuMemcpyBatchAsync(CUdeviceptr* to, CUdeviceptr* from, size_t* sizes, size_t count, CUmemcpyAttributes* how,
                            size_t* first, size_t kinds, CUstream on) {
  note("cuMemcpyBatchAsync %zu of %zu order=%d flags=%u first=%zu kinds=%zu stream=%zu", count, *sizes,
       how->srcAccessOrder, how->flags, *first, kinds, reinterpret_cast<size_t>(on));
  const CUresult result = answer("cuMemcpyBatchAsync");
  if (result == CUDA_SUCCESS) std::memcpy(reinterpret_cast<void*>(*to), reinterpret_cast<void*>(*from), *sizes);
  return result;
}

// The call of CUDA 12.8, which a driver also has: it takes one argument more, and no caller of ours may get it.
#undef cuMemcpyBatchAsync
CUresult cuMemcpyBatchAsync() { return CUDA_ERROR_NOT_SUPPORTED; }
#endif

CUresult cuEventCreate(CUevent* made, unsigned flags) {
  note("cuEventCreate %u", flags);
  *made = reinterpret_cast<CUevent>(&event);
  return answer("cuEventCreate");
}

CUresult cuEventRecord(CUevent, CUstream on) {
  note("cuEventRecord stream=%zu", reinterpret_cast<size_t>(on));
  return answer("cuEventRecord");
}

// FAKE_EVENT: what it answers.
CUresult cuEventQuery(CUevent) {
  note("cuEventQuery");
  const char* result = std::getenv("FAKE_EVENT");
  return result == nullptr ? answer("cuEventQuery") : static_cast<CUresult>(std::atoi(result));
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  static CUstreamCaptureMode current = CU_STREAM_CAPTURE_MODE_GLOBAL;
  note("cuThreadExchangeStreamCaptureMode %d", *mode);
  std::swap(current, *mode);
  return CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(CUstream on, CUevent, unsigned flags) {
  note("cuStreamWaitEvent stream=%zu flags=%u", reinterpret_cast<size_t>(on), flags);
  return answer("cuStreamWaitEvent");
}

CUresult cuStreamBatchMemOp(CUstream on, unsigned count, CUstreamBatchMemOpParams* operations, unsigned flags) {
  note("cuStreamBatchMemOp %u flags=%u stream=%zu", count, flags, reinterpret_cast<size_t>(on));
  for (unsigned i = 0; i < count && i < 4; i++)
    note("operation %d at %llu value %llu flags=%u", operations[i].operation, operations[i].writeValue.address,
         static_cast<unsigned long long>(operations[i].writeValue.value64), operations[i].writeValue.flags);
  return answer("cuStreamBatchMemOp");
}

CUresult cuMemAlloc(CUdeviceptr* memory, size_t size) {
  note("cuMemAlloc %zu", size);
  if (const CUresult result = answer("cuMemAlloc")) return result;
  *memory = reinterpret_cast<CUdeviceptr>(std::malloc(size));
  return CUDA_SUCCESS;
}

CUresult cuMemFree(CUdeviceptr memory) {
  note("cuMemFree");
  std::free(reinterpret_cast<void*>(memory));
  return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t size, CUstream) {
  note("cuMemcpyHtoDAsync %zu", size);
  const CUresult result = answer("cuMemcpyHtoDAsync");
  if (result == CUDA_SUCCESS) std::memcpy(reinterpret_cast<void*>(to), from, size);
  return result;
}

CUresult cuMemHostAlloc(void** memory, size_t size, unsigned flags) {
  note("cuMemHostAlloc %zu flags=%u", size, flags);
  if (const CUresult result = answer("cuMemHostAlloc")) return result;
  *memory = std::malloc(size);
  std::memset(*memory, 0xab, size);
  return CUDA_SUCCESS;
}

CUresult cuMemHostGetDevicePointer(CUdeviceptr* device, void* host, unsigned) {
  *device = reinterpret_cast<CUdeviceptr>(host) + (uint64_t{1} << 48);
  return answer("cuMemHostGetDevicePointer");
}

CUresult cuMemFreeHost(void* memory) {
  note("cuMemFreeHost");
  std::free(memory);
  return CUDA_SUCCESS;
}

CUresult cuMemHostRegister(void* memory, size_t size, unsigned flags) {
  note("cuMemHostRegister %zu flags=%u first=%d", size, flags, *static_cast<const char*>(memory));
  return answer("cuMemHostRegister");
}

CUresult cuMemHostUnregister(void*) {
  note("cuMemHostUnregister");
  return answer("cuMemHostUnregister");
}

CUresult cuModuleLoadData(CUmodule* made, const void* image) {
  note("cuModuleLoadData %.4s", static_cast<const char*>(image));
  *made = reinterpret_cast<CUmodule>(&module_handle);
  return answer("cuModuleLoadData");
}

CUresult cuModuleUnload(CUmodule) {
  note("cuModuleUnload");
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* made, CUmodule, const char* name) {
  *made = reinterpret_cast<CUfunction>(&function);
  return std::strncmp(name, "kernel", 6) == 0 ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  *value = which == CU_FUNC_ATTRIBUTE_NUM_REGS                ? 64
           : which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 512
           : which == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES     ? 16
                                                              : 0;
  return answer("cuFuncGetAttribute");
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int value) {
  note("cuFuncSetAttribute %d", value);
  return answer("cuFuncSetAttribute");
}

CUresult cuFuncGetParamInfo(CUfunction, size_t index, size_t* offset, size_t* size) {
  if (index > 0) return CUDA_ERROR_INVALID_VALUE;
  *offset = 0;
  *size = 12;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction, void** parameters, void**) {
  const auto* words = static_cast<const uint32_t*>(parameters[0]);
  note("cuLaunchKernelEx grid=%u block=%u shared=%u stream=%zu args=%u,%u,%u", config->gridDimX, config->blockDimX,
       config->sharedMemBytes, reinterpret_cast<size_t>(config->hStream), words[0], words[1], words[2]);
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
      note("cluster %u %u %u", config->attrs[i].value.clusterDim.x, config->attrs[i].value.clusterDim.y,
           config->attrs[i].value.clusterDim.z);
    else if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      note("programmatic %d", config->attrs[i].value.programmaticStreamSerializationAllowed);
  return answer("cuLaunchKernelEx");
}

}  // extern "C"
