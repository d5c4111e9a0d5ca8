#include "stream.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "driver_api.h"
#include "error.h"

namespace epv2 {
namespace {

constexpr size_t kMaxOperations = 255;  // of one cuStreamBatchMemOp

CUstream stream_of(uintptr_t stream) { return reinterpret_cast<CUstream>(stream); }

std::string address_text(uintptr_t address) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(address));
  return text;
}

CUstreamBatchMemOpParams parameters(const WordOperation& operation) {
  struct Kind {
    CUstreamBatchMemOpType type;
    unsigned flags, bytes;
  };
  static const std::map<std::string, Kind> kinds = {
      {"write32", {CU_STREAM_MEM_OP_WRITE_VALUE_32, CU_STREAM_WRITE_VALUE_DEFAULT, 4}},
      {"write64", {CU_STREAM_MEM_OP_WRITE_VALUE_64, CU_STREAM_WRITE_VALUE_DEFAULT, 8}},
      {"wait32_eq", {CU_STREAM_MEM_OP_WAIT_VALUE_32, CU_STREAM_WAIT_VALUE_EQ, 4}},
      {"wait32_geq", {CU_STREAM_MEM_OP_WAIT_VALUE_32, CU_STREAM_WAIT_VALUE_GEQ, 4}}};
  const auto& [name, address, value] = operation;
  const auto found = kinds.find(name);
  if (found == kinds.end())
    throw std::invalid_argument("operation \"" + name + "\": must be write32, write64, wait32_eq or wait32_geq");
  const Kind& kind = found->second;
  if (address == 0 || address % kind.bytes != 0)
    throw std::invalid_argument(name + " at " + address_text(address) + ": must be a multiple of " +
                                std::to_string(kind.bytes) + ", not 0");
  if (kind.bytes == 4 && value > UINT32_MAX)
    throw std::invalid_argument(name + " of " + std::to_string(value) + ": must have at most 32 bits");
  CUstreamBatchMemOpParams made = {};
  // Writes and waits have the same layout.
  made.writeValue.operation = kind.type;
  made.writeValue.address = address;
  if (kind.bytes == 8)
    made.writeValue.value64 = value;
  else
    made.writeValue.value = static_cast<cuuint32_t>(value);
  made.writeValue.flags = kind.flags;
  return made;
}

std::mutex events_mutex;
auto& idle_events = *new std::map<CUcontext, std::vector<CUevent>>;  // to the end: threads may outlive what is static

void record(CUevent event, CUstream stream) {
  driver_api().check(driver_api().cuEventRecord(event, stream), "cuEventRecord");
}

void await(CUevent event, CUstream stream) {
  driver_api().check(driver_api().cuStreamWaitEvent(stream, event, 0), "cuStreamWaitEvent");
}

void order(const OrderOperation& operation, CUstream stream) {
  const auto& [name, handle] = operation;
  if (name == "record") return record(reinterpret_cast<CUevent>(handle), stream);
  if (name == "await") return await(reinterpret_cast<CUevent>(handle), stream);
  const Event event;
  record(reinterpret_cast<CUevent>(event.handle()), name == "after" ? stream_of(handle) : stream);
  await(reinterpret_cast<CUevent>(event.handle()), name == "after" ? stream : stream_of(handle));
}

}  // namespace

Stream::Stream(bool high_priority) {
  const Driver& cuda = driver_api();
  cuda.require_context();
  int lowest = 0, highest = 0;
  cuda.check(cuda.cuCtxGetStreamPriorityRange(&lowest, &highest), "cuCtxGetStreamPriorityRange");
  cuda.check(cuda.cuStreamCreateWithPriority(&stream_, CU_STREAM_NON_BLOCKING, high_priority ? highest : lowest),
             "cuStreamCreateWithPriority");
}

Stream::~Stream() {
  if (stream_ != nullptr) driver_api().cuStreamDestroy(stream_);
}

void Stream::close() {
  if (CUstream stream = std::exchange(stream_, nullptr))
    driver_api().check(driver_api().cuStreamDestroy(stream), "cuStreamDestroy");
}

Event::Event() {
  const Driver& cuda = driver_api();
  cuda.require_context();
  cuda.check(cuda.cuCtxGetCurrent(&context_), "cuCtxGetCurrent");
  {
    std::lock_guard<std::mutex> lock(events_mutex);
    if (std::vector<CUevent>& idle = idle_events[context_]; !idle.empty()) {
      event_ = idle.back();
      idle.pop_back();
      return;
    }
  }
  cuda.check(cuda.cuEventCreate(&event_, CU_EVENT_DISABLE_TIMING), "cuEventCreate");
}

