"""torch.compile as an option that falls back to eager execution with one warning."""

import logging

import torch
from torch import Tensor, nn

from boltznce.compiling import wants_compiling

__all__ = ["compile_forward"]

log = logging.getLogger(__name__)


def compile_forward(network: nn.Module, mode: str | bool = "auto") -> None:
    """Compile the network's forward pass in place: ``true``, ``false``, or ``auto``: where there is a GPU.

    On a CPU the first call takes a minute or more. Other shapes than the first, and derivatives of another kind than
    training's, run eagerly, so that no batch size sets off a recompilation.
    """
    if wants_compiling(mode):
        network.forward = _OneShape(network.forward)


class _OneShape:
    """The compiled function for the first shape that it meets in training, the eager one for everything else."""

    def __init__(self, eager) -> None:
        self.eager, self.compiled = eager, torch.compile(eager, dynamic=False)
        self.shape: torch.Size | None = None

    def __call__(self, x: Tensor, t: Tensor, features: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        rest = (features,) if mask is None else (features, mask)
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        trains = torch.is_grad_enabled() and not x.requires_grad and not transformed
        if not trains or x.shape != (self.shape or x.shape):
            return self.eager(x, t, *rest)
        self.shape = x.shape
        try:
            return self.compiled(x, t, *rest)
        except Exception as error:  # the compiler's failures have no common class
            log.warning("torch.compile failed (%s); going on without it.", error)
            self.compiled = self.eager
            return self.eager(x, t, *rest)
