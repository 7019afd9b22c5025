"""Error budgets: what a result may be off, by its dtype and by what stock peft is off.

Shapes: T tokens, K in, N out.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A result that is stored in a dtype carries about a quarter of its machine epsilon (rms of one
# rounding to nearest), however it was computed.
ROUNDING = 0.25
# A sum of n numbers of either sign that is carried out in order, in float32 at least, rounds
# partial sums that grow like √n: a fifth of the machine epsilon times √n in the mean square, and
# three such sums stand behind dA. The library adds in blocks and may have less of it.
ACCUMULATION = 0.35
RATIO = 1.5


def relative_error(found: Tensor, oracle: Tensor) -> float:
    """`‖found − oracle‖ / ‖oracle‖` in float64; 0 for empty tensors."""
    if oracle.numel() == 0:
        return 0.0
    difference = torch.linalg.vector_norm(found.double() - oracle.double())
    scale = torch.linalg.vector_norm(oracle.double())
    return float(difference / scale) if scale > 0 else float(difference)


def budget(stock_error: float, dtype: torch.dtype, longest: int) -> float:
    """What an error may be: 1.5 × that of the stock layer, one rounding of the result, or what sums
    of up to `longest` numbers round."""
    accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * longest**0.5
    return max(RATIO * stock_error, ROUNDING * torch.finfo(dtype).eps, ACCUMULATION * accumulated)