bool Event::passed() const {
  // A capture that another thread has begun forbids the call otherwise.
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  driver_api().cuThreadExchangeStreamCaptureMode(&mode);
  const CUresult result = driver_api().cuEventQuery(event_);
  driver_api().cuThreadExchangeStreamCaptureMode(&mode);
  if (result == CUDA_ERROR_NOT_READY || result == CUDA_ERROR_CAPTURED_EVENT) return false;
  driver_api().check(result, "cuEventQuery");
  return true;
}

Event::~Event() {
  std::lock_guard<std::mutex> lock(events_mutex);
  idle_events[context_].push_back(event_);
}

void copy(uintptr_t target, uintptr_t source, size_t num_bytes, uintptr_t stream) {
  const Driver& cuda = driver_api();
  const auto check = [&](CUresult result, const char* call) {
    if (result != CUDA_SUCCESS)  // the text takes time
      cuda.check(result, call,
                 std::to_string(num_bytes) + " bytes from " + address_text(source) + " to " + address_text(target));
  };
#if CUDA_VERSION >= 13000
  // Copies inside one device take SMs unless asked not to, and the plain call can't be asked. Where the driver has not
  // this call, or ignores the wish, it is the same copy. It takes no legacy stream.
  if (cuda.cuMemcpyBatchAsync != nullptr && stream != 0) {
    CUdeviceptr to = target, from = source;
    CUmemcpyAttributes attributes = {};
    attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
    attributes.flags = CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE;
    size_t first = 0;
    check(cuda.cuMemcpyBatchAsync(&to, &from, &num_bytes, 1, &attributes, &first, 1, stream_of(stream)),
          "cuMemcpyBatchAsync");
    return;
  }
#endif
  check(cuda.cuMemcpyAsync(target, source, num_bytes, stream_of(stream)), "cuMemcpyAsync");
}

void fill(uintptr_t target, int byte, size_t num_bytes, uintptr_t stream) {
  const Driver& cuda = driver_api();
  cuda.check(cuda.cuMemsetD8Async(target, static_cast<unsigned char>(byte), num_bytes, stream_of(stream)),
             "cuMemsetD8Async", std::to_string(num_bytes) + " bytes at " + address_text(target));
}

void stream_operations(uintptr_t stream, const std::vector<StreamOperation>& operations) {
  const Driver& cuda = driver_api();
  // All are looked at before the first is given to the driver.
  std::vector<CUstreamBatchMemOpParams> words;
  for (const StreamOperation& operation : operations) {
    if (const auto* word = std::get_if<WordOperation>(&operation)) {
      words.push_back(parameters(*word));
    } else if (const auto* copied = std::get_if<CopyOperation>(&operation)) {
      if (const std::string& name = std::get<0>(*copied); name != "copy")
        throw std::invalid_argument("operation \"" + name + "\" with three numbers: must be copy");
    } else if (const std::string& name = std::get<0>(std::get<OrderOperation>(operation));
               name != "after" && name != "before" && name != "record" && name != "await") {
      throw std::invalid_argument("operation \"" + name + "\" with one number: must be after, before, record or await");
    }
  }
  size_t word = 0;
  for (size_t first = 0; first < operations.size();) {
    if (const auto* copied = std::get_if<CopyOperation>(&operations[first])) {
      copy(std::get<1>(*copied), std::get<2>(*copied), std::get<3>(*copied), stream);
      first++;
      continue;
    }
    if (const auto* ordered = std::get_if<OrderOperation>(&operations[first])) {
      order(*ordered, stream_of(stream));
      first++;
      continue;
    }
    size_t count = 0;
    while (count < kMaxOperations && first + count < operations.size() &&
           std::holds_alternative<WordOperation>(operations[first + count]))
      count++;
    const CUresult result =
        cuda.cuStreamBatchMemOp(stream_of(stream), static_cast<unsigned>(count), words.data() + word, 0);
    if (result != CUDA_SUCCESS) {
      const auto& [name, address, value] = std::get<WordOperation>(operations[first]);
      cuda.check(result, "cuStreamBatchMemOp",
                 std::to_string(count) + " operations, the first " + name + " at " + address_text(address));
    }
    first += count;
    word += count;
  }
}

uint64_t compare_exchange(uintptr_t address, uint64_t expected, uint64_t desired) {
  __atomic_compare_exchange_n(reinterpret_cast<uint64_t*>(address), &expected, desired, false, __ATOMIC_SEQ_CST,
                              __ATOMIC_SEQ_CST);
  return expected;
}

uintptr_t current_context() {
  const Driver& cuda = driver_api();
  cuda.require_context();
  CUcontext context = nullptr;
  cuda.check(cuda.cuCtxGetCurrent(&context), "cuCtxGetCurrent");
  return reinterpret_cast<uintptr_t>(context);
}

void set_context(uintptr_t context) {
  const Driver& cuda = driver_api();
  cuda.check(cuda.cuCtxSetCurrent(reinterpret_cast<CUcontext>(context)), "cuCtxSetCurrent");
}

}  // namespace epv2
