// A stand-in for libnccl.so.2 on machines without a GPU: FAKE_NCCL_VERSION, FAKE_RANK, FAKE_RANKS, FAKE_LSA,
// FAKE_NO_WINDOWS, FAKE_NO_GIN and FAKE_CONTEXTS choose what it claims to be. One communicator, windows in host memory,
// no peers.
#include <nccl.h>
#include <nccl_device.h>

#include <cstring>
#include <map>

#include "fake.h"

namespace {

int communicator, window;  // their addresses are the handles
int asked;
std::string pending;
ncclWindow_t* unfinished;  // where a registration that goes on in the background will put its window
std::map<void*, size_t> allocations;

int number(const char* name, int otherwise) { return *setting(name) ? std::atoi(setting(name)) : otherwise; }

ncclResult_t answer(const char* name) {
  if (listed("FAKE_FAIL", name)) return ncclInvalidUsage;
  if (!listed("FAKE_LATE", name) && !listed("FAKE_NEVER", name)) return ncclSuccess;
  pending = name;
  asked = 0;
  return ncclInProgress;
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  *version = number("FAKE_NCCL_VERSION", NCCL_VERSION_CODE);
  return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t result) { return result == ncclInvalidUsage ? "invalid usage" : "other"; }

const char* ncclGetLastError(ncclComm_t) { return setting("FAKE_LAST_ERROR"); }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  note("ncclGetUniqueId");
  std::memset(id->internal, 7, sizeof(id->internal));
  return answer("ncclGetUniqueId");
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank, ncclConfig_t* config) {
  note("ncclCommInitRankConfig %d/%d id=%d blocking=%d policy=%d", rank, size, id.internal[127], config->blocking,
       config->CTAPolicy);
  *comm = reinterpret_cast<ncclComm_t>(&communicator);
  return answer("ncclCommInitRankConfig");
}

ncclResult_t ncclCommFinalize(ncclComm_t) {
  note("ncclCommFinalize");
  return answer("ncclCommFinalize");
}

ncclResult_t ncclCommDestroy(ncclComm_t) {
  note("ncclCommDestroy");
  return answer("ncclCommDestroy");
}

ncclResult_t ncclCommAbort(ncclComm_t) {
  note("ncclCommAbort");
  return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* state) {
  const bool failed = listed("FAKE_FAIL", "background");
  const bool busy = !pending.empty() && (listed("FAKE_NEVER", pending.c_str()) || ++asked < 3);
  *state = busy ? ncclInProgress : failed ? ncclInvalidUsage : ncclSuccess;
  if (!busy) {
    pending.clear();
    if (unfinished != nullptr) *unfinished = reinterpret_cast<ncclWindow_t>(&window);
    unfinished = nullptr;
  }
  return ncclSuccess;
}

ncclResult_t ncclCommQueryProperties(ncclComm_t, ncclCommProperties_t* properties) {
  properties->rank = 0;
  properties->nRanks = number("FAKE_RANKS", 1);
  properties->nLsaTeams = properties->nRanks / number("FAKE_LSA", properties->nRanks);
  properties->deviceApiSupport = !*setting("FAKE_NO_WINDOWS");
  properties->ginType = *setting("FAKE_NO_GIN") ? NCCL_GIN_TYPE_NONE : NCCL_GIN_TYPE_PROXY;
  properties->railedGinType = NCCL_GIN_TYPE_NONE;
  properties->hostRmaSupport = true;
  return answer("ncclCommQueryProperties");
}

ncclTeam_t ncclTeamLsa(ncclComm_t) {
  ncclTeam_t team = {};
  if (listed("FAKE_FAIL", "ncclTeamLsa")) return team;
  team.nRanks = number("FAKE_LSA", number("FAKE_RANKS", 1));
  team.rank = number("FAKE_RANK", 0) % team.nRanks;
  return team;
}

ncclResult_t ncclMemAlloc(void** memory, size_t size) {
  note("ncclMemAlloc %zu", size);
  if (const ncclResult_t result = answer("ncclMemAlloc")) return result;
  *memory = std::malloc(size);
  std::memset(*memory, 0xab, size);
  allocations[*memory] = size;
  return ncclSuccess;
}

ncclResult_t ncclMemFree(void* memory) {
  note("ncclMemFree%s", allocations.erase(memory) ? "" : " OF UNKNOWN MEMORY");
  std::free(memory);
  return answer("ncclMemFree");
}

ncclResult_t ncclCommWindowRegister(ncclComm_t, void* memory, size_t size, ncclWindow_t* out, int flags) {
  note("ncclCommWindowRegister %zu flags=%d%s", size, flags, allocations.count(memory) ? "" : " OF UNKNOWN MEMORY");
  const ncclResult_t result = answer("ncclCommWindowRegister");
  const bool made = (result == ncclSuccess || result == ncclInProgress) && !*setting("FAKE_NO_WINDOWS");
  *out = made && result == ncclSuccess ? reinterpret_cast<ncclWindow_t>(&window) : nullptr;
  if (result != ncclInProgress) return result;
  // As NCCL 2.30.7 does on a communicator that does not block: success, and no window yet.
  if (made) unfinished = out;
  return ncclSuccess;
}

ncclResult_t ncclCommWindowDeregister(ncclComm_t comm, ncclWindow_t) {
  note("ncclCommWindowDeregister%s", comm == nullptr ? " WITHOUT COMMUNICATOR" : "");
  return answer("ncclCommWindowDeregister");
}

ncclResult_t ncclGetLsaDevicePointer(ncclWindow_t, size_t offset, int peer, void** out) {
  *out = reinterpret_cast<void*>((size_t{1} << 40) * (peer + 1) + offset);
  return answer("ncclGetLsaDevicePointer");
}

ncclResult_t ncclDevCommCreate(ncclComm_t, const ncclDevCommRequirements_t* wanted, ncclDevComm_t* out) {
  note("ncclDevCommCreate lsa=%d contexts=%d signals=%d counters=%d connection=%d", wanted->lsaBarrierCount,
       wanted->ginContextCount, wanted->ginSignalCount, wanted->ginCounterCount, wanted->ginConnectionType);
  out->rank = 5;
  out->ginContextCount = number("FAKE_CONTEXTS", wanted->ginContextCount);
  const ncclResult_t result = answer("ncclDevCommCreate");
  return result == ncclInProgress ? ncclSuccess : result;
}

ncclResult_t ncclDevCommDestroy(ncclComm_t, const ncclDevComm_t* device) {
  note("ncclDevCommDestroy%s", device->rank == 5 ? "" : " OF ANOTHER");
  return answer("ncclDevCommDestroy");
}

}  // extern "C"
