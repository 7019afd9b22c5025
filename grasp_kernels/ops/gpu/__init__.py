"""The common ground of all GPU kernels here.

launch   parts, launches, and dry runs, which only record launches
blocks   device functions: products, rounding
"""
