"""What a run leaves for its reader: ``metrics.json``, ``figures/*.png``, ``report.md``, a short table for the terminal.

``results`` is a nested dict; a section that is not there is left out of the report. Dataclasses may stand in it as they
are. Of several molecules each has its own results under ``members``, and sections show them one below the other.

===========  =========================================================================================================
key          value
===========  =========================================================================================================
system       name; and so ``method``, ``budget``
settings     {setting: value}
counts       {what: number}, such as samples drawn, kept, mirrored, with a peptide bond turned
made         {right_graph, kept, mirrored, reordered, turned}: shares of the draws with the right bonds, with the right
             chirality too, mended by a mirror, mended by renaming atoms; and of what was kept the share with a peptide
             bond turned
state        the state of the free energies in words, such as "0 < φ < 2 rad"
free_energy  {"reference" | "ebm" | "refined" | "two_sided" | "corrected" | "exact" | "unweighted": {value, std_error,
             interval, ...}} in kT, fields of FreeEnergyDifference, or of TwoSidedFreeEnergyDifference and
             CorrectedFreeEnergyDifference (whose intervals are *total*); any other key is a row of that name.
             ``reliable=False`` (default True) hides the interval
coordinate   what the state is an interval of; ``others``: {φ: rows as of ``free_energy``} of the other φ's
populations  {pattern of the φ's, as "--+": {row: {value, std_error, interval, reliable, message}}}
headline     {row, apart}: the key of ``free_energy`` that comes first, or the two that disagree, see `choose_headline`
total        the keys of rows whose errors are total
weighted     the key that the table of members shows; ``error``: its distance from the reference, kT
mean_energy  {whose: {value, std_error}} of the reduced energy, kT; no error (NaN) where it cannot be relied on
ebm_bias     {"ebm" | "refined": {value, std_error}} of that ΔF less the one by exact likelihoods, kT
refinement   {steps: "leg", where it began, and fields of `boltznce.smc.Step`,
             lineages: {state: {walkers, ancestors, effective}}}
ess          {which weights: {ess, pareto_k, n}}, ess relative; the table of members shows the first
distances    {name: {unweighted, weighted, refined, rebalanced, floor}}, numbers or SampledDistances; "missing": why one
             is NaN
held_out     {whose: the fields of HeldOutLikelihood}
excluded     {conformers left out: {n, by_count, by_weight, data}}, shares; data: of the reference data, by weight
energy_cut   {"cut": kT, "shares": {whose energies: share above the cut}}
likelihood   the fields of LikelihoodAgreement
density      the fields of DensityErrors
modes        {whose: [population of each mode]}, the exact ones first
timing       {"ebm_per_sample": s, "exact_per_sample": s, "stages": {stage: s}}
md           {error, md_seconds, flow_seconds, training_seconds, speed_up, speed_up_trained}: CPU time of a simulation
             that knows ΔF to ``error``, over that of the result, without and with the training
members      {name: all of this, of one molecule}
average      means over members: {right_graph, kept, ess, abs_error, speed_up, speed_up_trained,
             "<distance>, unweighted" and "weighted", or "refined"}
notes        [sentence, ...]
===========  =========================================================================================================
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from boltznce.io import atomic_file

__all__ = ["markdown_table", "summary_table", "write_report"]

MOST_MODES = 12  # of a table of their populations
MOST_STEPS = 12  # in β, of a table of them
_FREE_ENERGY_ROWS = {
    "reference": "reference",
    "ebm": "EBM weights",
    "refined": "refined",
    "two_sided": "two-sided estimate (BAR) by exact likelihoods",
    "corrected": "corrected by exact likelihoods of a subset",
    "exact": "exact weights",
    "unweighted": "flow, unweighted",
}
_GIVEN = ("temperature", "energy", "seed", "data")  # settings that a result is told with
_NO_TOTAL = "of the rows below none has a total error and is reliable"
_SPEED_UPS = {"speed_up": ".3g", "speed_up_trained": ".3g"}
_SIDES = ("unweighted", "weighted", "refined", "rebalanced", "floor")
# key, heading, and what the reader has to know
_SECTIONS = """
headline | The result

