// What kernels use of the machine, behind names: every PTX instruction and intrinsic of ours is here.
// With EPV2_EMULATE the same names come from tests/emulator/device.h, which runs kernels on a CPU.
#pragma once

#ifdef EPV2_EMULATE
#include "emulator/device.h"
#else

#include <cstdint>

#include <cuda_fp16.h>
#include <nccl_device.h>

#define EPV2_KERNEL(name, Args, max_threads) \
  extern "C" __global__ void __launch_bounds__(max_threads, 1) name(const __grid_constant__ Args args)

namespace epv2 {

// ---- dynamic shared memory ------------------------------------------------------------------------------------

__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ __align__(128) uint8_t memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- mbarriers and bulk copies (PTX ISA, "cp.async.bulk") -----------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint64_t* bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// The same for shared memory alone, which is all that ordinary reads before a bulk load need.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  fence_proxy_async();
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ bool mbarrier_test(uint32_t bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ bool mbarrier_test(uint64_t* bar, uint32_t parity) {
  return mbarrier_test(shared_address(bar), parity);
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* bar, uint32_t parity) {
  while (!mbarrier_test(bar, parity)) {
  }
}

// All lanes: a value that stays in its register. The compiler works out again, at every use, what it thinks is cheap, but
// not what it asked of another lane.
__device__ __forceinline__ int keep(int value) { return __shfl_sync(0xffffffffu, value, threadIdx.x % 32); }

// An address in shared memory, likewise, for a loop in which each instruction counts.
class SharedPointer {
 public:
  __device__ explicit SharedPointer(const void* pointer) : at_(keep(static_cast<int>(shared_address(pointer)))) {}

  __device__ __forceinline__ void advance(int bytes) { at_ += bytes; }
  __device__ __forceinline__ bool operator==(SharedPointer other) const { return at_ == other.at_; }

  __device__ __forceinline__ uint64_t load_64(int offset) const {
    uint64_t value;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(value) : "r"(at_ + offset) : "memory");
    return value;
  }
  template <int offset>
  __device__ __forceinline__ uint4 load_128() const {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at_), "n"(offset)
                 : "memory");
    return v;
  }

  // It points to an mbarrier.
  __device__ __forceinline__ void wait(uint32_t parity) const {
    while (!mbarrier_test(static_cast<uint32_t>(at_), parity)) {
    }
  }
  __device__ __forceinline__ void arrive(int offset) const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at_ + offset) : "memory");
  }

 private:
  int at_;
};

__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}

__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Wait until all but this thread's N newest groups have read their shared memory.
template <int N>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void bulk_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// ---- memory order and access ----------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t load_acquire_system(const uint32_t* pointer) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
  return value;
}

__device__ __forceinline__ void store_release_system(uint32_t* pointer, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}

// A word of shared memory that says what its writer has done, to threads of the same CTA.
__device__ __forceinline__ void publish(uint32_t* word, uint32_t value) {
  asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(shared_address(word)), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t published(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];" : "=r"(value) : "r"(shared_address(word)) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* pointer) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t atomic_add_acq_rel(uint32_t* pointer, uint32_t value) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(pointer), "r"(value) : "memory");
  return old;
}

// 16 bytes that nobody reads again soon: kept out of L1.
__device__ __forceinline__ uint4 load_streaming(const void* pointer) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(pointer));
  return v;
}

