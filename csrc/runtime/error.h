// Errors that Python sees. std::invalid_argument becomes ValueError; the ones here become _C.Error.
#pragma once

#include <stdexcept>
#include <string>

namespace epv2 {

class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// NCCL did not finish within the communicator's timeout.
class TimedOut : public Error {
  using Error::Error;
};

}  // namespace epv2
