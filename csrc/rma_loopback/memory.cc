#include "memory.h"

#include <cstring>
#include <mutex>

#include "../runtime/error.h"
#include "driver.h"

namespace epv2::rma {
namespace {

// A mapping keeps the memory: a handle need not be kept longer than it takes to map it.
struct Retained {
  explicit Retained(CUmemGenericAllocationHandle handle) : handle(handle) {}
  ~Retained() { driver().cuMemRelease(handle); }
  Retained(const Retained&) = delete;
  Retained& operator=(const Retained&) = delete;
  const CUmemGenericAllocationHandle handle;
};

}  // namespace

Region::Region(Meeting& meeting, int ranks, int rank, uint32_t id, void* data, size_t size, int type, uint64_t flags,
               CUcontext own)
    : id(id),
      data(static_cast<char*>(data)),
      size(size),
      on_host(type == kHostMemory),
      rank_(rank),
      own_(own),
      parts_(ranks) {
  const Driver& cuda = driver();
  Note note;
  note.id = id;
  note.size = size;
  Descriptor mine;
  try {
    if (type != kHostMemory && type != kCudaMemory)
      throw Error("memory of type " + std::to_string(type) + ": must be 1 (host) or 2 (CUDA)");
    if (data == nullptr || size == 0) throw Error("a region of 0 bytes, or at no address");
    if (!on_host && (flags & kNeverReset) != 0) {
      // On the legacy stream, behind NCCL's own clearing of these words.
      counts.resize(size / sizeof(uint64_t));
      if (!counts.empty())
        cuda.check(cuda.cuMemcpyDtoH(counts.data(), reinterpret_cast<CUdeviceptr>(data), counts.size() * 8),
                   "cuMemcpyDtoH", "reading signals");
    }
    if (!on_host) mine = share(note);
  } catch (const Error& error) {
    note.failed = 1;
    note.say(error.what());
  }
  const std::vector<Letter> letters = meeting.exchange(note, mine.get());
  try {
    for (int peer = 0; peer < ranks; peer++) {
      const Note& other = letters[peer].note;
      if (other.id != id)
        throw Error(meeting.name(peer) + " registers memory for the " + std::to_string(other.id + 1) +
                    ". time, this rank for the " + std::to_string(id + 1) + ".: the ranks make different calls");
      Part& part = parts_[peer];
      part.size = other.size;
      part.why_not = other.text;
      if (peer == rank && on_host) part.at = reinterpret_cast<CUdeviceptr>(data);
      if (peer != rank && letters[peer].descriptor.open()) import(part, letters[peer]);
    }
  } catch (const Error& error) {
    problem = error.what();
  }
}

Region::Part::~Part() {
  if (mapped == 0) return;
  driver().cuMemUnmap(mapped, mapped_bytes);
  driver().cuMemAddressFree(mapped, mapped_bytes);
}

// Map this rank's memory in the plugin's own context, and a descriptor of it for the others, if there can be one.
Descriptor Region::share(Note& note) {
  const Driver& cuda = driver();
  const auto pointer = reinterpret_cast<CUdeviceptr>(data);
  CUmemGenericAllocationHandle handle = 0;
  CUdeviceptr base = 0;
  size_t range = 0;
  int number = -1;
  cuda.check(cuda.cuMemRetainAllocationHandle(&handle, data), "cuMemRetainAllocationHandle",
             "memory that NCCL did not allocate by itself");
  const Retained retained(handle);
  cuda.check(cuda.cuMemGetAddressRange(&base, &range, pointer), "cuMemGetAddressRange");
  if (size > range - (pointer - base))
    throw Error("a region of " + std::to_string(size) + " bytes in an allocation with " +
                std::to_string(range - (pointer - base)) + " from there on");
  map(parts_[rank_], handle, range, pointer - base);
  try {
    cuda.check(cuda.cuMemExportToShareableHandle(&number, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
               "cuMemExportToShareableHandle");
  } catch (const Error& error) {
    note.say(error.what());
    return Descriptor();
  }
  note.offset = pointer - base;
  note.mapped = range;
  return Descriptor(number);
}

void Region::import(Part& part, const Letter& letter) const {
  const Driver& cuda = driver();
  CUmemGenericAllocationHandle handle = 0;
  const auto number = reinterpret_cast<void*>(static_cast<uintptr_t>(letter.descriptor.get()));
  cuda.check(cuda.cuMemImportFromShareableHandle(&handle, number, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
             "cuMemImportFromShareableHandle");
  const Retained retained(handle);
  map(part, handle, letter.note.mapped, letter.note.offset);
}

void Region::map(Part& part, CUmemGenericAllocationHandle handle, size_t bytes, size_t offset) const {
  const Driver& cuda = driver();
  const WithContext current(own_);
  CUdevice device = 0;
  cuda.check(cuda.cuCtxGetDevice(&device), "cuCtxGetDevice");
  CUdeviceptr at = 0;
  CUresult result = cuda.cuMemAddressReserve(&at, bytes, 0, 0, 0);
  const char* call = "cuMemAddressReserve";
  bool is_mapped = false;
  if (result == CUDA_SUCCESS) {
    call = "cuMemMap";
    result = cuda.cuMemMap(at, bytes, 0, handle, 0);
    is_mapped = result == CUDA_SUCCESS;
  }
  if (is_mapped) {
    CUmemAccessDesc access = {};
    access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access.location.id = device;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    call = "cuMemSetAccess";
    result = cuda.cuMemSetAccess(at, bytes, &access, 1);
  }
  if (result != CUDA_SUCCESS) {
    if (is_mapped) cuda.cuMemUnmap(at, bytes);
    if (at != 0) cuda.cuMemAddressFree(at, bytes);
    cuda.check(result, call, std::to_string(bytes) + " bytes of registered memory");
  }
  part.mapped = at;
  part.mapped_bytes = bytes;
  part.at = at + offset;
}

CUdeviceptr Region::at(int rank, uint64_t offset, uint64_t bytes) const {
  const Part& part = parts_[rank];
  if (offset > part.size || bytes > part.size - offset)
    throw Error("bytes " + std::to_string(offset) + " to " + std::to_string(offset + bytes) + " of region " +
                std::to_string(id) + ", which has " + std::to_string(part.size) + " bytes on rank " +
                std::to_string(rank));
  if (part.at == 0)
    throw Error("region " + std::to_string(id) + " of rank " + std::to_string(rank) +
                " is not shared between processes" + (part.why_not.empty() ? "" : " (" + part.why_not + ")"));
  return part.at + offset;
}

Region* Regions::find(uint32_t id) const {
  std::shared_lock<std::shared_mutex> lock(mutex_);
  const auto found = regions_.find(id);
  return found == regions_.end() ? nullptr : found->second.get();
}

void Regions::add(std::unique_ptr<Region> region) {
  std::lock_guard<std::shared_mutex> lock(mutex_);
  regions_[region->id] = std::move(region);
}

void Regions::remove(uint32_t id) {
  std::lock_guard<std::shared_mutex> lock(mutex_);
  regions_.erase(id);
}

void Regions::clear() {
  std::lock_guard<std::shared_mutex> lock(mutex_);
  regions_.clear();
}

}  // namespace epv2::rma
