"""What all GPU kernels here have in common.

launch   parts, launches, and dry runs that only write launches down
blocks   device functions: products, rounding
"""
