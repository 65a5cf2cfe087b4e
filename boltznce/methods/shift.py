"""A proxy brought nearer to its system along torsions, which hardly turn while walkers go from one to the other."""

from collections.abc import Callable

import torch
from torch import Tensor

from boltznce.data.fourier_bias import Axis, FourierBias
from boltznce.data.jobs import biases_of
from boltznce.systems.base import System

__all__ = ["shift_of"]

N_TERMS = 3  # of the series, an angle
RIDGE = 1.0  # kT⁻² of a coefficient's square: of a few hundred energies only what they tell clearly counts
OUTLIERS = 0.01  # of the differences on either side, which are cut: of positions that clash


def shift_of(system: System, x: Tensor) -> Callable[[Tensor], Tensor]:
    """By how many kT the energy of a system is above its proxy's, on average over all but its torsions.

    A function g of positions (n, n_atoms, 3), differentiable, up to a constant: a ridge regression of the difference at
    given positions ``x``, which should be wherever the torsions go, on a Fourier series in every φ and the ψ beside it.
    Zero for a system without dihedrals. No weight hangs on it: exp(-u_proxy - g) is but a better place to start from.
    """
    if not system.dihedrals:
        return lambda x: x.new_zeros(len(x))
    atoms = [[system.dihedrals[name] for name in pair] for pair in biases_of(system)]
    series = [FourierBias([Axis(four) for four in pair], N_TERMS, 1.0, 1.0, x.device) for pair in atoms]
    x = x.double()
    off = system.energy(x) - system.proxy.energy(x)
    x, off = x[off.isfinite()], off[off.isfinite()]
    low, middle, high = off.quantile(torch.tensor([OUTLIERS, 0.5, 1 - OUTLIERS]).to(off))
    functions = torch.cat([each.functions(each.coordinates(x)) for each in series], dim=1)
    normal = functions.T @ functions + RIDGE * torch.eye(functions.shape[1]).to(functions)
    found = torch.linalg.solve(normal, functions.T @ (off.clamp(low, high) - middle))
    for each, part in zip(series, found.split([each.coefficients.numel() for each in series]), strict=True):
        each.coefficients = part.reshape(each.coefficients.shape)
    return lambda x: sum(each.energy(each.coordinates(x)) for each in series)