members | Molecules never trained on: free-energy difference{of_state}
Shares of the draws with the right bonds, and with the right chirality too, after mending. ΔF in kT, of the weighted
samples and of the simulation, with its 95% interval by bootstrap. E-W2 (kT) and T-W2 (rad): Wasserstein-2 distances to
the simulation, without weights → with them, or refined where samples were (floor: two halves of the simulation). EBM −
exact: standard deviation of the difference of the log-likelihoods (kT). Above a Pareto-k of 0.7 no weighted figure of a
row can be trusted.

free_energy | Free-energy difference{of_state}
ΔF = −log P(state)/P(rest), in kT. The result is the row of the smallest error among those that are reliable and whose
error is total, if no other of these is more than three joint standard errors away. *Sampling* intervals (95%) hold the
noise of the samples; the *total* ones also the error of the EBM, measured on exact likelihoods of a subset (exact
weights, and two-sided estimates, have no other). The correction is of refined samples where there are any, else of EBM
weights.

others | Free-energy difference of each φ
ΔF = −log P(in)/P(out), in kT, of the same interval of each φ, with 95% intervals: of the reference, or of data whose
errors are known, and of this run's samples (why one is not reliable: metrics.json).

populations | Populations of the states by all φ
In %, with 95% intervals. A state has a sign for each φ, + inside the interval and − outside, in the order of the table
above; those that hold 1% in no column are left out. The two-sided estimate is conditional on the states that have both
draws and frames with exact likelihoods.

warnings | Why a figure cannot be relied on, or is missing

ess | Weights
ESS is the effective share of the samples. Above a Pareto-k of 0.7 averages over the weights, ESS among them, cannot be
trusted.

refinement | Refinement
Samples annealed from the generator's likelihood (β = 0) to the target (β = 1). Walkers of one ancestor are not
independent: effective ancestors are (Σ W)² / Σ W² over the ancestors' sums of weights. Of many steps some are shown.

lineages | Ancestors of the refined samples

made | What the flow made
Shares of the draws with the right bonds, and with the right chirality too; of those that were mended by a mirror, or by
renaming equal atoms; and of what was kept the share with a peptide bond turned from trans to cis or back.

distances | Distances to the reference data
Wasserstein-2 distances of energies (kT), and of (φ, ψ) on the torus (rad) or of positions in the plane; KL, where
given, is KL(data ‖ flow) in nats. The floor is the value between two halves of the reference data; the last column is
(weighted − floor) / (unweighted − floor), of refined samples where there are any. Rebalanced: refined samples whose
weights in the state, and of the rest in −2 < ψ < 0.8 and out of it, are scaled to the populations of the two-sided
estimate, where these are reliable.

held_out | Likelihood of held-out data
Mean negative log-likelihood over the data inside the flow's domain, in nats (positions in nm). Outside it there is no
density.

excluded | Conformers left out
Free energies, distances and figures are conditional on all other conformers, on both sides.

density | Density on a grid
Both densities normalized on the grid; divergences in nats. The mode-weight error is the sum of |learned - true| over
the modes.

modes | Populations of the modes

energy_cut | Energies above the cut

likelihood | EBM against exact likelihood
Spread of (EBM − exact) log-likelihood, up to the EBM's constant; where it is known, what ΔF by the EBM's weights is off
by: the difference of log⟨exp(EBM − exact)⟩ between state and rest.

timing | Time
Stages in wall clock, all else in CPU time of all threads and processes (wall clock on a GPU).

counts | Counts

notes | Notes

figures | Figures

