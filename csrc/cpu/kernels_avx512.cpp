#define R1K_ISA avx512
#include "glu_impl.hpp"
#include "kept_impl.hpp"

namespace r1k {
const Kernels kAvx512 = {"avx512",
                         avx512::exp_tile,
                         avx512::grad_tile,
                         avx512::rescale_tile,
                         avx512::token_forward,
                         avx512::token_backward,
                         avx512::kept_forward,
                         avx512::kept_backward,
                         avx512::kept_weight,
                         avx512::glu_forward,
                         avx512::glu_backward};
}
