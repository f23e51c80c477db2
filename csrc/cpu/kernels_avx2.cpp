#define R1K_ISA avx2
#include "glu_impl.hpp"
#include "kept_impl.hpp"

namespace r1k {
const Kernels kAvx2 = {"avx2",
                       avx2::exp_tile,
                       avx2::grad_tile,
                       avx2::rescale_tile,
                       avx2::token_forward,
                       avx2::token_backward,
                       avx2::kept_forward,
                       avx2::kept_backward,
                       avx2::kept_weight,
                       avx2::glu_forward,
                       avx2::glu_backward};
}
