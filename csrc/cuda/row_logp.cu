// Launches the row kernels.
#include <limits>
#include <stdexcept>

#include "cuda/kernels.hpp"
#include "cuda/row_kernel.cuh"

namespace r1k {
namespace {

RowArgs arguments(const RowProblem& p) {
  return {p.logits,
          p.out,
          p.rows,
          p.vocab,
          p.stride,
          p.out_stride,
          static_cast<const int64_t*>(p.targets),
          static_cast<const float*>(p.per_tau),
          p.scale,
          p.softcap,
          p.entropy,
          static_cast<const float*>(p.dlogp),
          static_cast<const float*>(p.dentropy),
          static_cast<const float*>(p.dlse),
          static_cast<double*>(p.logp),
          static_cast<double*>(p.entropy_out),
          static_cast<double*>(p.lse),
          static_cast<const float*>(p.anchor),
          static_cast<const float*>(p.alpha),
          static_cast<const float*>(p.beta),
          static_cast<const float*>(p.at_target)};
}

dim3 grid_of(int64_t rows, int64_t blocks) {
  if (rows < 1 || blocks < 1 || rows > std::numeric_limits<int>::max() / blocks)
    throw std::invalid_argument("row kernels: no rows, or too many");
  return dim3(static_cast<unsigned>(rows * blocks));
}

template <class T, bool kSoftcap, bool kWrite>
void forward(const RowProblem& p, int cluster, cudaStream_t stream) {
  const auto kernel = row_forward_kernel<T, kSoftcap, kWrite>;
  const int shared = row_shared_bytes(p.vocab, p.dtype, cluster);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid_of(p.rows, cluster);
  config.blockDim = dim3(kRowThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments(p)), "cudaLaunchKernelEx");
  check(cudaGetLastError(), "row_forward_kernel");
}

template <class T>
void pick_forward(const RowProblem& p, int cluster, cudaStream_t stream) {
  if (p.softcap > 0.0f)
    p.out == nullptr ? forward<T, true, false>(p, cluster, stream)
                     : forward<T, true, true>(p, cluster, stream);
  else
    p.out == nullptr ? forward<T, false, false>(p, cluster, stream)
                     : forward<T, false, true>(p, cluster, stream);
}

template <class T>
void backward(const RowProblem& p, cudaStream_t stream) {
  const dim3 grid = grid_of(p.rows, row_blocks(p.vocab, T::kPerUnit));
  if (p.softcap > 0.0f)
    row_backward_kernel<T, true><<<grid, kRowThreads, 0, stream>>>(arguments(p));
  else
    row_backward_kernel<T, false><<<grid, kRowThreads, 0, stream>>>(arguments(p));
  check(cudaGetLastError(), "row_backward_kernel");
}

}  // namespace

int row_shared_bytes(int64_t vocab, int dtype, int cluster) {
  const int64_t units = vocab / (dtype == 0 ? 4 : 8);
  return static_cast<int>((units + cluster - 1) / cluster * 16 + sizeof(RowShared));
}

void row_forward(const RowProblem& p, int cluster, int device, cudaStream_t stream) {
  check(cudaSetDevice(device), "cudaSetDevice");
  if (p.dtype == 0)
    pick_forward<Float>(p, cluster, stream);
  else if (p.dtype == 1)
    pick_forward<Bf16>(p, cluster, stream);
  else
    pick_forward<Half>(p, cluster, stream);
}

void row_backward(const RowProblem& p, int device, cudaStream_t stream) {
  check(cudaSetDevice(device), "cudaSetDevice");
  if (p.dtype == 0)
    backward<Float>(p, stream);
  else if (p.dtype == 1)
    backward<Bf16>(p, stream);
  else
    backward<Half>(p, stream);
}

}  // namespace r1k
