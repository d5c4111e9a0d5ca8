// What the stand-ins for libnccl and libcuda share. They write each call to FAKE_LOG and behave as the environment says:
//   FAKE_FAIL=name[,name]   these functions fail
//   FAKE_LATE=name[,name]   these NCCL functions say "in progress", and are done when asked a third time
//   FAKE_NEVER=name[,name]  these NCCL functions say "in progress" for ever
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

inline const char* setting(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

inline bool listed(const char* variable, const char* name) {
  return ("," + std::string(setting(variable)) + ",").find("," + std::string(name) + ",") != std::string::npos;
}

inline void note(const char* format, ...) {
  std::FILE* file = std::fopen(setting("FAKE_LOG"), "a");
  if (file == nullptr) return;
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(file, format, arguments);
  va_end(arguments);
  std::fputc('\n', file);
  std::fclose(file);
}
