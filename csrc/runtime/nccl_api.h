// NCCL's functions, looked up in whichever libnccl.so.2 the process uses.
#pragma once

#include <cuda.h>
#include <nccl.h>
#include <nccl_device.h>

#include <string>
#include <vector>

namespace epv2 {

// Names as in nccl.h. ncclTeamLsa is apart, because the headers overload it.
#define EPV2_NCCL_FUNCTIONS(X)                                                                                       \
  X(ncclGetErrorString) X(ncclGetLastError) X(ncclGetUniqueId) X(ncclCommInitRankConfig) X(ncclCommFinalize)         \
  X(ncclCommDestroy) X(ncclCommAbort) X(ncclCommGetAsyncError) X(ncclCommQueryProperties) X(ncclMemAlloc)            \
  X(ncclMemFree) X(ncclCommWindowRegister) X(ncclCommWindowDeregister) X(ncclGetLsaDevicePointer)                    \
  X(ncclDevCommCreate) X(ncclDevCommDestroy)

struct Nccl {
  std::string path, version;
#define EPV2_MEMBER(name) decltype(&::name) name = nullptr;
  EPV2_NCCL_FUNCTIONS(EPV2_MEMBER)
#undef EPV2_MEMBER
  ncclTeam_t (*ncclTeamLsa)(ncclComm_t) = nullptr;

  // Throw Error unless `result` is success (or in progress, which callers wait out).
  void check(ncclResult_t result, const char* call, ncclComm_t comm = nullptr) const;
  // "call: what NCCL says".
  std::string describe(ncclResult_t result, const char* call, ncclComm_t comm) const;
};

// Take the loaded NCCL, else the first of `paths` that exists, else the system's. Throws Error if there is none, or one
// that does not fit this module.
void load_nccl(const std::vector<std::string>& paths);

// The NCCL taken; load_nccl({}) where none was.
const Nccl& nccl_api();

// "2.30.7" of NCCL's version number.
std::string nccl_version_text(int code);

}  // namespace epv2
