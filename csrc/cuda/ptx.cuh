// The instructions the kernels are written in. Shared memory is addressed by the 32-bit window
// address that PTX takes. Everything the kernels ask of the machine goes through here.
#pragma once
#include <cuda.h>
#include <cuda_fp16.h>

#include <cstdint>

#define R1K_DEVICE __device__ __forceinline__
#define R1K_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define R1K_KERNEL_SHARED(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define R1K_GRID_CONSTANT __grid_constant__

namespace r1k::ptx {

using TensorMap = CUtensorMap;

// Read anew at every call: what the compiler derives from it is then not kept in registers
// across the loop over tiles.
R1K_DEVICE int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
R1K_DEVICE int64_t block_index() { return blockIdx.x; }
R1K_DEVICE int64_t grid_size() { return gridDim.x; }

extern __shared__ __align__(128) unsigned char dynamic_shared[];
R1K_DEVICE unsigned char* shared_pointer() { return dynamic_shared; }
R1K_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

R1K_DEVICE void sync_block() { __syncthreads(); }
R1K_DEVICE bool any(bool value) { return __any_sync(0xffffffffu, value); }
template <class T>
R1K_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

R1K_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
R1K_DEVICE uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// Every thread of every block of the cluster; shared-memory writes before it are seen after it.
R1K_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
R1K_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

R1K_DEVICE uint32_t at_rank(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}
R1K_DEVICE double load_remote(uint32_t address, uint32_t rank) {
  double value;
  asm volatile("ld.shared::cluster.f64 %0, [%1];"
               : "=d"(value)
               : "r"(at_rank(address, rank))
               : "memory");
  return value;
}

R1K_DEVICE void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes the initialised barriers visible to the cluster and to the copy engine.
R1K_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Returns once the phase of that parity has completed.
R1K_DEVICE void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
R1K_DEVICE void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// On the barrier of another block of the cluster. For readers: it orders no memory of this block
// for the other (a release at cluster scope would be a fence of the whole GPU).
R1K_DEVICE void arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(at_rank(barrier, rank))
               : "memory");
}
R1K_DEVICE void arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}

// A box of the tensor at (column, row) into shared memory; its bytes count on `barrier`.
R1K_DEVICE void load_box(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}
// The same into every block of the cluster named in `ranks`, at the same addresses there.
R1K_DEVICE void load_box_to(uint32_t to, const TensorMap& map, int column, int row,
                            uint32_t barrier, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(ranks)
      : "memory");
}
R1K_DEVICE void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// Contiguous bytes; addresses and count are multiples of 16.
R1K_DEVICE void load_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

template <int kRegisters>
R1K_DEVICE void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
R1K_DEVICE void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Registers written before are seen by the products issued after.
R1K_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
R1K_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the last `kPending` committed groups are done.
template <int kPending>
R1K_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Nothing that is computed from `x` moves before this: the compiler does not know that products are
// asynchronous, and begun too early the arithmetic of an epilogue fills the registers.
R1K_DEVICE void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }

#define R1K_ACC4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R1K_ACC16(d, i) R1K_ACC4(d, i), R1K_ACC4(d, i + 4), R1K_ACC4(d, i + 8), R1K_ACC4(d, i + 12)
#define R1K_ACC64(d, i) \
  R1K_ACC16(d, i), R1K_ACC16(d, i + 16), R1K_ACC16(d, i + 32), R1K_ACC16(d, i + 48)

// acc = a b^T (+ acc): 64 rows, kWidth columns, 16 deep, both operands in shared memory along K.
R1K_DEVICE void product(float (&acc)[64], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, 0, 0;\n"
      "}"
      : R1K_ACC64(acc, 0)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
R1K_DEVICE void product(float (&acc)[128], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "
      "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "
      "%125, %126, %127}, "
      "%128, %129, p, 1, 1, 0, 0;\n"
      "}"
      : R1K_ACC64(acc, 0), R1K_ACC64(acc, 64)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

#undef R1K_ACC4
#undef R1K_ACC16
#undef R1K_ACC64

// Rounded operations that the compiler must not contract: every mode then gets the same bits.
R1K_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
R1K_DEVICE float sub(float a, float b) { return __fsub_rn(a, b); }
R1K_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
R1K_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
R1K_DEVICE float divide(float a, float b) { return __fdividef(a, b); }
R1K_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two bfloat16, `low` in the lower half.
R1K_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
R1K_DEVICE float bits(uint32_t word) { return __uint_as_float(word); }
R1K_DEVICE uint32_t bits(float value) { return __float_as_uint(value); }
R1K_DEVICE float from_half(uint16_t x) { return __half2float(__ushort_as_half(x)); }
R1K_DEVICE uint16_t to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }

}  // namespace r1k::ptx
