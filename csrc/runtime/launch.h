// Device code loaded and launched through the driver, and host memory that it can read and write.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace epv2 {

class Function;

class Module : public std::enable_shared_from_this<Module> {
 public:
  // Load a cubin into the current context.
  static std::shared_ptr<Module> load(const std::string& cubin);
  ~Module();
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  std::shared_ptr<Function> function(const std::string& name);

 private:
  explicit Module(CUmodule module) : module_(module) {}
  CUmodule module_;
};

struct LaunchShape {
  int64_t grid, block, shared_bytes, cluster;
  bool programmatic;
};

// A kernel that takes one struct by value.
class Function {
 public:
  Function(std::shared_ptr<Module> module, CUfunction function, std::string name);

  void launch(const LaunchShape& shape, uintptr_t stream, std::string_view args) const;

  const std::string name;
  int registers = 0, static_shared_bytes = 0, local_bytes = 0, max_threads = 0, max_dynamic_shared_bytes = 0;
  size_t args_bytes = 0;

 private:
  int attribute(CUfunction_attribute which) const;
  void check_shape(const LaunchShape& shape, std::string_view args) const;

  const std::shared_ptr<Module> module_;
  const CUfunction function_;
};

class Mapped {
 public:
  explicit Mapped(size_t num_bytes);
  ~Mapped();
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;

  void close();
  uintptr_t host_pointer() const { return reinterpret_cast<uintptr_t>(host_); }
  uintptr_t pointer() const { return static_cast<uintptr_t>(device_); }
  size_t num_bytes() const { return num_bytes_; }

 private:
  size_t num_bytes_;
  void* host_ = nullptr;
  CUdeviceptr device_ = 0;
};

// Memory of a file, which other processes may map, too.
class SharedMapped {
 public:
  SharedMapped(int file, size_t num_bytes);
  ~SharedMapped();
  SharedMapped(const SharedMapped&) = delete;
  SharedMapped& operator=(const SharedMapped&) = delete;

  void close();
  uintptr_t pointer() const { return static_cast<uintptr_t>(device_); }
  uintptr_t host_pointer() const { return reinterpret_cast<uintptr_t>(host_); }
  size_t num_bytes() const { return num_bytes_; }

 private:
  size_t num_bytes_;
  void* host_ = nullptr;
  CUdeviceptr device_ = 0;
};

}  // namespace epv2
