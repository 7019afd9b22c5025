"""How the skinny columns join the base product: in the kernel, or by `addmm`.

Adding rank-R columns to a finished result reads and writes it once more, whatever T, J and R are;
the extended kernel saves that pass, and multiplies more slowly than the library. On an H100, with
T = 8192, R = 16, in µs (library product alone, with addmm, extended): 4096→1024 93, 104, 102;
4096→4096 345, 404, 364; 4096→14336 1198, 1437, 1252; 14336→4096 1172, 1230, 1191; 8192→28672 4702,
5199, 4747; 28672→8192 4836, 4958, 4726. So such a GPU takes the extended kernel.
Shapes: T tokens, I inner and J outer width of the product, R LoRA rank, Q basis size.
"""

from typing import Literal

import torch
from torch import Tensor

from grasp_kernels.ops.gpu.launch import Part, part_of
from grasp_kernels.ops.lora_linear.triton.dropout import Dropout
from grasp_kernels.ops.lora_linear.triton.gemm import extended_gemm

Path = Literal["extended", "addmm"]

# Parts with the copy engine and less shared memory than a Hopper: predicted, not measured. Their
# products reach 95 to 98 % of the library's, so they win up to this inner width.
WIDEST_EXTENDED = 4096


def choose(part: Part, itemsize: int, inner: int) -> Path:
    """Return the path of a product by its inner width, not by T: no new length recompiles."""
    if itemsize == 4:  # no matrix instruction multiplies float32 exactly; the library's loops do
        return "addmm"
    if part.tma and (part.shared_memory >= 227 << 10 or inner <= WIDEST_EXTENDED):
        return "extended"
    return "addmm"


def product(
    a: Tensor,
    b: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    projection: tuple[Tensor, Tensor] | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """Return `a b + bias + mask ⊙ (s leftᵀ right) + dᵀ C [T, J]`, see `extended_gemm`."""
    path = choose(part_of(a.device), a.element_size(), b.shape[0])
    extended = path == "extended"
    if extended:
        out = a.new_empty(a.shape[0], b.shape[1])
    else:
        out = a @ b if bias is None else torch.addmm(bias, a, b)
    if extended or dropout is not None:  # only the kernel regenerates a mask
        extended_gemm(
            a,
            b,
            out,
            left,
            right,
            bias=bias if extended else None,
            scaling=scaling,
            projection=projection,
            dropout=dropout,
            accumulate=not extended,
        )
    elif projection is None:
        out.addmm_(left.mT, right, alpha=scaling)
    else:  # one more pass over `out` costs more than two small copies
        assert scaling == 1.0
        skinny = torch.cat([left, projection[0]])
        out.addmm_(skinny.mT, torch.cat([right, projection[1]]))
    return out
