"""What all GPU kernels here have in common.

launch      parts, launches, and dry runs that only write launches down
blocks      device functions: products, rounding
resources   what a launch takes of a GPU, read off its machine code without one
"""