settings | Settings
"""
_COSTS = {
    "flow_seconds": "the result",
    "training_seconds": "training before it",
    "md_seconds": "a simulation that knows ΔF as well",
}
_DENSITY = {
    "forward_kl": "KL(true ‖ learned)",
    "reverse_kl": "KL(learned ‖ true)",
    "leaked_mass": "learned mass where there is none",
    "mode_weight_error": "mode-weight error",
}
_CAPTIONS = {
    "torsions": "Free energy over the first two torsions of the molecule, or the density of the only one.",
    "ramachandran": "Free energy over φ and ψ, on one colour scale with one zero (the lowest bin of the first panel).",
    "plane": "Free energy over x and y, on one colour scale with one zero (the lowest bin of the first panel).",
    "energy_histograms": "Potential energy of the reference data, the flow's samples, and these with their weights.",
    "profile": "Free-energy profile; bands are 95% (1.96 standard errors), the state is shaded, gaps were never seen.",
    "surface": "Free energy over two coordinates, its lowest bin the zero, and the standard error of a bin's "
    "-log p; white bins were hardly seen, and nothing is known of them. Frames are the states.",
    "likelihood": "Log-likelihood of the EBM against the exact one for the same samples, mean difference taken off.",
    "learning_curves": "Losses in training and validation; faint lines are single steps.",
    "weights": "Distribution of the log weights.",
    "refinement": "The refinement along β; dotted lines: some state was resampled.",
    "density": "The true density and the learned one, on one colour scale.",
}

Results = Mapping[str, Any]
Rows = list[list[str]]  # of cells, the first row the header; empty where there is nothing to show


def write_report(
    folder: str | Path,
    results: Results,
    figures: Mapping[str, Figure],
    captions: Mapping[str, str] | None = None,
    also: Sequence[str] = (),
) -> Path:
    """Write ``metrics.json``, ``figures/<name>.png`` and ``report.md``, each whole or not at all; return the last.

    Figures are written in other formats ``also``, pdf or svg. ``captions`` add to the usual ones; that of ``profile``
    is that of a molecule's ``<molecule>_profile`` too.
    """
    folder, captions = Path(folder), _CAPTIONS | dict(captions or {})
    with atomic_file(folder / "metrics.json") as path:
        text = json.dumps(_plain(results), indent=2, allow_nan=False, default=str)
        path.write_text(text + "\n", encoding="utf-8")
    for name, figure in figures.items():
        for kind in ("png", *also):
            with atomic_file(folder / "figures" / f"{name}.{kind}") as path:
                figure.savefig(path, format=kind, dpi=200)
    with atomic_file(folder / "report.md") as path:
        images = [f"![{name}](figures/{name}.png)\n\n*{_caption(name, captions)}*" for name in figures]
        path.write_text(_report(_plain(results, keep_infinities=True), images), encoding="utf-8")
    return folder / "report.md"


def summary_table(results: Results) -> str:
    """The figures that matter most, as lines for a terminal."""
    results = _plain(results, keep_infinities=True)
    lines = [_title(results), *(line.replace("**", "") for line in _headline(results))]
    for rows in filter(None, (_ROWS[key](results) for key in _SUMMARY)):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append("")
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def markdown_table(rows: Rows) -> str:
    """Rows of cells, the first of them the header.

    >>> print(markdown_table([["a", "b"], ["1", "2|3"]]))
    | a | b |
    | --- | --- |
    | 1 | 2\\|3 |
    """
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _report(results: Results, images: Sequence[str]) -> str:
    contents = {key: markdown_table(rows) for key, rows_of in _ROWS.items() if (rows := _rows(rows_of, results))}
    bullets = {"headline": _headlines(results), "warnings": _warnings(results), "notes": results.get("notes") or []}
    contents |= {key: "\n".join(f"- {sentence}" for sentence in sentences) for key, sentences in bullets.items()}
    contents["figures"] = "\n\n".join(images)
    of_state = f" of the state {results['state']}" if "state" in results else ""
    parts = [f"# {_title(results) or 'Report'}"]
    for section in _SECTIONS.strip().split("\n\n"):
        first, *text = section.splitlines()
        key, heading = first.split(" | ")
        if contents.get(key):
            parts += [f"## {heading.format(of_state=of_state)}", " ".join(text), contents[key]]
    return "\n\n".join(filter(None, parts)) + "\n"


def _title(results: Results) -> str:
    return " · ".join(str(results[key]) for key in ("system", "method", "budget") if key in results)


def _rows(rows_of: Callable[[Results], Rows], results: Results) -> Rows:
    """Rows of the results themselves, or else those of their members, each with the member's name before it."""
    tables = {name: rows_of(member) for name, member in _items(results, "members")}
    rows = [[name, *row] for name, table in tables.items() for row in table[1:]]
    header = next((["molecule", *table[0]] for table in tables.values() if table), [])
    return rows_of(results) or _headed(header, rows)


