"""Systems and generators of which everything is known: a molecule of springs about conformers, a Gaussian flow."""

import copy
import functools
import math
from dataclasses import dataclass, field

import networkx
import numpy as np
import torch
from torch import nn

import boltznce as bz
from boltznce.data.dataset import Dataset
from boltznce.methods.models import FlowGenerator
from boltznce.systems.toy import GaussianMixture

SPREAD = 0.003  # nm, of every coordinate about its conformer, so that no two conformers overlap
# (φ in the state or not, peptide bond cis or not)
STATE, REST, CIS_STATE, CIS_REST = range(4)
TARGET = np.array([0.2, 0.7, 0.04, 0.06])  # populations of the conformers
# one round of draws: so many of each conformer, as it is and as its mirror image, and with a broken bond
ROUND = [(STATE, 1), (STATE, -1)] * 2 + [(REST, 1), (REST, -1)] * 5 + [(CIS_STATE, 1), (CIS_STATE, -1)]
ROUND += [(CIS_REST, 1), (CIS_REST, -1)] + [(REST, 0)] * 2
DRAWN = np.bincount([conformer for conformer, sign in ROUND if sign], minlength=4) / len(ROUND)  # molecules, of a round
EBM_ERROR = np.array([0.7, -0.3, 2.0, -2.0])  # kT, of every sample of a conformer
EBM_CONSTANT = 5.0


# ---- a molecule -----------------------------------------------------------------------------------------------------


@functools.cache
def aldp():
    return bz.load_system("aldp")


@functools.cache
def springs(name="springs", target=tuple(TARGET)):
    """Alanine dipeptide's atoms in a mixture of narrow Gaussians about four conformers, of populations ``target``."""
    system = copy.copy(aldp())
    system.name = name
    system.energy = lambda x: -log_mixture(x, target).to(x)
    return system


@functools.cache
def conformers():
    """(4, atoms, 3), float64: φ of 1.0 in the state and -1.3 in the rest, the second peptide bond trans or cis."""
    found = []
    for cis in (0.0, math.pi):
        for phi in (1.0, -1.3):
            x = aldp().positions.double()
            x = _turned(x, (6, 8), phi - float(aldp().dihedral(x[None], "phi")))
            found.append(_turned(x, (14, 16), cis))
    return torch.stack(found)


def _turned(x, bond, angle):
    """Atoms beyond a bond (a, b), on the side of b, turned about it."""
    a, b = bond
    graph = networkx.Graph(list(aldp().bonds))
    graph.remove_edge(a, b)
    moved = sorted(networkx.node_connected_component(graph, b))
    axis = torch.nn.functional.normalize(x[b] - x[a], dim=0)
    arm, turned = x[moved] - x[b], x.clone()
    along = (arm @ axis)[:, None] * axis
    across = torch.linalg.cross(axis.expand_as(arm), arm)
    turned[moved] = x[b] + along + (arm - along) * math.cos(angle) + across * math.sin(angle)
    return turned


def nearest(x):
    """Number (n,) of the conformer that each of x (n, atoms, 3) is about."""
    x = torch.as_tensor(x).detach().double()
    return torch.cdist(x.flatten(1), conformers().flatten(1)).argmin(1).numpy()


def log_mixture(x, shares, centres=None):
    """log Σ_k shares_k N(x; c_k, SPREAD²) over all 3 n coordinates, (batch,), float64."""
    centres = conformers() if centres is None else centres
    squares = torch.cdist(x.double().flatten(1), centres.flatten(1)).square()
    log_norm = -0.5 * centres[0].numel() * math.log(2 * math.pi * SPREAD**2)
    return torch.logsumexp(torch.as_tensor(shares).log() - squares / (2 * SPREAD**2), dim=1) + log_norm


