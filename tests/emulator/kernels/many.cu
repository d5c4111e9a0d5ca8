// For the time that collectives take.
#include "emulator/device.h"
#include "emulator/kernels/args.h"

EPV2_KERNEL(many, TestArgs, 1024) {
  uint32_t value = threadIdx.x;
  for (int i = 0; i < args.count; i++) {
    value = __shfl_xor_sync(0xffffffff, value, 1 + i % 31);
    if (i % 4 == 0) __syncthreads();
  }
  reinterpret_cast<uint32_t*>(args.out)[blockIdx.x * blockDim.x + threadIdx.x] = value;
}
