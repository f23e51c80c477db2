"""Hand-written CUDA kernels for sm_90a; they run when asked for by name: `backend.CUDA_FIRST`."""
