// NCCL's interface to RMA plugins, version 14. NCCL's packages ship no headers for plugins, so it is declared here.
//
// Checked against NCCL v2.30.7-1: src/include/plugin/rma/rma_v14.h (order and types of the members, Config),
// src/include/plugin/net/net_v12.h (Properties), src/include/plugin/nccl_net.h (constants) and
// src/include/nccl_common.h (logger). 2.30.7 is the first release with RMA plugins and asks for version 14 first, so
// the older version 13, for which it has an adapter, would never be called.
#pragma once

#include <nccl.h>

#include <cstddef>
#include <cstdint>

namespace epv2::rma {

constexpr size_t kHandleBytes = 128;      // NCCL_NET_HANDLE_MAXSIZE
constexpr int kHostMemory = 1;            // NCCL_PTR_HOST
constexpr int kCudaMemory = 2;            // NCCL_PTR_CUDA
constexpr uint64_t kNeverReset = 1 << 1;  // NCCL_NET_MR_FLAG_SIGNAL_NEVER_RESET
constexpr uint32_t kSignalInc = 1;        // NCCL_NET_SIGNAL_OP_INC
constexpr uint32_t kSignalAdd = 2;        // NCCL_NET_SIGNAL_OP_ADD
constexpr int kGinProxy = 2;              // NCCL_NET_DEVICE_GIN_PROXY
constexpr int16_t kNoId = -1;             // NCCL_NET_ID_UNDEF

enum LogLevel { kWarn = 2, kInfo = 3 };   // NCCL_LOG_WARN, NCCL_LOG_INFO
constexpr unsigned long kInitAndNet = 0x11;  // NCCL_INIT | NCCL_NET

using Logger = void (*)(int level, unsigned long flags, const char* file, int line, const char* format, ...);

struct Config {
  int contexts;
  int traffic_class;
  int rank_stride;  // ranks that can be reached: those this far apart
};

struct Properties {
  char* name;
  char* pci_path;
  uint64_t guid;
  int pointer_support;
  int registration_is_global;
  int force_flush;
  int speed_mbits;
  int port;
  float latency;
  int max_comms;
  int max_receives;  // NCCL allows 32 times as many operations in flight, for each peer and context
  int net_device_type;
  int net_device_version;
  int virtual_devices;
  int virtual_device[8];
  size_t max_p2p_bytes;
  size_t max_collective_bytes;
  int max_multi_request;
  int16_t rail;
  int16_t plane;
};

struct PluginV14 {
  const char* name;
  ncclResult_t (*init)(void** instance, uint64_t comm_id, Logger log);
  ncclResult_t (*devices)(int* count);
  ncclResult_t (*get_properties)(int device, Properties* properties);
  ncclResult_t (*listen)(void* instance, int device, void* handle, void** listener);
  // `instance` may be another plugin's: NCCL's host side passes that of its net plugin.
  ncclResult_t (*connect)(void* instance, void* handles[], int ranks, int rank, void* listener, void** comm);
  ncclResult_t (*create_context)(void* comm, Config* config, void** context);
  ncclResult_t (*register_memory)(void* comm, void* data, size_t size, int type, uint64_t flags, void** region);
  ncclResult_t (*register_dmabuf)(void* comm, void* data, size_t size, int type, uint64_t offset, int fd,
                                  uint64_t flags, void** region);
  ncclResult_t (*deregister_memory)(void* comm, void* region);
  ncclResult_t (*destroy_context)(void* context);
  ncclResult_t (*close_comm)(void* comm);
  ncclResult_t (*close_listener)(void* listener);
  ncclResult_t (*put)(void* context, int index, uint64_t source_offset, void* source, size_t size,
                      uint64_t target_offset, void* target, uint32_t rank, void** request);
  ncclResult_t (*put_signal)(void* context, int index, uint64_t source_offset, void* source, size_t size,
                             uint64_t target_offset, void* target, uint32_t rank, uint64_t signal_offset, void* signal,
                             uint64_t value, uint32_t operation, bool strong, void** request);
  ncclResult_t (*get)(void* context, int index, uint64_t remote_offset, void* remote, size_t size,
                      uint64_t local_offset, void* local, uint32_t rank, void** request);
  ncclResult_t (*flush)(void* context, int index, void* region, uint32_t rank, void** request);
  ncclResult_t (*test)(void* comm, void* request, int* done);
  ncclResult_t (*progress)(void* context);
  ncclResult_t (*query_error)(void* context, bool* failed);
  ncclResult_t (*finalize)(void* instance);
};

// What a change of ours, or a platform with other sizes, would break without a word.
static_assert(sizeof(Config) == 12);
static_assert(sizeof(Properties) == 128);
static_assert(offsetof(Properties, pointer_support) == 24);
static_assert(offsetof(Properties, max_receives) == 52);
static_assert(offsetof(Properties, net_device_type) == 56);
static_assert(offsetof(Properties, virtual_devices) == 64);
static_assert(offsetof(Properties, max_p2p_bytes) == 104);
static_assert(offsetof(Properties, rail) == 124);
static_assert(sizeof(PluginV14) == 21 * sizeof(void*));
static_assert(offsetof(PluginV14, connect) == 5 * sizeof(void*));
static_assert(offsetof(PluginV14, put_signal) == 14 * sizeof(void*));
static_assert(offsetof(PluginV14, test) == 17 * sizeof(void*));
static_assert(offsetof(PluginV14, query_error) == 19 * sizeof(void*));

}  // namespace epv2::rma