def _headlines(results: Results) -> list[str]:
    """The free energy that comes first, how it was made, and the mean energy; or why there is none."""
    told = [f"{name}: {line}" for name, member in _items(results, "members") for line in _headline(member)]
    told = _headline(results) or told
    settings = [f"{key} {results['settings'][key]}" for key in _GIVEN if key in (results.get("settings") or {})]
    return [*told, *([f"Of {'; '.join(settings)}."] if told and settings else [])]


def _headline(results: Results) -> list[str]:
    if not (headline := results.get("headline")):
        return []
    table, names = results["free_energy"], headline.get("apart") or []
    if row := table.get(headline.get("row")):
        text = f"**ΔF = {_value_and_error(row)} kT**, 95% interval {_interval(row)}: "
        text += _FREE_ENERGY_ROWS[headline["row"]]
        if (reference := (table.get("reference") or {}).get("value")) is not None:
            text += f"; {row['value'] - reference:+.2f} from the reference"
    else:
        labels = " and ".join(_FREE_ENERGY_ROWS[name] for name in names)
        why = f"{labels} are more than three joint standard errors apart" if names else _NO_TOTAL
        text = f"**No ΔF of this run can be relied on**: {why}"
    numbers = {name: _value_and_error(row) for name, row in _items(results, "mean_energy")}
    means = [f"{mean} kT ({name}{'' if '±' in mean else ', not reliable'})" for name, mean in numbers.items()]
    return [f"{text}.", *([f"⟨u⟩ = {', '.join(means)}."] if means else [])]


def _warnings(results: Results, whose: str = "") -> Iterator[str]:
    """Why a free energy is not known, or a distance is missing, of the results and of their members."""
    for key, row in _items(results, "free_energy"):
        if row and row.get("message"):
            yield f"{whose}ΔF of the {_FREE_ENERGY_ROWS.get(key, key)}: {row['message']}."
    for name, row in _items(results, "distances"):
        if row.get("missing"):
            yield f"{whose}{name}: {row['missing']}."
    for name, member in _items(results, "members"):
        yield from _warnings(member, f"{name}, ")


def _caption(name: str, captions: Mapping[str, str]) -> str:
    if name in captions:
        return captions[name]
    for key, caption in captions.items():
        if name.endswith(f"_{key}"):
            return f"{name.removesuffix(f'_{key}')}: {caption}"
    return name.replace("_", " ")


# ---- rows ----------------------------------------------------------------------------------------------------------


def _table(key: str, header: list[str], forms: Mapping[str, str]) -> Callable[[Results], Rows]:
    """The rows of ``results[key]``, {name: row}: name, and numbers of the row in their forms."""
    return lambda results: _headed(header, [[name, *_cells(row, forms)] for name, row in _items(results, key)])


def _pairs(key: str, header: list[str]) -> Callable[[Results], Rows]:
    """The rows of ``results[key]``, {name: value}."""
    return lambda results: _headed(header, [[name, _short(value)] for name, value in _items(results, key)])


def _member_rows(results: Results) -> Rows:
    members, average = results.get("members") or {}, results.get("average") or {}
    kinds, shares = ("E-W2 (kT)", "T-W2 (rad)"), {"right_graph": ".1%", "kept": ".1%"}
    header = ["molecule", "bonds right", "and chirality", "ESS", "Pareto-k", "ΔF weighted", "ΔF simulation", "error"]
    header += ["E-W2", "T-W2", "EBM − exact", "speed-up", "with training"]
    rows = []
    for name, member in members.items():
        free_energy = member.get("free_energy") or {}
        distances = (_distance_cell((member.get("distances") or {}).get(kind) or {}) for kind in kinds)
        rows.append(
            [
                name,
                *_cells(member.get("made"), shares),
                *_cells(next(iter((member.get("ess") or {}).values()), None), {"ess": ".2%", "pareto_k": ".2f"}),
                *(_free_energy_cell(free_energy.get(key) or {}) for key in (member.get("weighted"), "reference")),
                _number(member.get("error"), "+.2f"),
                *distances,
                *_cells(member.get("likelihood"), {"std": ".2f"}),
                *_cells(member.get("md"), _SPEED_UPS),
            ]
        )
    if rows and average:
        error = _number(average.get("abs_error"), ".2f")
        best = "refined" if any(key.endswith(", refined") for key in average) else "weighted"
        moved = (_cells(average, {f"{kind}, unweighted": ".2f", f"{kind}, {best}": ".2f"}) for kind in kinds)
        row = ["average", *_cells(average, shares | {"ess": ".2%"}), "", "", ""]
        row += ["–" if error == "–" else f"{error} in size", *map(" → ".join, moved), ""]
        rows.append([*row, *_cells(average, _SPEED_UPS)])
    return _headed(header, rows)


