// Memory that ranks have registered together: which bytes of whom, and where this process sees them.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <memory>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "meeting.h"

namespace epv2::rma {

class Region {
 public:
  // Collective, in the application's context; `own` is the one that reaches the memory. Throws Error, on every rank if on
  // one, where memory can't be registered; sets `problem` where a peer's can't be mapped. Memory that can't be shared at
  // all (NCCL's signals) is no error before somebody reads it.
  Region(Meeting& meeting, int ranks, int rank, uint32_t id, void* data, size_t size, int type, uint64_t flags,
         CUcontext own);
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // Bytes [offset, offset + size) of `rank`'s memory as the plugin's own context sees them. Throws Error: out of bounds,
  // or not shared.
  CUdeviceptr at(int rank, uint64_t offset, uint64_t size) const;

  const uint32_t id;
  char* const data;
  const size_t size;
  const bool on_host;
  std::string problem;
  // What the 8-byte words of this rank's memory hold, where nobody but this plugin writes them: a signal is then one
  // write. Empty where a kernel may reset them.
  std::vector<uint64_t> counts;

 private:
  struct Part {
    CUdeviceptr at = 0;
    size_t size = 0;
    CUdeviceptr mapped = 0;  // what has to be given back
    size_t mapped_bytes = 0;
    std::string why_not;

    Part() = default;
    ~Part();
    Part(const Part&) = delete;
  };

  Descriptor share(Note& note);
  void import(Part& part, const Letter& letter) const;
  void map(Part& part, CUmemGenericAllocationHandle handle, size_t bytes, size_t offset) const;

  const int rank_;
  const CUcontext own_;
  std::vector<Part> parts_;
};

// The regions of a communicator by number, for several threads. What `find` returns stays valid until `remove`.
class Regions {
 public:
  Region* find(uint32_t id) const;
  void add(std::unique_ptr<Region> region);
  void remove(uint32_t id);
  void clear();

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_map<uint32_t, std::unique_ptr<Region>> regions_;
};

}  // namespace epv2::rma
