"""The benchmark suite: cases, providers, a correctness gate, interleaved timing, rows as data.

shapes      the linear layers of known models
providers   what is compared, by name: the frozen layer alone, stock peft, ours
gate        refuses to time a provider whose results are wrong
timing      forward and backward, all providers in turn
suite       puts them together and yields rows
rows        rows on disk, with machine, versions and commit; tables made from them
"""

from grasp_kernels.bench.rows import read_rows, table, write_rows
from grasp_kernels.bench.suite import Suite, run_suite

__all__ = ["Suite", "read_rows", "run_suite", "table", "write_rows"]
