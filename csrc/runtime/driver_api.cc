#include "driver_api.h"

#include <memory>
#include <mutex>
#include <type_traits>

#include "error.h"
#include "library.h"

namespace epv2 {
namespace {

constexpr int kOldest = 12040;  // cuFuncGetParamInfo

std::mutex mutex;
std::unique_ptr<Driver> current;

std::unique_ptr<Driver> load() {
  std::string reason;
  const auto library = Library::open("libcuda.so.1", reason);
  if (!library) throw Error("no CUDA driver: " + reason + ". Is this a machine with an NVIDIA GPU and its driver?");
  auto found = std::make_unique<Driver>();
  const auto take = [&](auto& member, const char* name) {
    member = reinterpret_cast<std::remove_reference_t<decltype(member)>>(library->find(name));
    return member != nullptr;
  };
  if (!take(found->cuDriverGetVersion, "cuDriverGetVersion") || found->cuDriverGetVersion(&found->version) != 0)
    throw Error(library->path() + " is not a CUDA driver: no cuDriverGetVersion");
  std::string missing;
  // Only through another macro: there a name has become that of its version, of which older ones take other arguments.
#define EPV2_TEXT(name) #name
#define EPV2_TAKE(name) \
  if (!take(found->name, EPV2_TEXT(name))) missing = EPV2_TEXT(name);
  EPV2_DRIVER_FUNCTIONS(EPV2_TAKE)
#undef EPV2_TAKE
#define EPV2_TAKE_IF_THERE(name) take(found->name, EPV2_TEXT(name));
#if CUDA_VERSION >= 13000
  EPV2_TAKE_IF_THERE(cuMemcpyBatchAsync)
#endif
#undef EPV2_TAKE_IF_THERE
#undef EPV2_TEXT
  if (found->version < kOldest || !missing.empty())
    throw Error("the CUDA driver (" + library->path() + ") is too old: it supports CUDA " +
                cuda_version_text(found->version) + (missing.empty() ? "" : ", has no " + missing) +
                ", and 12.4 or newer is needed. Install a newer NVIDIA driver (R550 or later)");
  found->check(found->cuInit(0), "cuInit");
  return found;
}

}  // namespace

std::string cuda_version_text(int code) { return std::to_string(code / 1000) + "." + std::to_string(code % 1000 / 10); }

const Driver& driver_api() {
  std::lock_guard<std::mutex> lock(mutex);
  if (!current) current = load();
  return *current;
}

void Driver::check(CUresult result, const char* call, const std::string& what) const {
  if (result == CUDA_SUCCESS) return;
  const char *name = nullptr, *words = nullptr;
  cuGetErrorName(result, &name);
  cuGetErrorString(result, &words);
  const std::string code = name == nullptr ? "error " + std::to_string(static_cast<int>(result)) : name;
  throw Error(std::string(call) + (what.empty() ? "" : " (" + what + ")") + ": " + code +
              (words == nullptr ? "" : std::string(" (") + words + ")"));
}

void Driver::require_context() const {
  CUcontext context = nullptr;
  check(cuCtxGetCurrent(&context), "cuCtxGetCurrent");
  if (context == nullptr)
    throw Error("no CUDA context on this thread: call torch.cuda.set_device(LOCAL_RANK) and use the device once first");
}

}  // namespace epv2
