"""The last stage: sections of every system that was tested, what concerns the whole run, one report of it all."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from boltznce import ranks
from boltznce.analysis import plotting
from boltznce.analysis.main_numbers import main_numbers
from boltznce.analysis.report import summary_table, write_report
from boltznce.logger import read_log
from boltznce.methods.findings import Findings, gather
from boltznce.methods.live import learning_curves
from boltznce.methods.provenance import data_notes, provenance
from boltznce.methods.sections import Part
from boltznce.methods.workspace import Workspace
from boltznce.records import read_json
from boltznce.run_folder import AGAIN
from boltznce.systems.base import System

__all__ = ["curves_figure", "make_report", "summary"]

LOSSES = {
    "flow": {"loss": "flow loss"},
    "ebm": {"score": "EBM, score loss", "nce": "EBM, NCE loss", "regression": "EBM, regression (kT²)"},
}
CAPTIONS = {
    "tica": "Free energy over the slowest coordinates (TICA) of the simulation, whose time is no physical one: its "
    "frames come from replica exchange at its lowest temperature, or from walkers under a bias.",
    "ladder": "Effective sample size along the ladder: of each flow's draws at their own temperature, and at the next.",
    "temperatures": "Free energy of the flow at each temperature, not weighted; equal colours are equal densities.",
    "marginals": "Marginal probability densities of the torsions.",
}


@ranks.by_first
def make_report(
    work: Workspace,
    sections: Sequence[Callable[[Findings], Part]],
    settings: Mapping[str, str],
    find: Callable[[Workspace, System], Findings] = gather,
    of_run: Part | None = None,
) -> dict:
    """Compute every number of the report from what is on disk, draw the figures, and write both.

    Args:
        sections: of every system that was tested; ``find`` gathers what they are made from.
        settings: of the run, in words.
        of_run: what concerns no single system.
    """
    of_run = of_run or Part({}, curves_figure(work, LOSSES))
    tests, rows, notes = work.system.members("test"), {}, list(of_run.notes)
    figures, captions = dict(of_run.figures), dict(CAPTIONS)
    for member in tests:
        found = find(work, member)
        parts = [section(found) for section in sections]
        rows[member.name] = merged(*(part.results for part in parts))
        notes += [note for part in parts for note in part.notes if note not in notes]
        label = work.system.label(member)
        for name, figure in (item for part in parts for item in part.figures.items()):
            key = f"{label}_{name}".lstrip("_")
            figures[key] = figure
            if label and name in CAPTIONS:
                captions[key] = f"{label}: {CAPTIONS[name]}"
    whole = _of_whole_run(work, settings, notes + _notes(work, rows))
    alone = tests == [work.system]
    of_members = rows[work.system.name] if alone else {"members": rows, "average": _average(list(rows.values()))}
    state = {} if alone else {"state": next(iter(rows.values())).get("state")}
    work.folder.leave(work.folder.path / "metrics.json")
    results = merged(whole, of_run.results, of_members, state)
    also = (work.config.get("figures") or {}).get("also", ())  # runs of before do not have it
    write_report(work.folder.path, results, figures, captions, also)
    if work.logger:
        written = read_json(work.folder.path / "metrics.json", AGAIN)
        numbers = {title: number.value for title, number in main_numbers(written, {}).items()}
        work.logger.summarize(numbers, [work.folder.path / "figures" / f"{name}.png" for name in figures])
    return {}


def summary(work: Workspace) -> str:
    """The report's main numbers as a table for the terminal."""
    metrics = work.folder.metrics
    return f"{summary_table(metrics)}\n\nReport: {work.folder.path / 'report.md'}"


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings joined, later ones on top."""
    joined: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, Mapping) and isinstance(joined.get(key), Mapping)
            joined[key] = merged(joined[key], value) if both else value
    return joined


def curves_figure(
    work: Workspace, wanted: Mapping[str, Mapping[str, str]], more: Mapping[str, Any] = MappingProxyType({})
) -> dict:
    """The figure of learning curves (see `learning_curves`), if there are any, and of ``more`` of them."""
    curves = learning_curves(work.folder.path, wanted) | dict(more)
    kept = {title: step for name, losses in wanted.items() for title in losses.values() if (step := _kept(work, name))}
    return {"learning_curves": plotting.plot_learning_curves(curves, kept=kept)} if curves else {}


def _kept(work: Workspace, name: str) -> float | None:
    """The step whose weights a training kept, the best one of an early stopping; None where it is the last."""
    if not work.config.get(name, {}).get("fit", {}).get("early_stopping_patience"):
        return None
    rows = [row for row in read_log(work.folder.path / f"{name}.csv") if row.get("validation/loss")]
    return min((float(row["validation/loss"]), float(row["step"])) for row in rows)[1] if rows else None


def _of_whole_run(work: Workspace, settings: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    config, stages = work.config, work.folder.stages
    frames = stages.get("data", {}).get("frames")
    return {
        "system": work.system.name,
        "method": config.method.name,
        "budget": config.budget,
        "timing": {
            "stages": {name: record["seconds"] for name, record in stages.items() if name != "report"},
            "peak_memory_mib": max(record["peak_memory"] for record in stages.values()),
        },
        "counts": {"molecules trained on": len(work.trained_on)} | ({"frames of the data": frames} if frames else {}),
        "settings": settings | provenance(work) | {"seed": str(config.seed)},
        "notes": notes,
    }


def _notes(work: Workspace, rows: Mapping[str, Mapping]) -> list[str]:
    notes, tests, trained = list(work.parent.get("notes", ())), work.system.members("test"), work.trained_on
    if not any(member.name in trained for member in tests):
        notes.append("No molecule that was tested was trained on or looked at before the evaluation.")
    notes += data_notes(work)
    missing = work.folder.stages.get("flow", {}).get("not_balanced")
    if missing:
        notes.append(f"The data of {', '.join(missing)} never were in the state: trained on as they are.")
    if any("reference" not in row.get("free_energy", {"reference"}) for row in rows.values()):
        notes.append(
            "No reference ships for this system: for its structure, force field, cutoff, temperature and state."
        )
    return notes


def _average(rows: Sequence[Mapping]) -> dict[str, float]:
    """Means over members of what can be averaged; NaN where a member has no such number."""

    def mean(*path: str) -> float:
        values = []
        for row in rows:
            for key in path:
                row = row.get(key) if isinstance(row, Mapping) else None
            values.append(np.nan if row is None else getattr(row, "mean", row))  # a distance is a number or sampled
        return float(np.mean(values))

    made, distances = {name: mean("made", name) for name in ("right_graph", "kept")}, rows[0].get("distances", {})
    best = "refined" if all("refined" in row for row in distances.values()) and distances else "weighted"
    moved = {f"{d}, {kind}": mean("distances", d, kind) for d in distances for kind in ("unweighted", best)}
    return made | {
        "ess": float(np.mean([next(iter(row["ess"].values()))["ess"] for row in rows])),
        "abs_error": float(np.mean([abs(row.get("error", np.nan)) for row in rows])),
        **{key: mean("md", key) for key in ("speed_up", "speed_up_trained")},
        **moved,
    }