class RoundFlow(nn.Module):
    """Draws `ROUND` again and again, a batch of it in shuffled order; its log q is that of all it makes, exactly.

    With ``parity`` it makes mirror images as often as molecules, as an equivariant network does; without, it makes
    none: what `ROUND` calls mirror images then are molecules.
    """

    tells_atoms_apart = True
    basis = torch.zeros(0)

    def __init__(self, parity):
        super().__init__()
        self.parity_equivariant = parity
        self.seeds = []  # of every batch that was drawn

    def sample(self, n, generator, *, likelihood, **_):
        self.seeds.append(generator.initial_seed())
        which = torch.tensor(ROUND).repeat(-(-n // len(ROUND)), 1)[:n][torch.randperm(n, generator=generator)]
        noise = torch.randn(n, *conformers().shape[1:], generator=generator, dtype=torch.float64)
        x = conformers()[which[:, 0]] + SPREAD * noise
        x[which[:, 1] == 0, 0] += 0.5  # a hydrogen 0.5 nm from where it belongs
        if self.parity_equivariant:
            x[which[:, 1] < 0] *= -1
        x = x.float()
        return x, None if likelihood == "none" else self.log_prob(x)

    def log_prob(self, x, **_):
        if not self.parity_equivariant:
            return log_mixture(x, DRAWN)
        return log_mixture(x, np.tile(DRAWN / 2, 2), torch.cat([conformers(), -conformers()]))


class ErringEnergy(nn.Module):
    """log q of the molecules that a `RoundFlow` makes, off by a constant and `EBM_ERROR`."""

    def log_prob(self, x):
        return log_mixture(x, DRAWN) + torch.from_numpy(EBM_ERROR[nearest(x)]) + EBM_CONSTANT

    log_prob_in_batches = log_prob


@dataclass
class RoundModels:
    """In place of `FlowModels`: one `RoundFlow` for each member, with an EBM or without."""

    config: object
    parity: bool = True
    with_ebm: bool = True
    flows: dict = field(default_factory=dict)

    def of(self, member):
        flow = self.flows.setdefault(member.name, RoundFlow(self.parity))
        return FlowGenerator(self.config, member, flow, ErringEnergy() if self.with_ebm else None)


def simulated(folder, system, n, seed=0, cpu_seconds=1e7):
    """A dataset as if of a simulation: ``n`` independent frames of the target, in two repeats."""
    rng = np.random.default_rng(seed)
    which = rng.choice(4, size=n, p=TARGET)
    x = conformers()[which].numpy() + SPREAD * rng.normal(size=(n, *conformers().shape[1:]))
    x = x.astype("f4")
    energies = system.energy(torch.from_numpy(x)).double().numpy()
    meta = {"system": system.identity, "settings": {"method": "langevin"}, "cpu_seconds": cpu_seconds}
    return Dataset.write(folder, x, energies, time=np.arange(n) // 2, repeat=np.arange(n) % 2, meta=meta)


# ---- a Gaussian in the plane ----------------------------------------------------------------------------------------


class Spring(GaussianMixture):
    """A normal distribution of unit width about (MEAN, 0) at temperature 1: at T its variance is T.

    ``asked`` holds the temperatures at which energies were asked for, one a call, of all copies.
    """

    MEAN = 0.4

    def __init__(self):
        shape = {"box": [[-7.0, 7.0], [-7.0, 7.0]], "state": ("x", (0.0, math.inf))}
        super().__init__(name="spring", means=[[self.MEAN, 0.0]], std=1.0, **shape)
        self.asked = []

    def energy(self, x):
        self.asked.append(self.temperature)
        return super().energy(x)


class GaussianFlow(nn.Module):
    """A generator as `SplineFlow`, normal about the spring's mean, of a width that is its only parameter."""

    def __init__(self, log_std=0.0):
        super().__init__()
        self.log_std = nn.Parameter(torch.tensor(float(log_std)))
        self.register_buffer("mean", torch.tensor([Spring.MEAN, 0.0]))

    def _normal(self, x, log_std):
        squares = (x[:, 0] - self.mean).square().sum(-1)
        return (-squares / (2 * torch.exp(2 * log_std)) - 2 * log_std - math.log(2 * math.pi)).double()

    def _draw(self, n, generator):
        return self.mean + self.log_std.exp() * torch.randn(n, 1, 2, generator=generator)

    def log_prob(self, x):
        return self._normal(x, self.log_std)

    def sample_with_log_prob(self, n, generator):
        x = self._draw(n, generator)
        return x, self._normal(x, self.log_std)

    def sample(self, n, generator):
        with torch.no_grad():
            return self.sample_with_log_prob(n, generator)

    def sample_with_fixed_log_prob(self, n, generator):
        x = self._draw(n, generator).detach()
        return x, self._normal(x, self.log_std)

    def sample_with_path_log_prob(self, n, generator):
        x = self._draw(n, generator)
        return x, self._normal(x, self.log_std.detach())
