"""Milliseconds a sample and error of likelihoods: of a flow by solver, by random probes, of an EBM; of a refinement."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from boltznce.analysis.plotting import plot_error_over_cost
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.benchmarks.finished import measured_refinement, of_own_isomer, open_finished
from boltznce.benchmarks.timing import time_once
from boltznce.errors import UserError
from boltznce.flows.solvers import SolverSettings
from boltznce.methods.models import FlowGenerator
from boltznce.methods.refinement import require_base
from boltznce.precision import ordinary_tensors
from boltznce.settings import require_keywords

__all__ = ["likelihood_figure", "likelihood_rows", "likelihood_table", "measure_likelihood"]

MANY = 4096  # draws, of which an EBM's likelihood is timed


def measure_likelihood(
    run: str | None,
    solvers: Mapping[str, Mapping[str, Any]],
    *,
    n: int,
    finest: Mapping[str, Any],
    hutchinson: Mapping[str, Any],
    n_probes: Sequence[int],
    n_walkers: int,
    trust: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> list[dict]:
    """The rows of `likelihood_rows` for a run's own weighted draws.

    Args:
        run: the folder of a finished run with an interpolant flow.
        solvers: label -> keywords of `SolverSettings`; ``finest`` and ``hutchinson``: such keywords.

    Raises UserError for another run, and for settings of solvers that make no sense.
    """
    for label, keywords in {"finest": finest, "hutchinson": hutchinson, **solvers}.items():
        require_keywords(SolverSettings, keywords, f"the solver {label}")
    settings = [SolverSettings(**keywords) for keywords in solvers.values()]
    of_finest, of_probes = SolverSettings(**finest), SolverSettings(**hutchinson)
    opened = open_finished(run, "likelihood", device, trust)
    generator = opened.generator()
    if not isinstance(generator, FlowGenerator):
        raise UserError(
            f"what=likelihood compares solvers of an interpolant flow, and method={opened.config.method.name} has "
            "none: choose a run of method=boltznce or tbg."
        )
    draws = of_own_isomer(opened.system, WeightedSamples.load(opened.path / "samples" / "weighted"))
    of_samples = {"n_probes": n_probes, "n": n, "n_walkers": n_walkers, "seed": seed}
    return likelihood_rows(generator, draws, settings, of_finest, of_probes, **of_samples)


@ordinary_tensors()
@torch.no_grad()
def likelihood_rows(
    generator: FlowGenerator,
    draws: WeightedSamples,
    solvers: Sequence[SolverSettings],
    finest: SolverSettings,
    hutchinson: SolverSettings,
    *,
    n_probes: Sequence[int],
    n: int,
    n_walkers: int,
    seed: int = 0,
) -> list[dict]:
    """One row for each likelihood of ``n`` of the draws, taken at random.

    A row has ``ms``, milliseconds a sample (see `boltznce.clock`; what a first call compiles is not counted), and
    ``mean`` and ``std``, in nats, of its difference to the exact log q of the ``finest`` solver; None where there is
    none: of an EBM, which knows log q up to a constant, the mean, of a refinement of ``n_walkers`` both. A row that
    this run cannot have says so in ``message``.

    Args:
        solvers: of exact likelihoods; ``hutchinson``: of those with random probes, ``n_probes`` of them.
    """
    flow, device = generator.flow, generator.device
    chosen = np.random.default_rng(seed).permutation(len(draws))[:n]
    x = torch.from_numpy(np.array(draws.positions[chosen])).to(device)
    options = {"batch_size": generator.batch_size("exact"), "generator": torch.Generator(device).manual_seed(seed)}

    def measured(label: str, kind: str, solver: SolverSettings, **more: Any) -> tuple[dict, np.ndarray]:
        one_step = SolverSettings("heun", steps=1)
        flow.log_prob(x[: options["batch_size"]], solver=one_step, **options, **more)
        log_q, seconds = time_once(lambda: flow.log_prob(x, solver=solver, **options, **more), device)
        bar.update()
        return {"likelihood": label, "kind": kind, "ms": 1e3 * seconds / len(x)}, log_q.cpu().numpy()

    rows = []
    with tqdm(total=len(solvers) + len(n_probes) + 3, desc="likelihood", unit="case") as bar:
        row, reference = measured(f"finest: {_words(finest)}", "exact", finest)
        rows.append(row | {"mean": None, "std": None})
        for solver in solvers:
            row, log_q = measured(_words(solver), "exact", solver)
            rows.append(row | _error(log_q - reference))
        for m in n_probes:
            label = f"Hutchinson, {m} probe{'s' * (m > 1)}, {_words(hutchinson)}"
            row, log_q = measured(label, "Hutchinson", hutchinson, method="hutchinson", n_probes=m)
            rows.append(row | _error(log_q - reference))
        rows.append(_of_ebm(generator, draws, x, reference))
        bar.update()
        rows.append(_of_refinement(generator, draws[:n_walkers], seed))
        bar.update()
    return rows


def _words(solver: SolverSettings) -> str:
    if solver.method == "dopri5":
        return f"dopri5 {solver.rtol:g}"
    every = f" / {solver.divergence_every}" if solver.divergence_every > 1 else ""
    return f"{solver.method} {solver.steps}{every}"


def _error(difference: np.ndarray) -> dict[str, float]:
    return {"mean": float(difference.mean()), "std": float(difference.std(ddof=1))}


def _of_ebm(generator: FlowGenerator, draws: WeightedSamples, x: torch.Tensor, reference: np.ndarray) -> dict:
    row = {"likelihood": "EBM", "kind": "EBM"}
    if generator.ebm is None:
        return row | {"message": "this run has no EBM"}
    log_q = generator.ebm.log_prob_in_batches(x).cpu().numpy()
    many = torch.from_numpy(np.array(draws.positions[:MANY])).to(x.device)
    _, seconds = time_once(lambda: generator.ebm.log_prob_in_batches(many), x.device)
    return row | {"ms": 1e3 * seconds / len(many)} | _error(log_q - reference) | {"mean": None}


def _of_refinement(generator: FlowGenerator, draws: WeightedSamples, seed: int) -> dict:
    row = {"likelihood": f"refinement of {len(draws)}", "kind": "refinement"}
    try:
        require_base(generator)
    except UserError as error:
        return row | {"message": str(error)}
    refined, seconds = measured_refinement(generator, draws, seed)
    return row | {"ms": 1e3 * seconds / len(refined), "mean": None, "std": None}


def likelihood_table(rows: Sequence[Mapping]) -> str:
    """Markdown: a line for each likelihood."""
    lines = ["| log q | ms a sample | mean error (kT) | std of the error (kT) |", "|---" * 4 + "|"]
    for row in rows:
        if "message" in row:
            continue
        errors = ["-" if row[key] is None else f"{row[key]:.2g}" for key in ("mean", "std")]
        lines.append(f"| {row['likelihood']} | {row['ms']:.3g} | {errors[0]} | {errors[1]} |")
    missing = [f"- No {row['likelihood']}: {row['message']}" for row in rows if "message" in row]
    first = "Errors are those against the first row, and / k: the divergence at one step in k."
    return "\n".join([*lines, "", first, *missing])


def likelihood_figure(rows: Sequence[Mapping]) -> Figure:
    """The standard deviation of the error over milliseconds a sample; what has no error as a line."""
    return plot_error_over_cost([row for row in rows[1:] if "ms" in row])
