"""torch.compile as an option that falls back to eager execution with one warning."""

import logging
import shutil

import torch
from torch import Tensor, nn

from boltznce.errors import UserError

__all__ = ["compile_forward"]

log = logging.getLogger(__name__)
CHOICES = ("auto", "true", "false")


def compile_forward(network: nn.Module, mode: str | bool = "auto") -> None:
    """Compile the network's forward pass in place: ``true``, ``false``, or ``auto``, for networks that gain by it (``gains_by_compiling``).

    Forward-mode derivatives and other shapes than the first run eagerly, so that no batch size sets off a long recompilation.
    """
    mode = str(mode).lower()
    if mode not in CHOICES:
        raise UserError(f"Unknown compile={mode}: choose one of {', '.join(CHOICES)}.")
    if mode == "false" or (mode == "auto" and not getattr(network, "gains_by_compiling", False)):
        return
    if not torch.cuda.is_available() and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        log.warning("There is no C++ compiler, so networks run without torch.compile; install one (g++) or set compile=false.")
        return
    network.forward = _OneShape(network.forward)


class _OneShape:
    """Runs the compiled function for the first shape it is trained with, the eager one for everything else."""

    def __init__(self, eager) -> None:
        self.eager, self.compiled, self.shape = eager, torch.compile(eager, dynamic=False), None

    def __call__(self, x: Tensor, t: Tensor, features: Tensor | None = None) -> Tensor:
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        needs_second_order = x.requires_grad
        if transformed or needs_second_order:
            return self.eager(x, t, features)
        key = (tuple(x.shape), torch.is_grad_enabled())
        if self.shape is None or (self.shape[0] == key[0]):
            self.shape = key
            try:
                return self.compiled(x, t, features)
            except Exception as error:  # the compiler's failures have no common class
                log.warning("torch.compile failed (%s); going on without it.", error)
                self.compiled = self.eager
        return self.eager(x, t, features)
