"""FAB (arXiv 2208.01893), a baseline of TA-BG: its flow, trained by the α-divergence on the energy alone.

Stages: fab -> evaluation -> report.
"""

from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from boltznce.annealing import soften
from boltznce.errors import UserError
from boltznce.fab import ReplayBuffer, alpha_divergence, anneal_beyond
from boltznce.flows.spline_flow import SplineFlow
from boltznce.methods.ladder import evaluate_ladder, report_ladder
from boltznce.methods.preflight import check_comparison, check_fit_of
from boltznce.methods.report import summary
from boltznce.methods.spline_models import SplineModels, make_spline_flow
from boltznce.methods.workspace import Workspace
from boltznce.smc import HMC
from boltznce.smc import Path as AnnealingPath
from boltznce.smc.path import with_gradient
from boltznce.systems.base import System

__all__ = ["STAGES", "Sampler", "check", "load_models", "summary", "train"]

SCALE = (
    10.0  # of the cube's coordinates, in which Hamiltonian moves have unit masses: of bonds and angles a thermal width
)
RATE = 0.1  # at which step sizes follow the acceptance


def check(config: DictConfig, system: System) -> None:
    """Raise UserError for what can be known to fail (see `preflight`)."""
    section = config.fab
    system.require_gradient("method=fab")
    if not section.fit.steps:
        raise UserError("fab.fit.steps=0 trains nothing: ask for one step or more.")
    check_fit_of(section, "fab", validates=False)
    if section.min_batches > section.max_batches:
        raise UserError(
            f"fab.min_batches={section.min_batches}, with which training begins, must fit into "
            f"fab.max_batches={section.max_batches}."
        )
    make_spline_flow(config, system)
    check_comparison(config, system)


class Sampler(nn.Module):
    """Fills a replay buffer with a flow's annealed draws; its step sizes follow their acceptance.

    All it changes are its buffers, and when it draws is a function of the training step alone: a killed training that
    restores them goes on as it would have.
    """

    def __init__(self, section: DictConfig, system: System, dimension: int) -> None:
        super().__init__()
        self.section, self.system = section, system
        self.kernel = HMC(masses=SCALE**2, n_leapfrog=section.n_leapfrog)
        self.buffer = ReplayBuffer(section.batch_size * section.max_batches, dimension)
        self.register_buffer(
            "step_sizes", torch.full((section.n_intermediate,), section.step_size, dtype=torch.float64)
        )
        self.cut = system.typical_energy() + section.energy_cut

    def fill(self, flow: SplineFlow, step: int, generator: torch.Generator) -> None:
        """Before training step ``step``: a batch of annealed draws every ``n_updates`` steps, at first many."""
        first = self.section.min_batches
        number, rest = divmod(step, self.section.n_updates)
        n, start = (first, 0) if step == 0 else (1 if rest == 0 else 0, first + number - 1)
        for k in range(start, start + n):
            self._add(flow, k * self.section.batch_size, generator)

    def _add(self, flow: SplineFlow, place: int, generator: torch.Generator) -> None:
        section = self.section
        with torch.no_grad():
            y, _ = flow.sample_on_cube(section.batch_size, generator)
        base, target = with_gradient(flow.cube_log_prob), with_gradient(lambda y: self.energy(flow, y))
        path = AnnealingPath(base, target, beyond=True)
        moves = {"kernel": self.kernel, "n_moves": section.n_moves, "generator": generator}
        point, log_weights, acceptance = anneal_beyond(path, y, self.step_sizes, **moves)
        self.step_sizes *= (RATE * (acceptance - section.acceptance)).exp()
        self.buffer.add(place, point.positions, log_weights, point.log_base)

    def energy(self, flow: SplineFlow, y: Tensor) -> Tensor:
        """-log p (n,) of coordinates y (n, d) of the cube, with respect to these, softened far above what is met."""
        positions, log_volume = flow.coordinates.to_positions(y)
        return soften(self.system.energy(positions).double(), self.cut) - log_volume.double()


def train(work: Workspace) -> dict:
    """A flow that is trained on annealed draws of its own, from a buffer."""
    section, system = work.config.fab, work.system.cheap
    flow = make_spline_flow(work.config, work.system)
    sampler = Sampler(section, system, flow.dimension).to(work.device)

    def loss(flow: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        sampler.fill(flow, step, generator)
        index = sampler.buffer.draw(section.batch_size, generator)
        log_q = flow.cube_log_prob(sampler.buffer.points[index])
        losses = {"loss": alpha_divergence(log_q, sampler.buffer.log_q[index], section.max_adjustment)}
        sampler.buffer.update(index, log_q.detach())
        return losses | {"step_size": sampler.step_sizes.mean()}

    fitted = work.fit("fab", flow, loss, memory=sampler)
    return fitted | {"energy_evaluations": energy_evaluations(section, fitted["steps"])}


def energy_evaluations(section: DictConfig, steps: int) -> int:
    """How many energies, nearly all of them with gradients, so many steps take."""
    batches = section.min_batches + max(0, steps - 1) // section.n_updates
    return batches * section.batch_size * (1 + section.n_intermediate * section.n_moves * section.n_leapfrog)


def load_models(folder: Path, config: DictConfig, system: System, device: torch.device) -> SplineModels:
    """The flow."""
    return SplineModels(Path(folder), config, device, {"fab": system.temperature})


STAGES = {"fab": train, "evaluation": evaluate_ladder, "report": report_ladder}
