"""peft's LoRA on the stacked weights of all experts, kept closed.

Shapes: E experts, K in, N out, R LoRA rank of each, Q basis size.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from grasp_kernels.layers.closed import ClosedLayer


class GraspLoRAExperts(ClosedLayer, ParamWrapper):
    """Keep the factor `B[N, R E]` of a `ParamWrapper` of peft out of the basis.

    peft computes the forward. All experts write to the stream, so one basis serves them, and
    closing the stacked factors closes each expert. The gradient is projected where the sum over the
    experts enters the stream, not here.
    """

    stock = ParamWrapper

    def set_projection(self, basis: Tensor | None, closed: bool, told: set[str]) -> None:
        """Set the basis, see `set_basis`."""
        self.set_basis(basis, closed, self.get_param(), told)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run peft's forward with the closed factors."""
        if self.new_adapters and not torch.compiler.is_compiling():
            self.look_at_new()
        with self.computing_closed():
            return super().forward(x, *args, **kwargs)
