// What bindings_cuda.cu calls. Pointers are device addresses; everything runs on `stream` of
// `device`. A failed call throws std::runtime_error with the call's name and the driver's words.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

namespace r1k {

// Throws unless `status` is success.
void check(cudaError_t status, const char* call);

// Why this build cannot run on `device`, or "".
std::string refusal(int device);

struct HeadProblem {
  const void *hidden, *weight;           // bfloat16 [C, D], [V, D]
  int64_t hidden_stride, weight_stride;  // elements
  const void *targets, *anchor, *per_tau, *bias, *alpha, *beta, *centre;
  void *out, *partial;
  int C, V, D;
  int64_t columns;
  float scale, softcap;
  int mode;
  bool entropy;
  int cluster, group;
};
void head_gemm(const HeadProblem& problem, int device, cudaStream_t stream);

struct RowProblem {
  void* logits;  // [rows, vocab], rows 16-byte aligned
  void* out;     // where dlogits go; null: statistics only
  int dtype;     // 0 float32, 1 bfloat16, 2 float16
  int64_t rows, vocab, stride, out_stride;
  const void *targets, *per_tau;
  float scale, softcap;
  bool entropy;
  const void *dlogp, *dentropy, *dlse;     // float32 [rows] or null: upstream gradients
  void *logp, *entropy_out, *lse;          // float64 [rows]
  const void *anchor, *alpha, *beta, *at_target;  // float32 [rows]: row_backward
};
// Statistics of every row, and with `out` its gradient from one read of the row.
void row_forward(const RowProblem& problem, int cluster, int device, cudaStream_t stream);
// The gradient from statistics known before: anchor, alpha, beta, at_target.
void row_backward(const RowProblem& problem, int device, cudaStream_t stream);
// Bytes of shared memory of a block of row_forward.
int row_shared_bytes(int64_t vocab, int dtype, int cluster);

}  // namespace r1k
