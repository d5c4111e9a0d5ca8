// Arguments of the kernel behind transfers between nodes. Offsets are bytes of the window.
#pragma once
#include <cstdint>

struct NetworkPut {
  uint64_t target;  // in the peer's window
  uint64_t source;  // in this rank's
  uint64_t bytes;
  int32_t peer;
  int32_t unused;
};

struct NetworkSignal {
  uint64_t word;   // in the peer's window, of 64 bits
  uint64_t value;  // is added to it
  int32_t peer;
  int32_t unused;
};

struct SendArgs {
  uint64_t network;  // device communicator, see Network in common/device.cuh; FULL connections
  uint64_t window;
  NetworkPut puts[32];
  NetworkSignal signals[32];
  int32_t num_puts;
  int32_t num_signals;
};
