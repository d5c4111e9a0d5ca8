// in: floats; out: per float one word each of bf16, half and e4m3 pairs, and what half and bf16 give back.
#include "emulator/device.h"
#include "emulator/kernels/args.h"

EPV2_KERNEL(convert, TestArgs, 1024) {
  const auto* in = reinterpret_cast<const float*>(args.in);
  auto* out = reinterpret_cast<uint32_t*>(args.out);
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < static_cast<unsigned>(args.count);
       i += gridDim.x * blockDim.x) {
    const float x = in[i];
    const uint32_t bf16 = epv2::pack_bf16(x, -x), half = epv2::pack_half(-x, x);
    out[i * 7] = bf16;
    out[i * 7 + 1] = half;
    out[i * 7 + 2] = epv2::pack_e4m3x4(x, -x, 1.0f, x);
    out[i * 7 + 3] = __float_as_uint(epv2::bf16_low(bf16));
    out[i * 7 + 4] = __float_as_uint(epv2::bf16_high(bf16));
    out[i * 7 + 5] = __float_as_uint(epv2::half_low(half));
    out[i * 7 + 6] = __float_as_uint(epv2::half_high(half));
  }
}
