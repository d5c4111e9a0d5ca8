// What kernels see of CUDA and of csrc/kernels/common/device.cuh when g++ compiles them (-DEPV2_EMULATE): the same
// names, with the meaning that the PTX manual gives them, run by the fibers of scheduler.cc. See README.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Of the fiber that runs; the scheduler sets the first two at every switch.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace epv2::emulator {

enum class Collective : int { syncwarp, shfl, shfl_xor, shfl_up, shfl_down, ballot, any, all, match_any };
enum class Atomic : int { add, bit_or, bit_and, maximum, minimum, exchange };
using Body = void (*)(const void* args);

uint64_t collective(Collective op, unsigned mask, uint64_t value, int parameter, int width);
uint64_t atomic(Atomic op, void* address, int bytes, bool is_signed, uint64_t value);
uint64_t compare_and_swap(void* address, int bytes, uint64_t expected, uint64_t desired);
void fence();
void bulk_wait(int groups, bool read_only);
int launch(const char* name, Body body, const void* args, uint64_t args_bytes, int max_threads, int ctas, int threads,
           int shared_bytes, uint64_t seed, char* message, int message_bytes);

template <typename T>
uint64_t to_bits(T value) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "4 or 8 bytes, as CUDA's");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
__forceinline__ T atomic(Atomic op, T* address, T value) {
  return from_bits<T>(atomic(op, address, sizeof(T), std::is_signed_v<T>, to_bits(value)));
}

// An argument that takes no part in deducing T, so that atomicAdd(&an_unsigned, 1) compiles as it does in CUDA.
template <typename T>
using Plain = std::type_identity_t<T>;

template <typename T>
concept Word = std::is_same_v<T, int> || std::is_same_v<T, unsigned>;
template <typename T>
concept WordOrLong = Word<T> || std::is_same_v<T, unsigned long long>;

}  // namespace epv2::emulator

// One fiber runs per CUDA thread; the launcher is what runtime.py calls.
#define EPV2_KERNEL(name, Args, max_threads)                                                                         \
  static void name##_body(const Args& args);                                                                         \
  extern "C" uint64_t name##_args_bytes() { return sizeof(Args); }                                                   \
  extern "C" int name##_launch(const Args* args, int ctas, int threads, int shared_bytes, uint64_t seed,             \
                               char* message, int message_bytes) {                                                   \
    return epv2::emulator::launch(                                                                                   \
        #name, [](const void* args) { name##_body(*static_cast<const Args*>(args)); }, args, sizeof(Args),           \
        max_threads, ctas, threads, shared_bytes, seed, message, message_bytes);                                     \
  }                                                                                                                  \
  static void name##_body([[maybe_unused]] const Args& args)

// Barriers and warp collectives.
void __syncthreads();
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) {
  epv2::emulator::collective(epv2::emulator::Collective::syncwarp, mask, 0, 0, 32);
}
template <typename T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  using namespace epv2::emulator;
  return from_bits<T>(collective(Collective::shfl, mask, to_bits(value), source, width));
}
template <typename T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  using namespace epv2::emulator;
  return from_bits<T>(collective(Collective::shfl_xor, mask, to_bits(value), lanes, width));
}
template <typename T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using namespace epv2::emulator;
  return from_bits<T>(collective(Collective::shfl_up, mask, to_bits(value), static_cast<int>(delta), width));
}
template <typename T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using namespace epv2::emulator;
  return from_bits<T>(collective(Collective::shfl_down, mask, to_bits(value), static_cast<int>(delta), width));
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  using namespace epv2::emulator;
  return static_cast<unsigned>(collective(Collective::ballot, mask, predicate != 0, 0, 32));
}
__forceinline__ int __any_sync(unsigned mask, int predicate) {
  using namespace epv2::emulator;
  return static_cast<int>(collective(Collective::any, mask, predicate != 0, 0, 32));
}
__forceinline__ int __all_sync(unsigned mask, int predicate) {
  using namespace epv2::emulator;
  return static_cast<int>(collective(Collective::all, mask, predicate != 0, 0, 32));
}
template <typename T>
__forceinline__ unsigned __match_any_sync(unsigned mask, T value) {
  using namespace epv2::emulator;
  return static_cast<unsigned>(collective(Collective::match_any, mask, to_bits(value), 0, 32));
}

