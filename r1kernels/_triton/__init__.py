"""Triton implementations: CUDA, sm_80 and up; the interpreter where there is no GPU."""