__device__ __forceinline__ void store_streaming(void* pointer, uint4 v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// Address of byte `offset` of the window of a rank of this node; `peer` is its index in the LSA team.
__device__ __forceinline__ uint8_t* peer_pointer(uint64_t window, uint64_t offset, int peer) {
  return static_cast<uint8_t*>(ncclGetLsaPointer(reinterpret_cast<ncclWindow_t>(window), offset, peer));
}

// ---- the network ----------------------------------------------------------------------------------------------

// A way to ranks of other nodes. The functions below are for one thread, but for `network_flush`; `peer` is a rank of the
// group, offsets are bytes in `window`, of this rank (`from`) and of the peer (`to`).
struct Network {
  uint64_t communicator;  // address of an ncclDevComm in device memory
  int context;            // of the communicator; a signal with the same number in another context is another signal
  int rail;               // 1: RAIL connections, which lead to ranks of the same LSA rank; 0: FULL connections
};

// Calls are not inlined: NCCL's three backends behind each take up to 200 registers, and kernels have many.
struct NetworkPeer {
  ncclGin gin;
  ncclTeam team;
  int index;  // in `team`

  __device__ __forceinline__ NetworkPeer(const Network& network, int peer)
      : gin(communicator(network), network.context),
        team(network.rail != 0 ? ncclTeamRail(gin.comm) : ncclTeamWorld(gin.comm)),
        index(network.rail != 0 ? peer / gin.comm.lsaSize : peer) {}

  static __device__ __forceinline__ const ncclDevComm& communicator(const Network& network) {
    return *reinterpret_cast<const ncclDevComm*>(network.communicator);
  }
};

// What this thread has read and written, or seen of other threads, is done before what it gives the network next. Not
// left to NCCL: what that does instead needs local memory in one of its backends.
constexpr cuda::thread_scope kReleased = cuda::thread_scope_system;
__device__ __forceinline__ void release_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Copy from this rank's window into the peer's, at any time: after other puts, or in parts.
static __device__ __noinline__ void network_put(Network network, int peer, uint64_t window, uint64_t to, uint64_t from,
                                            uint32_t bytes) {
  const NetworkPeer at(network, peer);
  const auto memory = reinterpret_cast<ncclWindow_t>(window);
  release_system();
  at.gin.put(at.team, at.index, memory, to, memory, from, bytes, ncclGin_None{}, ncclGin_None{}, ncclCoopThread{},
             ncclGin_None{}, kReleased, kReleased);
}

// Copy from the peer's window into this rank's, at any time before a flush ends; no signal waits for it.
static __device__ __noinline__ void network_get(Network network, int peer, uint64_t window, uint64_t to, uint64_t from,
                                            uint32_t bytes) {
  const NetworkPeer at(network, peer);
  const auto memory = reinterpret_cast<ncclWindow_t>(window);
  release_system();  // what was read of the destination, too
  at.gin.get(at.team, at.index, memory, from, memory, to, bytes, ncclCoopThread{});
}

// As network_put for 8 bytes that need no source; `to` is a multiple of 8.
static __device__ __noinline__ void network_put_value(Network network, int peer, uint64_t window, uint64_t to,
                                                  uint64_t value) {
  const NetworkPeer at(network, peer);
  release_system();
  at.gin.putValue(at.team, at.index, reinterpret_cast<ncclWindow_t>(window), to, value, ncclGin_None{},
                  ncclCoopThread{}, ncclGin_None{}, kReleased, kReleased);
}

// Add to the peer's signal, after all that was put to it in this context before.
static __device__ __noinline__ void network_signal(Network network, int peer, uint32_t signal, uint64_t value) {
  const NetworkPeer at(network, peer);
  release_system();
  at.gin.signal(at.team, at.index, ncclGin_StrongSignalAdd{signal, value}, ncclCoopThread{}, ncclGin_None{}, kReleased,
                kReleased);
}

// Likewise to a word of 64 bits in the peer's window, at a multiple of 8 bytes: a stream can wait for it.
static __device__ __noinline__ void network_signal_word(Network network, int peer, uint64_t window, uint64_t word,
                                                        uint64_t value) {
  const NetworkPeer at(network, peer);
  release_system();
  at.gin.signal(at.team, at.index, ncclGin_StrongVASignalAdd{reinterpret_cast<ncclWindow_t>(window), word, value},
                ncclCoopThread{}, ncclGin_None{}, kReleased, kReleased);
}

// This rank's signal. What was put before it was added to may be read then.
static __device__ __noinline__ uint64_t network_signal_value(Network network, uint32_t signal) {
  return ncclGin(NetworkPeer::communicator(network), network.context).readSignal(signal);
}

// All threads of the CTA: the sources of all that it has put in this context may be written again (the data may not be
// there yet), and what it has got in this context is here. Where a peer is gone it may have no end, or (GDAKI, which drops
// the error of its queue) one as if all were well.
__device__ __forceinline__ void network_flush(Network network) {
  ncclGin(NetworkPeer::communicator(network), network.context).flush(ncclCoopCta{});
}

// One thread, instead of a flush, where what was put need not arrive as it was.
__device__ __forceinline__ void network_abandon(Network) {}

// One thread, instead of a flush, where nobody writes to the sources before the peers have said that all is there: the
// kernel may end while the network is at work.
__device__ __forceinline__ void network_leave(Network) {}

// ---- time -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint64_t global_nanoseconds() {
  uint64_t value;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value));
  return value;
}

__device__ __forceinline__ void pause() { __nanosleep(64); }

// ---- number formats -------------------------------------------------------------------------------------------

__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float half_low(uint32_t pair) { return __half2float(__ushort_as_half(pair & 0xffff)); }
__device__ __forceinline__ float half_high(uint32_t pair) { return __half2float(__ushort_as_half(pair >> 16)); }

__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// A double of its lower and upper half, and back.
__device__ __forceinline__ double make_double(uint32_t low, uint32_t high) { return __hiloint2double(high, low); }
__device__ __forceinline__ uint32_t double_low(double value) { return __double2loint(value); }
__device__ __forceinline__ uint32_t double_high(double value) { return __double2hiint(value); }

// Larger of each half of two pairs of magnitudes: as unsigned integers, 16-bit floats are in the same order, NaN last.
__device__ __forceinline__ uint32_t max_halves(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }

// Four e4m3 values, `a` in the lowest byte; too large becomes +-448.
__device__ __forceinline__ uint32_t pack_e4m3x4(float a, float b, float c, float d) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return low | static_cast<uint32_t>(high) << 16;
}

}  // namespace epv2

#endif  // EPV2_EMULATE

namespace epv2 {

constexpr int kWarp = 32;

}  // namespace epv2
