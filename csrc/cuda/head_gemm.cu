// Launches head_kernel: tensor maps, shape, mode.
#include <algorithm>
#include <stdexcept>

#include "cuda/head_kernel.cuh"
#include "cuda/kernels.hpp"

namespace r1k {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// From the driver at run time: nothing links to libcuda.
Encode encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                         &found),
        "cudaGetDriverEntryPointByVersion");
  if (found != cudaDriverEntryPointSuccess || entry == nullptr)
    throw std::runtime_error("cudaGetDriverEntryPointByVersion: no cuTensorMapEncodeTiled");
  return reinterpret_cast<Encode>(entry);
}

// Boxes of box_rows x 64 bfloat16 of a matrix, 128-byte swizzle, zeros outside.
CUtensorMap tensor_map(Encode encode, const void* matrix, int rows, int columns, int64_t stride,
                       int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)};
  const cuuint64_t strides[] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[] = {64, cuuint32_t(box_rows)}, steps[] = {1, 1};
  const CUresult status =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes, strides,
             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(status));
  return map;
}

template <int kMode, bool kSoftcap, bool kEntropy>
void launch(const HeadProblem& p, int device, cudaStream_t stream) {
  const Encode encode = encoder();
  const CUtensorMap hidden =
      tensor_map(encode, p.hidden, p.C, p.D, p.hidden_stride, HeadShape::kTileC);
  const CUtensorMap weight =
      tensor_map(encode, p.weight, p.V, p.D, p.weight_stride, HeadShape::kTileV / p.cluster);
  auto ceil = [](int a, int b) { return (a + b - 1) / b; };
  HeadArgs args = {
      static_cast<const int64_t*>(p.targets),
      static_cast<const float*>(p.anchor),
      static_cast<const float*>(p.per_tau),
      static_cast<const float*>(p.bias),
      static_cast<const float*>(p.alpha),
      static_cast<const float*>(p.beta),
      static_cast<const float*>(p.centre),
      static_cast<uint16_t*>(p.out),
      static_cast<float*>(p.partial),
      p.C,
      p.V,
      ceil(p.D, HeadShape::kTileD),
      p.columns,
      p.scale,
      p.softcap,
      {ceil(p.C, HeadShape::kTileC * p.cluster), ceil(p.V, HeadShape::kTileV), p.group}};
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");

  const auto kernel = head_kernel<kMode, kSoftcap, kEntropy>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             HeadShape::kSharedBytes),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(p.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(p.cluster * std::min(processors / p.cluster, args.order.count()));
  config.blockDim = dim3(kHeadThreads);
  config.dynamicSmemBytes = HeadShape::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, hidden, weight, args), "cudaLaunchKernelEx");
  check(cudaGetLastError(), "head_kernel");
}

template <int kMode, bool kEntropy>
void pick_softcap(const HeadProblem& p, int device, cudaStream_t stream) {
  if (p.softcap > 0.0f)
    launch<kMode, true, kEntropy>(p, device, stream);
  else
    launch<kMode, false, kEntropy>(p, device, stream);
}

}  // namespace

void head_gemm(const HeadProblem& p, int device, cudaStream_t stream) {
  if (p.C < 1 || p.V < 1 || p.D < 1 || p.mode < kSums || p.mode > kGradient || p.group < 1 ||
      (p.cluster != 1 && p.cluster != 2))
    throw std::invalid_argument("head_gemm: C, V, D, mode, group or cluster out of range");
  check(cudaSetDevice(device), "cudaSetDevice");
  if (p.mode == kGradient)
    pick_softcap<kGradient, false>(p, device, stream);
  else if (p.mode == kStore && p.entropy)
    pick_softcap<kStore, true>(p, device, stream);
  else if (p.mode == kStore)
    pick_softcap<kStore, false>(p, device, stream);
  else if (p.entropy)
    pick_softcap<kSums, true>(p, device, stream);
  else
    pick_softcap<kSums, false>(p, device, stream);
}

}  // namespace r1k
