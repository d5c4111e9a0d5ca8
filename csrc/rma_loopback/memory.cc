#include "memory.h"

#include <cstring>
#include <mutex>

#include "../runtime/error.h"
#include "driver.h"

namespace epv2::rma {

Region::Region(Meeting& meeting, int ranks, int rank, uint32_t id, void* data, size_t size, int type, uint64_t flags)
    : id(id), data(static_cast<char*>(data)), size(size), on_host(type == kHostMemory), rank_(rank), parts_(ranks) {
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
      if (peer == rank) part.at = reinterpret_cast<CUdeviceptr>(data);
      if (peer != rank && letters[peer].descriptor.open()) map(part, letters[peer]);
    }
  } catch (const Error& error) {
    problem = error.what();
  }
}

Region::~Region() {
  for (Part& part : parts_) {
    if (part.mapped == 0) continue;
    driver().cuMemUnmap(part.mapped, part.mapped_bytes);
    driver().cuMemAddressFree(part.mapped, part.mapped_bytes);
  }
}

Descriptor Region::share(Note& note) const {
  const Driver& cuda = driver();
  CUmemGenericAllocationHandle handle = 0;
  CUdeviceptr base = 0;
  size_t range = 0;
  int number = -1;
  const auto pointer = reinterpret_cast<CUdeviceptr>(data);
  try {
    cuda.check(cuda.cuMemRetainAllocationHandle(&handle, data), "cuMemRetainAllocationHandle");
    const CUresult found = cuda.cuMemGetAddressRange(&base, &range, pointer);
    const CUresult exported = found != CUDA_SUCCESS ? found
                                                    : cuda.cuMemExportToShareableHandle(
                                                          &number, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    cuda.cuMemRelease(handle);
    cuda.check(exported, found != CUDA_SUCCESS ? "cuMemGetAddressRange" : "cuMemExportToShareableHandle");
  } catch (const Error& error) {
    note.say(error.what());
    return Descriptor();
  }
  note.offset = pointer - base;
  note.mapped = range;
  return Descriptor(number);
}

void Region::map(Part& part, const Letter& letter) const {
  const Driver& cuda = driver();
  CUmemGenericAllocationHandle handle = 0;
  CUdevice device = 0;
  cuda.check(cuda.cuCtxGetDevice(&device), "cuCtxGetDevice");
  const auto number = reinterpret_cast<void*>(static_cast<uintptr_t>(letter.descriptor.get()));
  cuda.check(cuda.cuMemImportFromShareableHandle(&handle, number, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
             "cuMemImportFromShareableHandle");
  const size_t bytes = letter.note.mapped;
  CUdeviceptr at = 0;
  CUresult result = cuda.cuMemAddressReserve(&at, bytes, 0, 0, 0);
  const char* call = "cuMemAddressReserve";
  bool is_mapped = false;
  if (result == CUDA_SUCCESS) {
    call = "cuMemMap";
    result = cuda.cuMemMap(at, bytes, 0, handle, 0);
    is_mapped = result == CUDA_SUCCESS;
  }
  cuda.cuMemRelease(handle);  // the mapping keeps the memory
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
    cuda.check(result, call, std::to_string(bytes) + " bytes of another process");
  }
  part.mapped = at;
  part.mapped_bytes = bytes;
  part.at = at + letter.note.offset;
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
