// epv2_plugin's loopback: an RMA plugin of NCCL's through which GIN puts, gets and signals run between processes of one
// machine, without a network adapter. It is loaded where NCCL_RMA_PLUGIN names it, which `epv2 emulate` does.
//
// EPV2_RMA_CHAOS=SEED makes it deliver as late and as unordered as GIN allows (see engine.h).
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "../runtime/error.h"
#include "abi.h"
#include "communicator.h"

namespace epv2::rma {
namespace {

constexpr const char* kChaos = "EPV2_RMA_CHAOS";
constexpr size_t kHandle = sizeof(Handle);
char device_name[] = "epv2_loopback";

std::atomic<Logger> logger{nullptr};

// Arguments that NCCL or a kernel got wrong.
class Misuse : public Error {
  using Error::Error;
};

// Every entry is called from C: an exception becomes a line in NCCL's log and a result.
template <typename Body>
ncclResult_t guarded(const char* entry, ncclResult_t result, Body body) {
  try {
    body();
    return ncclSuccess;
  } catch (const Misuse& error) {
    report(kWarn, std::string(entry) + ": " + error.what());
    return ncclInvalidArgument;
  } catch (const std::exception& error) {
    report(kWarn, std::string(entry) + ": " + error.what());
    return result;
  }
}

std::optional<uint64_t> chaos() {
  const char* text = std::getenv(kChaos);
  if (text == nullptr || *text == '\0') return std::nullopt;
  char* end = nullptr;
  errno = 0;
  const uint64_t seed = std::strtoull(text, &end, 10);
  if (*end != '\0' || errno != 0 || text[0] < '0' || text[0] > '9')
    throw Misuse(std::string(kChaos) + " = " + text + ": must be a whole number of 0 or more");
  return seed;
}

struct Listener {
  std::unique_ptr<Meeting> meeting = std::make_unique<Meeting>();
};

struct Context {
  Communicator* comm;
  uint32_t first;
  int count, stride;
};

// A region is handed out as its number + 1: a wrong handle from a kernel is an error then, not a wild pointer.
void* handle_of(uint32_t region) { return reinterpret_cast<void*>(static_cast<uintptr_t>(region) + 1); }

uint32_t region_of(void* handle, const char* what) {
  const auto number = reinterpret_cast<uintptr_t>(handle);
  if (number == 0 || number > kNoRegion)
    throw Misuse(std::string(what) + " = " + std::to_string(number) + ": not a handle of registered memory");
  return static_cast<uint32_t>(number - 1);
}

Operation begin(const Context& context, int index, uint32_t rank) {
  if (index < 0 || index >= context.count)
    throw Misuse("context " + std::to_string(index) + ": must be 0 or more and below " + std::to_string(context.count));
  const int ranks = context.comm->ranks();
  if (rank >= static_cast<uint32_t>(ranks))
    throw Misuse("rank " + std::to_string(rank) + ": must be 0 or more and below " + std::to_string(ranks));
  const int apart = static_cast<int>(rank) - context.comm->rank();
  if (apart % context.stride != 0)
    throw Misuse("rank " + std::to_string(rank) + " is not on the rail of rank " +
                 std::to_string(context.comm->rank()) + ": rail connections reach every " +
                 std::to_string(context.stride) + ". rank");
  Operation operation = {};
  operation.context = context.first + static_cast<uint32_t>(index);
  operation.source_rank = static_cast<uint32_t>(context.comm->rank());
  operation.source_region = operation.target_region = operation.signal_region = kNoRegion;
  return operation;
}

void* request_of(uint64_t number) { return reinterpret_cast<void*>(number); }

// ---- what NCCL calls ------------------------------------------------------------------------------------------------

ncclResult_t init(void** instance, uint64_t, Logger log) {
  logger = log;
  *instance = device_name;  // something to hand back; there is no state
  return guarded("init", ncclInvalidArgument, [] {
    driver();
    const auto seed = chaos();
    report(kInfo, "puts, gets and signals between processes of this machine" +
                      (seed ? ", with chaos " + std::to_string(*seed) : std::string()));
  });
}

ncclResult_t devices(int* count) {
  *count = 1;
  return ncclSuccess;
}

ncclResult_t get_properties(int device, Properties* properties) {
  return guarded("getProperties", ncclInternalError, [&] {
    if (device != 0) throw Misuse("device " + std::to_string(device) + ": there is one, 0");
    *properties = {};
    properties->name = device_name;
    properties->guid = kInboxMagic;
    properties->pointer_support = kHostMemory | kCudaMemory;
    properties->speed_mbits = 400000;
    properties->port = 1;
    properties->max_comms = 1 << 16;
    // 512 operations in flight; kernels that count on so many find 32 under chaos.
    properties->max_receives = chaos() ? 1 : 16;
    properties->net_device_type = kGinProxy;
    properties->virtual_devices = 1;
    properties->max_p2p_bytes = properties->max_collective_bytes = size_t{1} << 40;
    properties->max_multi_request = 1;
    properties->rail = properties->plane = kNoId;
  });
}

ncclResult_t listen(void*, int, void* handle, void** listener) {
  return guarded("listen", ncclSystemError, [&] {
    auto made = std::make_unique<Listener>();
    std::memset(handle, 0, kHandleBytes);
    std::memcpy(handle, &made->meeting->handle(), kHandle);
    *listener = made.release();
  });
}

ncclResult_t connect(void*, void* handles[], int ranks, int rank, void* listener, void** comm) {
  return guarded("connect", ncclSystemError, [&] {
    std::vector<Handle> all(ranks);
    for (int i = 0; i < ranks; i++) std::memcpy(&all[i], handles[i], kHandle);
    auto meeting = std::move(static_cast<Listener*>(listener)->meeting);
    if (meeting == nullptr) throw Misuse("this listener has connected before");
    *comm = new Communicator(std::move(meeting), all, rank, chaos());
  });
}

ncclResult_t create_context(void* comm, Config* config, void** context) {
  return guarded("createContext", ncclInternalError, [&] {
    auto* owner = static_cast<Communicator*>(comm);
    if (config->contexts < 1 || config->rank_stride < 1 || owner->ranks() % config->rank_stride != 0)
      throw Misuse(std::to_string(config->contexts) + " contexts of rank stride " +
                   std::to_string(config->rank_stride) + ": must be 1 or more, and the stride divide " +
                   std::to_string(owner->ranks()) + " ranks");
    *context = new Context{owner, owner->take_contexts(config->contexts), config->contexts, config->rank_stride};
  });
}

ncclResult_t register_memory(void* comm, void* data, size_t size, int type, uint64_t flags, void** region) {
  *region = nullptr;
  return guarded("regMrSym", ncclSystemError,
                 [&] { *region = handle_of(static_cast<Communicator*>(comm)->add_region(data, size, type, flags)); });
}

ncclResult_t register_dmabuf(void*, void*, size_t, int, uint64_t, int, uint64_t, void**) {
  return guarded("regMrSymDmaBuf", ncclInternalError, [] { throw Misuse("not offered by this plugin's properties"); });
}

ncclResult_t deregister_memory(void* comm, void* region) {
  return guarded("deregMrSym", ncclSystemError,
                 [&] { static_cast<Communicator*>(comm)->remove_region(region_of(region, "memory")); });
}

ncclResult_t destroy_context(void* context) {
  delete static_cast<Context*>(context);
  return ncclSuccess;
}

ncclResult_t close_comm(void* comm) {
  return guarded("closeColl", ncclSystemError, [&] { delete static_cast<Communicator*>(comm); });
}

ncclResult_t close_listener(void* listener) {
  delete static_cast<Listener*>(listener);
  return ncclSuccess;
}

ncclResult_t start_put(const char* entry, const Context& context, int index, uint64_t source_offset, void* source,
                       size_t size, uint64_t target_offset, void* target, uint32_t rank, void** request,
                       uint64_t signal_offset = 0, void* signal = nullptr, uint64_t value = 0, bool strong = false) {
  return guarded(entry, ncclSystemError, [&] {
    Operation operation = begin(context, index, rank);
    operation.size = size;
    if (size != 0) {
      operation.source_region = region_of(source, "source");
      operation.source_offset = source_offset;
      operation.target_region = region_of(target, "target");
      operation.target_offset = target_offset;
      context.comm->take_inline(operation);
    }
    if (signal != nullptr) {
      operation.signal_region = region_of(signal, "signal");
      operation.signal_offset = signal_offset;
      operation.signal_value = value;
      operation.is_strong = strong;
    }
    *request = request_of(context.comm->post(static_cast<int>(rank), operation));
  });
}

ncclResult_t put(void* context, int index, uint64_t source_offset, void* source, size_t size, uint64_t target_offset,
                 void* target, uint32_t rank, void** request) {
  return start_put("iput", *static_cast<Context*>(context), index, source_offset, source, size, target_offset, target,
                   rank, request);
}

ncclResult_t put_signal(void* context, int index, uint64_t source_offset, void* source, size_t size,
                        uint64_t target_offset, void* target, uint32_t rank, uint64_t signal_offset, void* signal,
                        uint64_t value, uint32_t operation, bool strong, void** request) {
  const char* entry = "iputSignal";
  if (signal == nullptr || (operation != kSignalInc && operation != kSignalAdd))
    return guarded(entry, ncclInternalError, [&] {
      throw Misuse("signal operation " + std::to_string(operation) + (signal == nullptr ? " on no memory" : "") +
                   ": must be 1 (increment) or 2 (add) on registered memory");
    });
  return start_put(entry, *static_cast<Context*>(context), index, source_offset, source, size, target_offset, target,
                   rank, request, signal_offset, signal, operation == kSignalInc ? 1 : value, strong);
}

ncclResult_t get(void* context, int index, uint64_t remote_offset, void* remote, size_t size, uint64_t local_offset,
                 void* local, uint32_t rank, void** request) {
  const Context& where = *static_cast<Context*>(context);
  return guarded("iget", ncclSystemError, [&] {
    Operation operation = begin(where, index, rank);
    operation.is_get = 1;
    operation.size = size;
    operation.source_rank = rank;
    operation.source_region = region_of(remote, "remote");
    operation.source_offset = remote_offset;
    operation.target_region = region_of(local, "local");
    operation.target_offset = local_offset;
    *request = request_of(where.comm->post(where.comm->rank(), operation));
  });
}

// Nothing to wait for: a get is complete only when its bytes are in this rank's memory.
ncclResult_t flush(void*, int, void*, uint32_t, void** request) {
  *request = nullptr;
  return ncclSuccess;
}

ncclResult_t test(void* comm, void* request, int* done) {
  *done = 0;
  return guarded("test", ncclRemoteError, [&] {
    *done = static_cast<Communicator*>(comm)->test(static_cast<uint64_t>(reinterpret_cast<uintptr_t>(request)));
  });
}

ncclResult_t query_error(void* context, bool* failed) {
  *failed = static_cast<Context*>(context)->comm->failed();
  return ncclSuccess;
}

ncclResult_t finalize(void*) { return ncclSuccess; }

}  // namespace

void report(LogLevel level, const std::string& text) {
  if (const Logger log = logger.load())
    log(level, kInitAndNet, "rma_loopback", 0, "epv2 loopback: %s", text.c_str());
  else if (level == kWarn)
    std::fprintf(stderr, "epv2 loopback: %s\n", text.c_str());
}

}  // namespace epv2::rma

extern "C" __attribute__((visibility("default"))) epv2::rma::PluginV14 ncclRmaPlugin_v14;
epv2::rma::PluginV14 ncclRmaPlugin_v14 = {
    "epv2_loopback",
    epv2::rma::init,
    epv2::rma::devices,
    epv2::rma::get_properties,
    epv2::rma::listen,
    epv2::rma::connect,
    epv2::rma::create_context,
    epv2::rma::register_memory,
    epv2::rma::register_dmabuf,
    epv2::rma::deregister_memory,
    epv2::rma::destroy_context,
    epv2::rma::close_comm,
    epv2::rma::close_listener,
    epv2::rma::put,
    epv2::rma::put_signal,
    epv2::rma::get,
    epv2::rma::flush,
    epv2::rma::test,
    nullptr,  // progress: the engine has a thread of its own
    epv2::rma::query_error,
    epv2::rma::finalize,
};
