"""Checks of the arguments of the operator; each error is one sentence.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from torch import Tensor


def check(
    x: Tensor,
    base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None,
    write_basis: Tensor | None,
) -> None:
    if base is not None and any(given is not None for given in (weight, bias)):
        raise ValueError("base replaces weight and bias; leave those out if you give it.")
    (N, K), R = _widths(x, weight, base), lora_A.shape[0]
    if R == 0:
        raise ValueError("lora_A has rank 0; a LoRA layer needs a rank of at least 1.")
    Q = 0 if write_basis is None else write_basis.shape[-1]
    rows, device, dtype = x.shape[:-1], x.device, x.dtype
    for name, tensor, shape in (
        ("base", base, (*rows, N)),
        ("x", x, (*rows, K)),
        ("bias", bias, (N,)),
        ("lora_A", lora_A, (R, K)),
        ("lora_B", lora_B, (N, R)),
        ("lora_bias", lora_bias, (N,)),
        ("write_basis", write_basis, (N, Q)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape} "
                f"for a weight of shape {(N, K)}."
            )
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {device}; move it there.")
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; convert it to a floating-point dtype."
            )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype} but x has {dtype}; "
                "cast one or use torch.autocast."
            )


def _widths(x: Tensor, weight: Tensor | None, base: Tensor | None) -> tuple[int, int]:
    """Return N and K."""
    given, name, form = (weight, "weight", "[N, K]") if base is None else (base, "base", "[..., N]")
    if given is None:
        raise ValueError(
            "weight is None; pass the weight of the base layer, or its output as base."
        )
    if x.dim() < 1 or given.dim() != (2 if base is None else x.dim()):
        raise ValueError(
            f"x {tuple(x.shape)} and {name} {tuple(given.shape)} must be [..., K] and {form}."
        )
    return (given.shape[0], given.shape[1]) if base is None else (given.shape[-1], x.shape[-1])
