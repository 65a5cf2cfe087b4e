"""The last stage.

The sections of every system that was tested, what concerns the whole run, and one report of it all.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from boltznce.analysis import plotting
from boltznce.analysis.metrics import SampledDistance
from boltznce.analysis.report import summary_table, write_report
from boltznce.methods.findings import Findings, gather
from boltznce.methods.sections import Part
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System

__all__ = ["learning_curves", "make_report", "summary"]

LOSSES = {
    "flow": {"loss": "flow loss"},
    "ebm": {"score": "EBM, score loss", "nce": "EBM, NCE loss", "regression": "EBM, regression (kT²)"},
}
CAPTIONS = {
    "tica": "Free energy over the slowest coordinates of the simulation (TICA), whose frames come from replica exchange at its lowest "
    "temperature: its time is not a physical one.",
    "ladder": "Effective sample size along the ladder: of each flow's draws weighted to the next temperature, and at their own.",
    "temperatures": "Free energy of the flow at each temperature of the ladder, not weighted; equal colours are equal densities.",
    "marginals": "Marginal probability densities of the backbone torsions.",
}
Section = Callable[[Findings], Part]


def make_report(
    work: Workspace,
    sections: Sequence[Section],
    settings: Mapping[str, str],
    find: Callable[[Workspace, System], Findings] = gather,
    of_run: Part | None = None,
) -> dict:
    """Compute every number of the report from what is on disk, draw the figures, and write both.

    Args:
        sections: of every system that was tested.
        settings: of the run, in words.
        find: gathers what the sections are made from.
        of_run: what concerns no single system: figures and counts.
    """
    config, system = work.config, work.system
    of_run = of_run or Part({}, curves_figure(learning_curves(work.folder.path, LOSSES)))
    results, figures, notes, captions = {}, {}, list(of_run.notes), dict(CAPTIONS)
    for member in system.members("test"):
        found = find(work, member)
        parts = [section(found) for section in sections]
        results[member.name] = merged({}, *(part.results for part in parts))
        label = system.label(member)
        for name, figure in (item for part in parts for item in part.figures.items()):
            key = f"{label}_{name}".lstrip("_")
            figures[key] = figure
            if label:
                captions[key] = f"{label}: {CAPTIONS.get(name, name.replace('_', ' '))}"
        notes += [note for part in parts for note in part.notes if note not in notes]
    whole = {
        "system": system.name,
        "method": config.method.name,
        "budget": config.budget,
        "timing": {
            "stages": {name: record["seconds"] for name, record in work.folder.stages.items() if name != "report"},
            "peak_memory_mib": max(record["peak_memory"] for record in work.folder.stages.values()),
        },
        "counts": _counts(work, results),
        "settings": settings | {"seed": str(config.seed)},
        "notes": notes + _notes(work, results),
    }
    alone = [name for name in results if name == system.name]
    of_members = results[alone[0]] if alone else {"members": results, "average": _average(results)}
    if results and not alone:
        of_members["state"] = next(iter(results.values())).get("state")
    write_report(work.folder.path, merged({}, whole, of_run.results, of_members), figures | of_run.figures, captions)
    return {}


def summary(work: Workspace) -> str:
    """The report's main numbers as a table for the terminal."""
    metrics = json.loads((work.folder.path / "metrics.json").read_text())
    return f"{summary_table(metrics)}\n\nReport: {work.folder.path / 'report.md'}"


def merged(into: dict[str, Any], *parts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings joined, later ones on top."""
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, Mapping) and isinstance(into.get(key), Mapping)
            into[key] = merged(dict(into[key]), value) if both else value
    return into


def learning_curves(
    folder: Path, wanted: Mapping[str, Mapping[str, str]]
) -> dict[str, tuple[list[float], list[float]]]:
    """Training and validation losses of logs, name of the log -> {its column: title}.

    Logs that are not there are left out.
    """
    curves = {}
    for name, losses in wanted.items():
        if not (folder / f"{name}.csv").exists():
            continue
        with open(folder / f"{name}.csv", newline="") as handle:
            rows = list(csv.DictReader(handle))
        for key, title in losses.items():
            for kind in ("train", "validation"):
                points = [(float(r["step"]), float(r[f"{kind}/{key}"])) for r in rows if r.get(f"{kind}/{key}")]
                if points:
                    curves[f"{title}/{kind}"] = tuple(zip(*points, strict=True))
    return curves


def curves_figure(curves: Mapping) -> dict:
    """The figure of learning curves, if there are any."""
    return {"learning_curves": plotting.plot_learning_curves(curves)} if curves else {}


def _counts(work: Workspace, results: Mapping[str, Mapping]) -> dict[str, int]:
    trained, frames = work.system.members("train"), work.folder.stages.get("data", {}).get("frames")
    counts = {"drawn": sum(row["drawn"] for row in results.values())}
    counts |= {"molecules trained on": len(trained)} if len(trained) > 1 else {}
    return counts | ({"frames of the data": frames} if frames else {})


def _notes(work: Workspace, results: Mapping[str, Mapping]) -> list[str]:
    notes, system = [], work.system
    tests, trained = system.members("test"), system.members("train")
    if not any(member in trained for member in tests):
        notes.append("No test peptide was trained on or looked at before the evaluation.")
    missing = work.folder.stages.get("flow", {}).get("not_balanced")
    if missing:
        notes.append(f"The data of {', '.join(missing)} never were in the state: trained on as they are.")
    if any("reference" not in row.get("free_energy", {"reference"}) for row in results.values()):
        notes.append("No reference ships for this system at this temperature and with this force field.")
    return notes


def _average(rows: Mapping[str, Mapping]) -> dict[str, float]:
    """Means over members of what can be averaged; NaN where a member has no such number."""

    def mean(values: list) -> float:
        return float(np.mean([np.nan if value is None else value for value in values]))

    def value(distance: SampledDistance | float) -> float:
        return distance.mean if isinstance(distance, SampledDistance) else distance

    all_rows = list(rows.values())
    names = [
        name for name in all_rows[0].get("distances", {}) if all(name in row.get("distances", {}) for row in all_rows)
    ]
    return {
        "right_graph": mean([row["made"]["right_graph"] for row in all_rows]),
        "kept": mean([row["made"]["kept"] for row in all_rows]),
        "ess": mean([next(iter(row["ess"].values()))["ess"] for row in all_rows]),
        "abs_error": mean([abs(row.get("error", np.nan)) for row in all_rows]),
        "speed_up": mean([row.get("md", {}).get("speed_up") for row in all_rows]),
        **{
            f"{name}, {kind}": mean([value(row["distances"][name][kind]) for row in all_rows])
            for name in names
            for kind in ("unweighted", "weighted")
        },
    }
