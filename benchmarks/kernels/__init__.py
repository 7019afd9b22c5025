"""The benchmark suite: cases, providers, a correctness gate, interleaved timing, rows as data.

Providers, gate and timing are those of `grasp_kernels.bench`. Here are

cost              operations and bytes of a case, and the floor made of them
orderings         the order of library calls of published fused layers
providers         the registry
decoder           a decoder layer or a whole model with random weights
levels            the cases of single linears, layers and steps
machine           versions, measured rates, free memory
suite             puts them together and yields rows
rows, report      rows on disk, and tables made of them
"""

from benchmarks.kernels.report import table
from benchmarks.kernels.rows import read_rows, write_rows
from benchmarks.kernels.suite import Suite, run_suite

__all__ = ["Suite", "read_rows", "run_suite", "table", "write_rows"]
