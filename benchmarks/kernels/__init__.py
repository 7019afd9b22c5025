"""The benchmark suite: cases, providers, a correctness gate, interleaved timing, rows as data.

shapes            known decoders and their linears
provider          what a provider is; the weights that those of a case share
peft_providers    the frozen layer, stock peft in the ways people run it
ours              GraspLoRALinear, on each backend
errors, gate      what a result may be off; refuses to time a provider whose results are wrong
timing            forward and backward, all providers in turn
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
