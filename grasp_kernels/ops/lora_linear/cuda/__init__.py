"""The operator on the CUDA C++ kernels of `csrc`: the passes; the base products are Triton's.

backend    what the operator asks of a backend
library    the compiled operators, loaded when they are first needed
passes     what `fused` asks for, made of them
"""
