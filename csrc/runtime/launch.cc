#include "launch.h"

#include <sys/mman.h>

#include <cerrno>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "driver_api.h"
#include "error.h"

namespace epv2 {
namespace {

constexpr int kMaxCluster = 8;  // what every device can do that has clusters

void require(bool good, const std::string& kernel, const char* what, int64_t value, const std::string& allowed) {
  if (!good)
    throw std::invalid_argument("kernel " + kernel + ": " + what + " = " + std::to_string(value) + ": must be " + allowed);
}

std::string range(int64_t low, int64_t high) { return "from " + std::to_string(low) + " to " + std::to_string(high); }

}  // namespace

std::shared_ptr<Module> Module::load(const std::string& cubin) {
  if (cubin.empty()) throw std::invalid_argument("the cubin is empty");
  const Driver& cuda = driver_api();
  cuda.require_context();
  CUmodule module = nullptr;
  cuda.check(cuda.cuModuleLoadData(&module, cubin.data()), "cuModuleLoadData",
             "device code of " + std::to_string(cubin.size()) + " bytes");
  return std::shared_ptr<Module>(new Module(module));
}

// At the end of the process the driver may have gone first, and says so: nothing is left to unload then.
Module::~Module() { driver_api().cuModuleUnload(module_); }

std::shared_ptr<Function> Module::function(const std::string& name) {
  const Driver& cuda = driver_api();
  CUfunction found = nullptr;
  cuda.check(cuda.cuModuleGetFunction(&found, module_, name.c_str()), "cuModuleGetFunction", "kernel " + name);
  return std::make_shared<Function>(shared_from_this(), found, name);
}

Function::Function(std::shared_ptr<Module> module, CUfunction function, std::string name)
    : name(std::move(name)), module_(std::move(module)), function_(function) {
  const Driver& cuda = driver_api();
  const std::string what = "kernel " + this->name;
  registers = attribute(CU_FUNC_ATTRIBUTE_NUM_REGS);
  static_shared_bytes = attribute(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
  local_bytes = attribute(CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES);
  max_threads = attribute(CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
  size_t offset = 0;
  cuda.check(cuda.cuFuncGetParamInfo(function_, 0, &offset, &args_bytes), "cuFuncGetParamInfo", what);
  CUdevice device = 0;
  int limit = 0;
  cuda.check(cuda.cuCtxGetDevice(&device), "cuCtxGetDevice", what);
  cuda.check(cuda.cuDeviceGetAttribute(&limit, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device),
             "cuDeviceGetAttribute", what);
  max_dynamic_shared_bytes = limit - static_shared_bytes;
  // Once, ahead: then every launch may be captured into a graph.
  cuda.check(cuda.cuFuncSetAttribute(function_, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                     max_dynamic_shared_bytes),
             "cuFuncSetAttribute", what);
}

int Function::attribute(CUfunction_attribute which) const {
  int value = 0;
  driver_api().check(driver_api().cuFuncGetAttribute(&value, which, function_), "cuFuncGetAttribute", "kernel " + name);
  return value;
}

void Function::check_shape(const LaunchShape& shape, std::string_view args) const {
  require(shape.grid >= 1 && shape.grid <= INT_MAX, name, "grid", shape.grid, range(1, INT_MAX));
  require(shape.block >= 1 && shape.block <= max_threads, name, "block", shape.block, range(1, max_threads));
  require(shape.shared_bytes >= 0 && shape.shared_bytes <= max_dynamic_shared_bytes, name, "shared_bytes",
          shape.shared_bytes, range(0, max_dynamic_shared_bytes) + " on this device");
  require(shape.cluster >= 1 && shape.cluster <= kMaxCluster && shape.grid % shape.cluster == 0, name, "cluster",
          shape.cluster, range(1, kMaxCluster) + " and divide grid = " + std::to_string(shape.grid));
  require(args.size() == args_bytes, name, "size of args", static_cast<int64_t>(args.size()),
          "the " + std::to_string(args_bytes) + " bytes of the kernel's struct");
}

void Function::launch(const LaunchShape& shape, uintptr_t stream, std::string_view args) const {
  check_shape(shape, args);
  const Driver& cuda = driver_api();
  CUlaunchAttribute attributes[2] = {};
  CUlaunchConfig config = {};
  config.gridDimX = static_cast<unsigned>(shape.grid);
  config.blockDimX = static_cast<unsigned>(shape.block);
  config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = static_cast<unsigned>(shape.shared_bytes);
  config.hStream = reinterpret_cast<CUstream>(stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    CUlaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    cluster.value.clusterDim.x = static_cast<unsigned>(shape.cluster);
    cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1;
  }
  if (shape.programmatic) {
    CUlaunchAttribute& programmatic = attributes[config.numAttrs++];
    programmatic.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    programmatic.value.programmaticStreamSerializationAllowed = 1;
  }
  void* parameters[] = {const_cast<char*>(args.data())};  // the driver copies it before it returns
  const CUresult result = cuda.cuLaunchKernelEx(&config, function_, parameters, nullptr);
  if (result != CUDA_SUCCESS)
    cuda.check(result, "cuLaunchKernelEx",
               "kernel " + name + ", " + std::to_string(shape.grid) + " CTAs of " + std::to_string(shape.block) +
                   " threads, " + std::to_string(shape.shared_bytes) + " bytes of shared memory");
}

Mapped::Mapped(size_t num_bytes) : num_bytes_(num_bytes) {
  if (num_bytes == 0) throw std::invalid_argument("mapped memory of 0 bytes: must have at least 1");
  const Driver& cuda = driver_api();
  cuda.require_context();
  const std::string what = std::to_string(num_bytes) + " bytes";
  cuda.check(cuda.cuMemHostAlloc(&host_, num_bytes, CU_MEMHOSTALLOC_DEVICEMAP | CU_MEMHOSTALLOC_PORTABLE),
             "cuMemHostAlloc", what);
  std::memset(host_, 0, num_bytes);
  const CUresult result = cuda.cuMemHostGetDevicePointer(&device_, host_, 0);
  if (result != CUDA_SUCCESS) {
    cuda.cuMemFreeHost(std::exchange(host_, nullptr));
    cuda.check(result, "cuMemHostGetDevicePointer", what);
  }
}

Mapped::~Mapped() {
  if (host_ != nullptr) driver_api().cuMemFreeHost(host_);
}

void Mapped::close() {
  device_ = 0;
  if (void* host = std::exchange(host_, nullptr)) driver_api().check(driver_api().cuMemFreeHost(host), "cuMemFreeHost");
}

SharedMapped::SharedMapped(int file, size_t num_bytes) : num_bytes_(num_bytes) {
  const Driver& cuda = driver_api();
  cuda.require_context();
  const std::string what = std::to_string(num_bytes) + " bytes";
  void* host = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (host == MAP_FAILED) throw Error("mmap (" + what + " of file " + std::to_string(file) + "): " + std::strerror(errno));
  const auto take = [&](CUresult result, const char* call) {
    if (result != CUDA_SUCCESS) munmap(host, num_bytes);
    cuda.check(result, call, what);
  };
  take(cuda.cuMemHostRegister(host, num_bytes, CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP),
       "cuMemHostRegister");
  const CUresult result = cuda.cuMemHostGetDevicePointer(&device_, host, 0);
  if (result != CUDA_SUCCESS) cuda.cuMemHostUnregister(host);
  take(result, "cuMemHostGetDevicePointer");
  host_ = host;
}

SharedMapped::~SharedMapped() {
  // As in `close`: what the driver did not let go stays mapped.
  if (host_ != nullptr && driver_api().cuMemHostUnregister(host_) == CUDA_SUCCESS) munmap(host_, num_bytes_);
}

void SharedMapped::close() {
  device_ = 0;
  if (void* host = std::exchange(host_, nullptr)) {
    // Where this throws the device may still reach the pages, which then stay mapped.
    driver_api().check(driver_api().cuMemHostUnregister(host), "cuMemHostUnregister");
    munmap(host, num_bytes_);
  }
}

}  // namespace epv2
