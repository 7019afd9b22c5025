"""The benchmark suite: cases, providers, a correctness gate, interleaved timing, rows as data.

shapes, presets   known decoders and their linears; named sets of cases
cost              operations and bytes of a case, and the floor made of them
provider          what a provider is; the weights that those of a case share
providers         the registry, from:
  peft_providers  the frozen layer, stock peft in the ways people run it
  orderings       the orders of library calls of published fused layers
  peers           other fused layers, where they are installed
  ours            GraspLoRALinear, on each backend
decoder           a decoder layer or a whole model with random weights
levels            the cases of single linears, layers and steps
gate              refuses to time a provider whose results are wrong
timing            forward and backward, all providers in turn
machine           versions, measured rates, free memory
suite             puts them together and yields rows
rows              rows on disk
report, figure    tables and a picture made from rows
"""

from grasp_kernels.bench.figure import plot
from grasp_kernels.bench.presets import PRESETS
from grasp_kernels.bench.report import table
from grasp_kernels.bench.rows import read_rows, write_rows
from grasp_kernels.bench.suite import Suite, run_suite

__all__ = ["PRESETS", "Suite", "plot", "read_rows", "run_suite", "table", "write_rows"]
