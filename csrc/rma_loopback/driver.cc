#include "driver.h"

#include <map>
#include <mutex>
#include <type_traits>

#include "../runtime/error.h"
#include "../runtime/library.h"

namespace epv2::rma {
namespace {

constexpr int kSourceInStreamOrder = 1;  // CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
constexpr unsigned kBesideKernels = 1;   // CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE

Driver load() {
  std::string reason;
  const auto library = Library::open("libcuda.so.1", reason);
  if (!library) throw Error("no CUDA driver: " + reason);
  Driver found;
  const auto take = [&](auto& member, const char* name) {
    member = reinterpret_cast<std::remove_reference_t<decltype(member)>>(library->find(name));
    return member != nullptr;
  };
#define EPV2_TEXT(name) #name
#define EPV2_TAKE(name)                     \
  if (!take(found.name, EPV2_TEXT(name)))   \
    throw Error("the CUDA driver (" + library->path() + ") has no " EPV2_TEXT(name));
  EPV2_RMA_DRIVER_FUNCTIONS(EPV2_TAKE)
#undef EPV2_TAKE
#undef EPV2_TEXT
  if (!take(found.create_context, "cuCtxCreate_v2"))
    throw Error("the CUDA driver (" + library->path() + ") has no cuCtxCreate_v2");
  if (!take(found.batch_v2, "cuMemcpyBatchAsync_v2")) take(found.batch_v1, "cuMemcpyBatchAsync");
  return found;
}

}  // namespace

const Driver& driver() {
  static const Driver loaded = load();
  return loaded;
}

void Driver::check(CUresult result, const char* call, const std::string& what) const {
  if (result == CUDA_SUCCESS) return;
  const char *name = nullptr, *words = nullptr;
  cuGetErrorName(result, &name);
  cuGetErrorString(result, &words);
  throw Error(std::string(call) + (what.empty() ? "" : " (" + what + ")") + ": " +
              (name == nullptr ? "error " + std::to_string(static_cast<int>(result)) : name) +
              (words == nullptr ? "" : std::string(" (") + words + ")"));
}

void Driver::copy(Copies& copies, CUstream stream) const {
  if (copies.empty()) return;
  CopyAttributes how = {};
  how.source_order = kSourceInStreamOrder;
  how.flags = kBesideKernels;
  size_t first = 0, failed = 0;
  CUdeviceptr *to = copies.to.data(), *from = copies.from.data();
  const size_t count = copies.to.size();
  if (batch_v2 != nullptr) {
    check(batch_v2(to, from, copies.sizes.data(), count, &how, &first, 1, stream), "cuMemcpyBatchAsync");
  } else if (batch_v1 != nullptr) {
    check(batch_v1(to, from, copies.sizes.data(), count, &how, &first, 1, &failed, stream), "cuMemcpyBatchAsync");
  } else {
    for (size_t i = 0; i < count; i++) check(cuMemcpyAsync(to[i], from[i], copies.sizes[i], stream), "cuMemcpyAsync");
  }
}

WithContext::WithContext(CUcontext context) {
  driver().check(driver().cuCtxGetCurrent(&previous_), "cuCtxGetCurrent");
  driver().check(driver().cuCtxSetCurrent(context), "cuCtxSetCurrent");
}

WithContext::~WithContext() { driver().cuCtxSetCurrent(previous_); }

std::shared_ptr<OwnContext> OwnContext::get() {
  static std::mutex mutex;
  static std::map<CUdevice, std::weak_ptr<OwnContext>> all;
  const Driver& cuda = driver();
  CUdevice device = 0;
  cuda.check(cuda.cuCtxGetDevice(&device), "cuCtxGetDevice");
  std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<OwnContext> found = all[device].lock();
  if (found) return found;
  CUcontext made = nullptr;
  cuda.check(cuda.create_context(&made, 0, device), "cuCtxCreate", "a context for the loopback");
  cuda.cuCtxPopCurrent(&made);
  found.reset(new OwnContext(made));
  all[device] = found;
  return found;
}

OwnContext::~OwnContext() { driver().cuCtxDestroy(context); }

}  // namespace epv2::rma
