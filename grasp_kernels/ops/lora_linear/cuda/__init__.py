"""The operator on the CUDA C++ kernels of `csrc`: the passes; the base products are Triton's.

backend    the functions of a backend
library    the compiled operators, loaded on first use
passes     the passes of `fused` on these operators
"""
