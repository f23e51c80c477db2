// Entry points of the CPU kernels: one table of functions per instruction set, chosen at import.
#pragma once

#include <cstdint>

namespace r1k {

enum class Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// What is left in a tile of logits after its statistics were taken.
enum class Store : int {
  kNothing = 0,  // the tile is scratch
  kExp = 1,      // exp(l - anchor), 0 in the target's column
  kLogit = 2,    // the transformed logit l
};

// l = softcap * tanh(scale * (z + bias) / softcap) / temperature, all in float32.
struct Transform {
  float logit_scale;
  float softcap;             // 0: none
  const float* temperature;  // [rows], or null for 1
};

struct ExpTile {
  float* tile;  // [rows, cols], row stride ld; logits in, `store` out
  int64_t rows, cols, ld;
  int64_t first_column;    // vocabulary index of the tile's first column
  const float* bias;       // [cols] of this tile, or null
  const int64_t* targets;  // [rows], vocabulary index
  Transform transform;
  Store store;
  bool entropy;
  float* anchor;     // [rows], in and out: raised when the tile tops it by more than kReanchor
  double* sum;       // [rows], in and out: sum of exp(l - anchor), target left out
  double* weighted;  // [rows], as sum, of exp(l - anchor) (l - anchor); only with entropy
};

// dL/dz_j = -k d_j p_j (logp_grad + ent_grad ((l_j - anchor) + centre))   off the target
//         = k d_j target_grad                                             on it
//
// with log p_j = (l_j - anchor) + shift, centre = shift + entropy, k = logit_scale / temperature
// and d_j the slope of the softcap. Differences come first, because a log-sum-exp of some size has
// lost the digits of p.
struct GradTile {
  float* tile;  // [rows, cols], row stride ld; logits (or transformed logits) in, gradients out
  int64_t rows, cols, ld;
  int64_t first_column;
  const float* bias;
  const int64_t* targets;
  Transform transform;
  bool transformed;          // the tile holds l already
  const float* anchor;       // [rows]
  const float* shift;        // [rows]
  const float* logp_grad;    // [rows]  gradient of logp minus that of lse
  const float* ent_grad;     // [rows]  or null
  const float* centre;       // [rows]  only with ent_grad
  const float* target_grad;  // [rows]  dL/dl of the target's column
};

struct TokenForward {
  const void* logits;  // [rows, vocab], row stride ld
  Dtype dtype;
  int64_t rows, vocab, ld;
  const int64_t* targets;  // negative: the row is not read and its outputs are 0
  Transform transform;
  bool entropy;
  double* logp;         // [rows] each
  double* entropy_out;  // only with entropy
  double* lse;
};

struct TokenBackward {
  const void* logits;
  void* grad;  // may be `logits`
  Dtype dtype;
  int64_t rows, vocab, ld, grad_ld;
  const int64_t* targets;
  Transform transform;
  const float* anchor;  // the rest as in GradTile
  const float* shift;
  const float* logp_grad;
  const float* ent_grad;
  const float* centre;
  const float* target_grad;
};

// A linear head whose row i keeps the entries ids[offsets[i]] to ids[offsets[i + 1] - 1] of the
// vocabulary (those not negative) and its target, which is not among them.
struct KeptHead {
  const void* hidden;  // [rows, width], row stride hidden_ld
  const void* weight;  // [vocab, width], row stride weight_ld
  Dtype dtype;
  int64_t rows, width, hidden_ld, weight_ld;
  const int32_t* ids;
  const int64_t* offsets;  // [rows + 1]
  const int64_t* targets;  // [rows]; negative: the row is not read
};

struct KeptForward {
  KeptHead head;
  const float* bias;  // [vocab], or null
  Transform transform;
  bool entropy;
  float* logits;  // transformed, one per id (-inf where it is negative), then one per target
  double* logp;   // [rows] each
  double* entropy_out;
  double* lse;
};

struct KeptBackward {
  KeptHead head;
  Transform transform;
  const float* logits;  // of KeptForward
  const float* anchor;  // the rest as in GradTile
  const float* shift;
  const float* logp_grad;
  const float* ent_grad;
  const float* centre;
  const float* target_grad;
  float* dlogits;  // of the logits before their transform, as `logits`
  void* dhidden;   // [rows, width] contiguous, or null
};

// Segment k, the places order[starts[k]] to order[starts[k + 1] - 1] among the dlogits, is of one
// vocabulary entry: that of KeptBackward's dlogits gathered into its row of the weight's gradient.
struct KeptWeight {
  const void* hidden;
  Dtype dtype;
  int64_t segments, width, hidden_ld;
  const int64_t* starts;  // [segments + 1]
  const int64_t* order;
  const int64_t* rows;  // of each place
  const int32_t* ids;   // [segments]
  const float* dlogits;
  void* dweight;  // [vocab, width] contiguous, or null
  Dtype weight_dtype;
  float* dbias;  // [vocab], or null
};

// The order is that of ACTIVATIONS in r1kernels/reference/glu.py.
enum class Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

// h = act(gate) * up of `count` elements, in place. Forward: gate becomes h. Backward: dh becomes
// h, gate and up their gradients.
struct Glu {
  void* dh;  // null in the forward
  void* gate;
  void* up;
  Dtype dtype;
  int64_t count;
  Activation activation;
};

struct Kernels {
  const char* isa;
  void (*exp_tile)(const ExpTile&, int threads);
  void (*grad_tile)(const GradTile&, int threads);
  void (*rescale_tile)(float* tile, int64_t rows, int64_t cols, int64_t ld, const float* factor,
                       int threads);
  void (*token_forward)(const TokenForward&, int threads);
  void (*token_backward)(const TokenBackward&, int threads);
  void (*kept_forward)(const KeptForward&, int threads);
  void (*kept_backward)(const KeptBackward&, int threads);
  void (*kept_weight)(const KeptWeight&, int threads);
  void (*glu_forward)(const Glu&, int threads);
  void (*glu_backward)(const Glu&, int threads);
};

extern const Kernels kGeneric;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace r1k
