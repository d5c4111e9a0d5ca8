// Shared libraries found at run time: this module links to none of NCCL, libcuda and libcudart.
#pragma once

#include <optional>
#include <string>

namespace epv2 {

// A loaded library; it stays loaded until the process ends, as others in it hold on to it, too.
class Library {
 public:
  // The library of this name that the process has loaded already, whoever did.
  static std::optional<Library> loaded(const std::string& name);
  // Load by path, or by name as the dynamic loader searches; on failure `reason` says why.
  static std::optional<Library> open(const std::string& path, std::string& reason);

  // Where it lies in the file system.
  std::string path() const;
  // Address of a symbol; nullptr if the library has none of that name.
  void* find(const char* symbol) const;

 private:
  explicit Library(void* handle) : handle_(handle) {}
  void* handle_;
};

}  // namespace epv2
