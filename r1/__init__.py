"""r1: a thin driver that trains a reasoning model through DeepSeek-R1's recipe on r1kernels."""

__version__ = "0.1.0"
