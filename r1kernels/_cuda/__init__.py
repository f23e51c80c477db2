"""Hand-written CUDA kernels, where they beat Triton on measurement. None has done so yet."""
