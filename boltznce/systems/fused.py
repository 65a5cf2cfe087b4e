"""Energies and their gradients fused into one kernel each by torch.compile."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

__all__ = ["FusedKernels", "energy_and_gradient", "fuse"]

log = logging.getLogger(__name__)
OPTIONS = {"cpp.enable_floating_point_contract_flag": "fast"}  # one instruction for a b + c
Energy = Callable[[Tensor], Tensor]


def energy_and_gradient(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """Energies (batch,) and their gradients (batch, n_atoms, 3), without a graph."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        values = energy(leaf)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


def fuse(function: Callable, *example: Tensor) -> Callable:
    """``function`` compiled for tensors like the examples; itself, with a warning, where that fails."""
    function(*example)  # tables made at the first call are no part of the graph
    try:
        # torch.compile would not fuse a gradient with what it is of, but its compiler does where the operations of both
        # are written out. Without torch.compile around it a call costs less; its cache asks for a ShapeEnv.
        graph = make_fx(lambda *inputs: function(*inputs))(*example)
        with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True))):
            kernel = torch._inductor.compile(graph, list(example), OPTIONS)
        kernel(*example)
    except Exception as error:  # the compiler's failures have no common class
        log.warning("torch.compile failed on the energy (%s); going on without it.", error)
        return function
    return kernel


class FusedKernels:
    """A kernel for each kind of result, dtype and device, for batches of one size; smaller ones are filled up.

    One size, because each new one costs half a minute. A batch under an eighth of it, or a failure to compile, runs
    eagerly.
    """

    def __init__(self, energy: Energy):
        self.eager: dict[str, Callable[[Tensor], Any]] = {
            "energy": energy,
            "energy_and_gradient": lambda x: energy_and_gradient(energy, x),
        }
        self.compiled: dict[tuple, Callable] = {}

    def __call__(self, kind: str, x: Tensor, size: int) -> Tensor | tuple[Tensor, Tensor]:
        if 8 * len(x) < size:
            return self.eager[kind](x)
        n = len(x)
        x = x.detach().contiguous()
        if n < size:
            x = torch.cat([x, x[-1:].expand(size - n, -1, -1)])
        kernel = self._kernel(kind, x)
        result = kernel(x)
        return result[:n] if kind == "energy" else tuple(part[:n] for part in result)

    def _kernel(self, kind: str, x: Tensor) -> Callable:
        key = (kind, x.dtype, x.device, len(x))
        if key not in self.compiled:
            self.compiled[key] = fuse(self.eager[kind], x)
        return self.compiled[key]
