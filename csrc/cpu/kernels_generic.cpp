#define R1K_ISA generic
#include "kernels_impl.hpp"

namespace r1k {
const Kernels kGeneric = {"generic",
                          generic::exp_tile,
                          generic::grad_tile,
                          generic::rescale_tile,
                          generic::token_forward,
                          generic::token_backward};
}