def _distance_cell(row: Results) -> str:
    """Without weights → with them, or refined (floor)."""
    best = "refined" if row.get("refined") is not None else "weighted"
    before, after, floor = _cells(row, {"unweighted": ".2f", best: ".2f", "floor": ".2f"})
    return f"{before} → {after} ({floor})"


def _free_energy_cell(row: Results) -> str:
    """ΔF and its interval; in words where a side was not visited, or where the number cannot be relied on."""
    for side in ("state", "rest"):
        if row.get(f"n_{side}") == 0:
            return "not visited" if side == "state" else "rest not visited"
    value = row.get("value")
    if value is None or not math.isfinite(value):
        return "no weight on one side" if row else "–"
    return f"{value:.2f} {_interval(row)}"


def _free_energy_rows(results: Results) -> Rows:
    table, rows = results.get("free_energy") or {}, []
    reference = (table.get("reference") or {}).get("value")
    for key in sorted(table, key=lambda key: [*_FREE_ENERGY_ROWS, key].index(key)):
        if not (row := table[key]):
            continue
        value, interval = row.get("value"), _interval(row)
        kind = "" if interval == "–" else "total" if key in results.get("total", ()) else "sampling"
        no_difference = key == "reference" or reference is None
        off = "" if no_difference else _number(None if value is None else value - reference, "+.2f")
        seen = f"{row['n_state']} / {row['n_rest']}" if "n_state" in row else ""
        numbers = _cells(row, {"value": ".2f", "std_error": ".2f"})
        rows.append([_FREE_ENERGY_ROWS.get(key, key), *numbers, interval, kind, off, seen])
    header = ["weights", "ΔF (kT)", "std. error", "95% interval", "kind", "− reference", "samples state / rest"]
    return _headed(header, rows)


def _phi_rows(results: Results) -> Rows:
    """ΔF of the state's φ, by the rows that all have, and of the others."""
    others = results.get("others") or {}
    tables: dict[Any, Any] = {results.get("coordinate"): results.get("free_energy") or {}} | others
    names = [name for name in _FREE_ENERGY_ROWS if any(name in table for table in others.values())]
    rows = [
        [phi.replace("phi", "φ"), *(_free_energy_cell(table.get(name) or {}) for name in names)]
        for phi, table in sorted(tables.items() if others else (), key=lambda item: (len(item[0]), item[0]))
    ]
    return _headed(["", *(_FREE_ENERGY_ROWS[name] for name in names)], rows)


def _population_rows(results: Results) -> Rows:
    table = results.get("populations") or {}
    names = [name for name in _FREE_ENERGY_ROWS if any(name in rows for rows in table.values())]
    rows = [
        [word.replace("-", "−"), *(_population_cell(row.get(name) or {}) for name in names)]
        for word, row in table.items()
    ]
    return _headed(["state", *(_FREE_ENERGY_ROWS[name] for name in names)], rows)


def _population_cell(row: Results) -> str:
    """In %, with its interval."""
    if row.get("value") is None:
        return "–"
    value, *interval = (_number(100 * x, ".1f") for x in (row["value"], *(row.get("interval") or ())))
    return f"{value} not reliable" if row.get("reliable") is False else f"{value} [{', '.join(interval)}]"


def _made_rows(results: Results) -> Rows:
    made, header = (
        results.get("made"),
        ["right bonds", "right chirality", "mirrored", "reordered", "peptide bond turned"],
    )
    forms = dict.fromkeys(("right_graph", "kept", "mirrored", "reordered", "turned"), ".2%")
    return _headed(header, [_cells(made, forms)] if made else [])


