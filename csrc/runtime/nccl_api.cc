#include "nccl_api.h"

#include <unistd.h>

#include <memory>
#include <mutex>
#include <type_traits>

#include "error.h"
#include "library.h"

namespace epv2 {
namespace {

constexpr const char* kName = "libnccl.so.2";
constexpr int kOldest = NCCL_VERSION(2, 30, 0);        // window registration as used here, several ranks on one GPU
constexpr int kAnyHeaders = NCCL_VERSION(2, 31, 0);    // from here on NCCL translates for older headers
const std::string kWheel = "nvidia-nccl-cu" + std::to_string(CUDA_VERSION / 1000);
const std::string kRebuild = "pip install --no-build-isolation --no-deps -e .";

std::mutex mutex;
std::unique_ptr<Nccl> current;

std::string joined(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : ", ") + part;
  return text;
}

Library find_library(const std::vector<std::string>& paths) {
  if (auto library = Library::loaded(kName)) return *library;
  std::string reason;
  for (const std::string& path : paths) {
    if (access(path.c_str(), R_OK) != 0) continue;
    if (auto library = Library::open(path, reason)) return *library;
    throw Error("NCCL at " + path + " does not load: " + reason);
  }
  if (auto library = Library::open(kName, reason)) return *library;
  throw Error("no NCCL: this process has not loaded " + std::string(kName) +
              (paths.empty() ? "" : ", it is not at " + joined(paths)) + ", and the loader finds none (" + reason +
              "). Install it: pip install '" + kWheel + ">=2.30.5', then rebuild: " + kRebuild);
}

// How to get another library than the loaded one in front of torch's.
std::string preload_hint(const std::vector<std::string>& paths, const std::string& loaded) {
  std::string path = "/path/to/" + std::string(kName);
  for (const std::string& each : paths)
    if (each != loaded && access(each.c_str(), R_OK) == 0) {
      path = each;
      break;
    }
  return "Where torch brings another one, start with LD_PRELOAD=" + path;
}

void check_version(int code, const std::string& path, const std::vector<std::string>& paths) {
  const std::string found = "NCCL " + nccl_version_text(code) + " (" + path + ")";
  const std::string headers = nccl_version_text(NCCL_VERSION_CODE);
  if (code < kOldest)
    throw Error(found + " is too old: 2.30 or newer is needed. Install it: pip install '" + kWheel +
                ">=2.30.5', then rebuild: " + kRebuild + ". " + preload_hint(paths, path));
  const bool fits = code < kAnyHeaders ? code == NCCL_VERSION_CODE : code >= NCCL_VERSION_CODE;
  if (!fits)
    throw Error(found + " does not fit: epv2_plugin was compiled with the headers of NCCL " + headers +
                (code < kAnyHeaders ? ", and before 2.31 both must be the same version" : ", which are newer") +
                ". Rebuild against the loaded one: pip install --no-deps '" + kWheel + "==" + nccl_version_text(code) +
                "', then " + kRebuild + "; or load NCCL " + headers + ". " + preload_hint(paths, path));
}

}  // namespace

std::string nccl_version_text(int code) {
  const int major = code < 10000 ? code / 1000 : code / 10000;
  const int minor = code < 10000 ? code / 100 % 10 : code / 100 % 100;
  return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(code % 100);
}

void load_nccl(const std::vector<std::string>& paths) {
  std::lock_guard<std::mutex> lock(mutex);
  if (current) return;
  const Library library = find_library(paths);
  const std::string path = library.path();
  auto get_version = reinterpret_cast<decltype(&::ncclGetVersion)>(library.find("ncclGetVersion"));
  int code = 0;
  if (get_version == nullptr || get_version(&code) != ncclSuccess) throw Error(path + " is not NCCL: no ncclGetVersion");
  check_version(code, path, paths);
  auto found = std::make_unique<Nccl>();
  found->path = path;
  found->version = nccl_version_text(code);
  const auto take = [&](auto& member, const char* name) {
    member = reinterpret_cast<std::remove_reference_t<decltype(member)>>(library.find(name));
    if (member == nullptr) throw Error("NCCL " + found->version + " (" + path + ") has no " + name + ": a cut-down build?");
  };
#define EPV2_TAKE(name) take(found->name, #name);
  EPV2_NCCL_FUNCTIONS(EPV2_TAKE)
#undef EPV2_TAKE
  take(found->ncclTeamLsa, "ncclTeamLsa");
  current = std::move(found);
}

const Nccl& nccl_api() {
  load_nccl({});
  return *current;
}

std::string Nccl::describe(ncclResult_t result, const char* call, ncclComm_t comm) const {
  const char* last = ncclGetLastError(comm);
  const std::string detail = last == nullptr || *last == '\0' ? "nothing more; NCCL_DEBUG=WARN may" : last;
  return std::string(call) + ": " + ncclGetErrorString(result) + " (NCCL " + version + " says: " + detail + ")";
}

void Nccl::check(ncclResult_t result, const char* call, ncclComm_t comm) const {
  if (result != ncclSuccess && result != ncclInProgress) throw Error(describe(result, call, comm));
}

}  // namespace epv2
