"""What a call of the operator may be given, or a sentence on what is wrong.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

from torch import Tensor

from grasp_kernels.ops.lora_linear.padding import parts


def check(
    x: Tensor,
    base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None,
    write_basis: Tensor | None,
    write_weight: Tensor | None,
    closed_A: Tensor | None,
    closed_B: Tensor | None,
) -> None:
    if base is not None and any(given is not None for given in (weight, bias, write_weight)):
        raise ValueError("base stands for weight, bias and write_weight; leave those out with it.")
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
        ("write_weight", write_weight, (Q, K)),
        ("closed_factors[0]", closed_A, (R, K)),
        ("closed_factors[1]", closed_B, (N, R)),
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
            raise TypeError(f"{name} has dtype {tensor.dtype}; the operator needs floating point.")
    for name, tensor in (
        ("weight", weight),
        ("bias", bias),
        ("closed_factors[0]", closed_A),
        ("closed_factors[1]", closed_B),
    ):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype} but x has {dtype}; "
                "cast one or use torch.autocast."
            )


def _widths(x: Tensor, weight: Tensor | None, base: Tensor | None) -> tuple[int, int]:
    """N and K."""
    given, name, form = (weight, "weight", "[N, K]") if base is None else (base, "base", "[..., N]")
    if given is None:
        raise ValueError("weight is None; pass the weight of the base layer, or base, its result.")
    if x.dim() < 1 or given.dim() != (2 if base is None else x.dim()):
        raise ValueError(
            f"x {tuple(x.shape)} and {name} {tuple(given.shape)} must be [..., K] and {form}."
        )
    return (given.shape[0], given.shape[1]) if base is None else (given.shape[-1], x.shape[-1])


def checked_padding(
    padded: Tensor | None,
    weight: Tensor | None,
    closed_factors: tuple[Tensor, Tensor] | None,
    write_weight: Tensor | None,
) -> Tensor | None:
    """The buffer, if it is that of the operands of this call."""
    if padded is None:
        return None
    if weight is None:
        raise ValueError("padded_weight holds a weight; leave it out with base.")
    (N, K), Q = weight.shape, 0 if write_weight is None else write_weight.shape[0]
    given = [weight, *(closed_factors or ())] + ([] if write_weight is None else [write_weight])
    R = closed_factors[0].shape[0] if closed_factors else 0
    E = padded.shape[0] - N
    expected = parts(padded, N, K, R, Q)
    places = (expected.weight, expected.closed_A, expected.closed_B, expected.write_weight)
    fits = closed_factors is not None and padded.shape == (N + E, K + E) and R + Q <= E
    if not fits or any(
        tensor.data_ptr() != place.data_ptr() for tensor, place in zip(given, places, strict=False)
    ):
        raise ValueError(
            f"padded_weight {tuple(padded.shape)} does not hold the weight, the closed factors and "
            "write_weight of this call; make them with padding.pad and padding.parts."
        )
    return padded