// Atomics and fences.
template <epv2::emulator::WordOrLong T>
__forceinline__ T atomicAdd(T* address, epv2::emulator::Plain<T> value) {
  return epv2::emulator::atomic(epv2::emulator::Atomic::add, address, value);
}
template <epv2::emulator::Word T>
__forceinline__ T atomicOr(T* address, epv2::emulator::Plain<T> value) {
  return epv2::emulator::atomic(epv2::emulator::Atomic::bit_or, address, value);
}
template <epv2::emulator::Word T>
__forceinline__ T atomicAnd(T* address, epv2::emulator::Plain<T> value) {
  return epv2::emulator::atomic(epv2::emulator::Atomic::bit_and, address, value);
}
template <epv2::emulator::Word T>
__forceinline__ T atomicMax(T* address, epv2::emulator::Plain<T> value) {
  return epv2::emulator::atomic(epv2::emulator::Atomic::maximum, address, value);
}
template <epv2::emulator::Word T>
__forceinline__ T atomicMin(T* address, epv2::emulator::Plain<T> value) {
  return epv2::emulator::atomic(epv2::emulator::Atomic::minimum, address, value);
}
template <epv2::emulator::Word T>
__forceinline__ T atomicExch(T* address, epv2::emulator::Plain<T> value) {
  return epv2::emulator::atomic(epv2::emulator::Atomic::exchange, address, value);
}
template <epv2::emulator::WordOrLong T>
__forceinline__ T atomicCAS(T* address, epv2::emulator::Plain<T> expected, epv2::emulator::Plain<T> desired) {
  using namespace epv2::emulator;
  return from_bits<T>(compare_and_swap(address, sizeof(T), to_bits<T>(expected), to_bits<T>(desired)));
}
__forceinline__ void __threadfence() { epv2::emulator::fence(); }
__forceinline__ void __threadfence_system() { epv2::emulator::fence(); }
__forceinline__ void __threadfence_block() { epv2::emulator::fence(); }

