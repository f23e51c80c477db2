#define R1K_ISA generic
#include "glu_impl.hpp"
#include "kept_impl.hpp"

namespace r1k {
const Kernels kGeneric = {"generic",
                          generic::exp_tile,
                          generic::grad_tile,
                          generic::rescale_tile,
                          generic::token_forward,
                          generic::token_backward,
                          generic::kept_forward,
                          generic::kept_backward,
                          generic::kept_weight,
                          generic::glu_forward,
                          generic::glu_backward};
}