def _distance_rows(results: Results) -> Rows:
    table, rows = results.get("distances") or {}, []
    there = {side for row in table.values() for side in row}
    sides = [side for side in _SIDES if side in there or side not in ("refined", "rebalanced")]
    for name, row in _items(results, "distances"):
        best = "refined" if "refined" in row else "weighted"
        unweighted, weighted, floor = (_mean(row.get(side)) for side in ("unweighted", best, "floor"))
        ratio = None
        if unweighted is not None and weighted is not None and floor is not None and unweighted > floor:
            ratio = (weighted - floor) / (unweighted - floor)
        rows.append([name, *(_mean_and_std(row.get(side)) for side in sides), _number(ratio, ".2f")])
    return _headed(["distance", *sides, "excess ratio"], rows)


def _refinement_rows(results: Results) -> Rows:
    steps = (results.get("refinement") or {}).get("steps") or []
    some = sorted({round(k) for k in np.linspace(0, len(steps) - 1, min(len(steps), MOST_STEPS))})
    forms = {"beta": ".4f", "cess": ".2f", "ess": ".2f", "acceptance": ".2f", "step_size": ".2g"}
    forms |= {"ancestors": "d", "mean_u": ".2f"}
    header = ["from", "step", "β", "conditional ESS", "ESS", "acceptance", "step size", "ancestors", "⟨u⟩ (kT)"]
    rows = [[steps[k].get("leg", "–"), f"{k + 1} of {len(steps)}", *_cells(steps[k], forms)] for k in some]
    return _headed(header, rows)


def _lineage_rows(results: Results) -> Rows:
    table = (results.get("refinement") or {}).get("lineages") or {}
    forms = {"walkers": "d", "ancestors": "d", "effective": ".1f"}
    return _headed(
        ["samples in", "walkers", "ancestors", "effective"], [[k, *_cells(v, forms)] for k, v in table.items()]
    )


def _held_out_rows(results: Results) -> Rows:
    forms = {"n": "d", "n_outside": "d", "share_outside": ".3%"}
    rows = [
        [name, " ± ".join(_cells(row, {"nll": ".3f", "std_error": ".3f"})), *_cells(row, forms)]
        for name, row in _items(results, "held_out")
    ]
    return _headed(["whose", "NLL", "data points", "outside the domain", "their share by weight"], rows)


def _density_rows(results: Results) -> Rows:
    table = results.get("density") or {}
    rows = [[name, _number(table[key], ".4f")] for key, name in _DENSITY.items() if table.get(key) is not None]
    return _headed(["what", "value"], rows)


def _mode_rows(results: Results) -> Rows:
    table = results.get("modes") or {}
    if not table:
        return []
    exact, *others = np.array(list(table.values()), dtype=np.float64)
    errors, seen = [np.abs(other - exact) for other in others], exact > 0
    modes = [[str(k), *(_number(w, ".4f") for w in row)] for k, row in enumerate(zip(exact, *others, strict=True))]
    return [
        ["mode", *table],
        *(modes if len(modes) <= MOST_MODES else []),
        ["largest error", "", *(_number(error.max(), ".4f") for error in errors)],
        ["largest relative error", "", *(_number((error[seen] / exact[seen]).max(), ".1%") for error in errors)],
    ]


def _energy_cut_rows(results: Results) -> Rows:
    table = results.get("energy_cut") or {}
    cut = _number(table.get("cut"), ".1f")
    rows = [[name, cut, _number(share, ".3%")] for name, share in _items(table, "shares")]
    return _headed(["energies", "cut (kT)", "share above it"], rows)


def _likelihood_rows(results: Results) -> Rows:
    table = results.get("likelihood") or {}
    if not table:
        return []
    spread = " ± ".join(_cells(table, {"std": ".2f", "std_error": ".2f"}))
    first = ["all", *_cells(table, {"n": "d"}), spread, *_cells(table, {"pearson_r": ".3f", "slope": ".2f"})]
    states = [[name, *_cells(row, {"n": "d", "std": ".2f"}), "", ""] for name, row in _items(table, "per_state")]
    for key, bias in _items(results, "ebm_bias"):
        off = " ± ".join(_cells(bias, {"value": "+.2f", "std_error": ".2f"}))
        states.append([f"state − rest: ΔF of the {_FREE_ENERGY_ROWS[key]} is off by", "", off, "", ""])
    return [["samples in", "n", "std of (EBM − exact) (kT)", "Pearson r", "slope"], first, *states]