// Arithmetic.
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
inline unsigned __float_as_uint(float x) { return epv2::emulator::from_bits<unsigned>(epv2::emulator::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return epv2::emulator::from_bits<float>(x); }
inline int __float_as_int(float x) { return epv2::emulator::from_bits<int>(epv2::emulator::to_bits(x)); }
inline float __int_as_float(int x) { return epv2::emulator::from_bits<float>(epv2::emulator::to_bits(x)); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

namespace epv2 {

uint8_t* shared_memory();
void barrier_sync(int id, int threads);

void mbarrier_init(uint64_t* bar, uint32_t arrivals);
void mbarrier_init_fence();
void mbarrier_arrive(uint64_t* bar);
void mbarrier_arrive_expect(uint64_t* bar, uint32_t bytes);
bool mbarrier_test(uint64_t* bar, uint32_t parity);
void mbarrier_wait(uint64_t* bar, uint32_t parity);

inline int keep(int value) { return value; }

class SharedPointer {
 public:
  explicit SharedPointer(const void* pointer) : at_(static_cast<const uint8_t*>(pointer)) {}
  void advance(int bytes) { at_ += bytes; }
  bool operator==(SharedPointer other) const { return at_ == other.at_; }
  uint64_t load_64(int offset) const { return *reinterpret_cast<const uint64_t*>(at_ + offset); }
  template <int offset>
  uint4 load_128() const {
    return *reinterpret_cast<const uint4*>(at_ + offset);
  }
  void wait(uint32_t parity) const { mbarrier_wait(barrier(0), parity); }
  void arrive(int offset) const { mbarrier_arrive(barrier(offset)); }

 private:
  uint64_t* barrier(int offset) const {
    return reinterpret_cast<uint64_t*>(const_cast<uint8_t*>(at_ + offset));
  }
  const uint8_t* at_;
};

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* bar);
void bulk_store(void* global, const void* shared, uint32_t bytes);
void bulk_commit();
template <int N>
__forceinline__ void bulk_wait_read() {
  static_assert(N >= 0);
  emulator::bulk_wait(N, true);
}
__forceinline__ void bulk_wait_all() { emulator::bulk_wait(0, false); }
void fence_proxy_async();
inline void fence_proxy_async_shared() { fence_proxy_async(); }

uint32_t load_acquire_system(const uint32_t* address);
void store_release_system(uint32_t* address, uint32_t value);
uint32_t atomic_add_acq_rel(uint32_t* address, uint32_t value);
uint32_t load_relaxed(const uint32_t* address);
inline void publish(uint32_t* word, uint32_t value) { store_release_system(word, value); }
inline uint32_t published(const uint32_t* word) { return load_acquire_system(word); }
__forceinline__ uint4 load_streaming(const void* address) { return *static_cast<const uint4*>(address); }
__forceinline__ void store_streaming(void* address, uint4 value) { *static_cast<uint4*>(address) = value; }
uint64_t global_nanoseconds();
void pause();
uint8_t* peer_pointer(uint64_t window, uint64_t offset, int peer);

struct Network {
  uint64_t communicator;
  int context;
  int rail;
};
void network_put(Network network, int peer, uint64_t window, uint64_t to, uint64_t from, uint32_t bytes);
void network_get(Network network, int peer, uint64_t window, uint64_t to, uint64_t from, uint32_t bytes);
void network_put_value(Network network, int peer, uint64_t window, uint64_t to, uint64_t value);
void network_signal(Network network, int peer, uint32_t signal, uint64_t value);
void network_signal_word(Network network, int peer, uint64_t window, uint64_t word, uint64_t value);
uint64_t network_signal_value(Network network, uint32_t signal);
void network_flush(Network network);
void network_abandon(Network network);
void network_leave(Network network);

namespace emulator {

// Round to nearest even into a sign, an exponent with `bias` and `mantissa` bits; no special values.
inline uint32_t encode(float magnitude, int mantissa, int bias) {
  if (magnitude == 0) return 0;
  const int exponent = std::max(std::ilogb(magnitude), 1 - bias);
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(double{magnitude}, mantissa - exponent)));
  return (static_cast<uint32_t>(exponent + bias - 1) << mantissa) + steps;
}

inline uint32_t to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t to_half(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  return sign | (std::isinf(x) ? 0x7c00 : std::min(encode(std::fabs(x), 10, 15), uint32_t{0x7c00}));
}
inline uint32_t to_e4m3(float x) {
  if (std::isnan(x)) return 0x7f;
  return (std::signbit(x) ? 0x80 : 0) | encode(std::fmin(std::fabs(x), 448.0f), 3, 7);
}
inline float from_half(uint32_t bits) {
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023, sign = (bits & 0x8000) << 16;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
  const float steps = static_cast<float>(exponent == 0 ? mantissa : 1024 + mantissa);
  const float magnitude = std::ldexp(steps, exponent == 0 ? -24 : static_cast<int>(exponent) - 25);
  return __uint_as_float(sign | __float_as_uint(magnitude));
}

}  // namespace emulator

inline float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
inline float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
inline float half_low(uint32_t pair) { return emulator::from_half(pair & 0xffff); }
inline float half_high(uint32_t pair) { return emulator::from_half(pair >> 16); }
inline uint32_t pack_bf16(float low, float high) { return emulator::to_bf16(low) | emulator::to_bf16(high) << 16; }
inline uint32_t pack_half(float low, float high) { return emulator::to_half(low) | emulator::to_half(high) << 16; }
inline double make_double(uint32_t low, uint32_t high) {
  const uint64_t bits = static_cast<uint64_t>(high) << 32 | low;
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t double_low(double value) { return static_cast<uint32_t>(emulator::to_bits(value)); }
inline uint32_t double_high(double value) { return static_cast<uint32_t>(emulator::to_bits(value) >> 32); }
inline uint32_t max_halves(uint32_t a, uint32_t b) {
  return std::max(a & 0xffffu, b & 0xffffu) | std::max(a >> 16, b >> 16) << 16;
}
inline uint32_t pack_e4m3x4(float a, float b, float c, float d) {
  using emulator::to_e4m3;
  return to_e4m3(a) | to_e4m3(b) << 8 | to_e4m3(c) << 16 | to_e4m3(d) << 24;
}

}  // namespace epv2
