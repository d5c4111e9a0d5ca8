#include "library.h"

#include <dlfcn.h>
#include <link.h>

namespace epv2 {

std::optional<Library> Library::loaded(const std::string& name) {
  void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) return std::nullopt;
  return Library(handle);
}

std::optional<Library> Library::open(const std::string& path, std::string& reason) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    reason = dlerror();
    return std::nullopt;
  }
  return Library(handle);
}

std::string Library::path() const {
  link_map* map = nullptr;
  if (dlinfo(handle_, RTLD_DI_LINKMAP, &map) != 0 || map == nullptr) return "unknown path";
  return map->l_name;
}

void* Library::find(const char* symbol) const { return dlsym(handle_, symbol); }

}  // namespace epv2