def _timing_rows(results: Results) -> Rows:
    table = results.get("timing") or {}
    ebm, exact = table.get("ebm_per_sample"), table.get("exact_per_sample")
    each = (("EBM", ebm), ("exact", exact))
    rows = [[f"{name} likelihood, per sample", _seconds(s)] for name, s in each if s is not None]
    if (refine := table.get("refine_per_sample")) is not None:
        rows.append(["refinement, per sample", _seconds(refine)])
    if ebm and exact:
        rows.append(["exact / EBM likelihood", f"{exact / ebm:.0f} times"])
    if md := results.get("md"):
        rows += [[what, _seconds(md[key])] for key, what in _COSTS.items()]
        rows.append(["speed-up; with the training", "; ".join(_cells(md, _SPEED_UPS))])
    rows += [[stage, _seconds(seconds)] for stage, seconds in _items(table, "stages")]
    return _headed(["what", "time"], rows)


_EXCLUDED = ["conformers", "samples", "share by count", "share by weight", "share of the reference data"]
_ROWS = {
    "members": _member_rows,
    "free_energy": _free_energy_rows,
    "others": _phi_rows,
    "populations": _population_rows,
    "ess": _table("ess", ["weights", "ESS", "Pareto-k", "samples"], {"ess": ".3%", "pareto_k": ".2f", "n": "d"}),
    "refinement": _refinement_rows,
    "lineages": _lineage_rows,
    "made": _made_rows,
    "distances": _distance_rows,
    "held_out": _held_out_rows,
    "excluded": _table("excluded", _EXCLUDED, {"n": "d", "by_count": ".4%", "by_weight": ".4%", "data": ".4%"}),
    "density": _density_rows,
    "modes": _mode_rows,
    "energy_cut": _energy_cut_rows,
    "likelihood": _likelihood_rows,
    "timing": _timing_rows,
    "counts": _pairs("counts", ["what", "number"]),
    "settings": _pairs("settings", ["setting", "value"]),
}
_SUMMARY = ("members", "free_energy", "others", "populations", "ess", "modes", "distances", "likelihood", "timing")


# ---- cells ---------------------------------------------------------------------------------------------------------


def _items(results: Results, key: str) -> Iterator[tuple[str, Any]]:
    yield from (results.get(key) or {}).items()


def _headed(header: list[str], rows: Rows) -> Rows:
    return [header, *rows] if rows else []


def _cells(row: Results | None, forms: Mapping[str, str]) -> list[str]:
    """The numbers ``row[key]`` in their forms; dashes for those that are not there."""
    return [_number(_mean((row or {}).get(key)), form) for key, form in forms.items()]


def _number(value: float | None, form: str) -> str:
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return format(value, form)


def _short(value: Any) -> str:
    return format(value, ".5g") if isinstance(value, float) else str(value)


def _seconds(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 1.0:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 120.0 else f"{seconds / 60.0:.1f} min"


def _interval(row: Results) -> str:
    """The interval of a ΔF, or that there is none to believe."""
    if row.get("reliable") is False:
        return "not reliable"
    interval = row.get("interval")
    return f"[{', '.join(_number(end, '.2f') for end in interval)}]" if interval else "–"


def _mean(entry: float | Results | None) -> float | None:
    return entry.get("mean") if isinstance(entry, Mapping) else entry


def _value_and_error(row: Results) -> str:
    return " ± ".join(cell for cell in _cells(row, {"value": ".2f", "std_error": ".2f"}) if cell != "–")


def _mean_and_std(entry: float | Results | None) -> str:
    if isinstance(entry, Mapping):
        return " ± ".join(_cells(entry, {"mean": ".3f", "std": ".3f"}))
    return _number(entry, ".3f")


def _plain(value: Any, keep_infinities: bool = False) -> Any:
    """``value`` in the types of JSON: dataclasses as dicts, arrays as lists, what is not finite as None unless kept."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, keep_infinities) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, keep_infinities) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return value if keep_infinities else None
    return value
