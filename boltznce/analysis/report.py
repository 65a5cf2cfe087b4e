"""What a run leaves for its reader: ``metrics.json``, ``figures/*.png``, ``report.md`` and a short table for the terminal.

``results`` is a nested dict; a section that is not there is left out of the report. Dataclasses may stand in it as they
are.

==============  ==============================================================================================
key             value
==============  ==============================================================================================
system          name method          name budget          name settings        {setting: value} counts          {what:
number}, such as samples drawn, kept, mirrored, with a cis peptide bond state           the state of the free energies
in words, such as "0 < φ < 2 rad" free_energy     {"reference" | "ebm" | "corrected" | "exact" | "unweighted": {value,
std_error, interval, ...}} in kT, the
                fields of FreeEnergyDifference, or of CorrectedFreeEnergyDifference for "corrected" (its interval is the
                *total* one); any other key is a row of that name. ``reliable=False`` hides the interval and shows
                ``message``; left out it counts as true.
ess             {which weights: {ess, pareto_k, n}}, ess relative distances       {name: {unweighted, weighted, floor}},
each a number, or {mean, std} as SampledDistance has; "missing": why one is NaN held_out        {whose: the fields of
HeldOutLikelihood} excluded        {conformers that are left out: {n, by_count, by_weight, data}}, shares; data: of the
reference data, by weight energy_cut      {"cut": kT, "shares": {whose energies: share above the cut}} likelihood
the fields of LikelihoodAgreement density         the fields of DensityErrors modes           {whose: [population of
each mode]}, the exact ones first timing          {"ebm_per_sample": s, "exact_per_sample": s, "stages": {stage: s}}
peptides        {name: {right_graph, kept (shares of the draws), ess: {ess, pareto_k, n}, free_energy: {reference,
weighted}, error,
                distances, agreement, md: {speed_up}}} of molecules that a model was never trained on; both ΔF have the
                fields of FreeEnergyDifference
average         {the same names, and "abs_error": mean over the peptides}
notes           [sentence, ...]
==============  ==============================================================================================
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from boltznce.io import atomic_file

__all__ = ["markdown_table", "summary_table", "write_report"]

MOST_MODES = 12  # of a table of their populations
_FREE_ENERGY_ROWS = {
    "reference": "reference",
    "ebm": "EBM weights",
    "corrected": "EBM weights, corrected by exact likelihoods of a subset",
    "exact": "exact weights",
    "unweighted": "flow, unweighted",
}
_CAPTIONS = {
    "ramachandran": "Free energy over φ and ψ, on one colour scale with one zero (the lowest bin of the first panel).",
    "plane": "Free energy over x and y, on one colour scale with one zero (the lowest bin of the first panel).",
    "energy_histograms": "Potential energy of the reference data, the flow's samples, and these with their weights.",
    "profile": "Free-energy profile; bands are 95% (1.96 standard errors), the state is shaded, gaps were never seen.",
    "likelihood": "Log-likelihood of the EBM against the exact one for the same samples, the mean difference taken off.",
    "learning_curves": "Losses in training and validation; faint lines are single steps.",
    "weights": "Distribution of the log weights.",
    "density": "The true density and the learned one, on one colour scale.",
}


def write_report(
    folder: str | Path,
    results: Mapping[str, Any],
    figures: Mapping[str, Figure],
    captions: Mapping[str, str] | None = None,
) -> Path:
    """Write ``metrics.json``, ``figures/<name>.png`` and ``report.md`` into ``folder``, each whole or not at all; return the last."""
    folder = Path(folder)
    plain = _plain(results)
    with atomic_file(folder / "metrics.json") as path:
        path.write_text(json.dumps(plain, indent=2, allow_nan=False, default=str) + "\n", encoding="utf-8")
    for name, figure in figures.items():
        with atomic_file(folder / "figures" / f"{name}.png") as path:
            figure.savefig(path, format="png", dpi=200)
    with atomic_file(folder / "report.md") as path:
        path.write_text(
            _report(_plain(results, keep_infinities=True), list(figures), _CAPTIONS | dict(captions or {})),
            encoding="utf-8",
        )
    return folder / "report.md"


def summary_table(results: Mapping[str, Any]) -> str:
    """The figures that matter most, as lines for a terminal."""
    results = _plain(results, keep_infinities=True)
    lines = [" · ".join(str(results[key]) for key in ("system", "method", "budget") if key in results)]
    sections = (_peptide_rows, _free_energy_rows, _ess_rows, _mode_rows, _distance_rows, _likelihood_rows, _timing_rows)
    for rows in (rows_of(results) for rows_of in sections):
        if rows:
            widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
            lines.append("")
            lines += [
                "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
            ]
    return "\n".join(lines)


def _report(results: dict[str, Any], figures: list[str], captions: Mapping[str, str]) -> str:
    title = " · ".join(str(results[key]) for key in ("system", "method", "budget") if key in results)
    parts = [f"# {title or 'Report'}"]

    def section(heading: str, rows: list[list[str]], text: str = "") -> None:
        if rows:
            parts.extend([f"## {heading}", *([text] if text else []), markdown_table(rows)])

    where = f" of the state {results['state']}" if "state" in results else ""
    section(
        f"Free-energy difference{where}",
        _free_energy_rows(results),
        "ΔF = −log P(state)/P(rest), in kT. *Sampling* intervals (95%) hold the noise of the samples, by bootstrap; the *total* one also "
        "the error of the EBM, measured on exact likelihoods of a subset.",
    )
    warnings = [
        f"{_FREE_ENERGY_ROWS.get(key, key)}: {row['message']}."
        for key, row in results.get("free_energy", {}).items()
        if row and row.get("message")
    ]
    _bullets(parts, "Why a figure cannot be relied on:", warnings)
    section(
        f"Peptides never trained on: free-energy difference{where}",
        _peptide_rows(results),
        "Shares of the draws with the right bonds, and with the right chirality too, after mending. ΔF in kT, of the weighted samples and "
        "of the simulation, with its 95% interval by bootstrap. E-W2 (kT) and T-W2 (rad): Wasserstein-2 distances to the simulation, "
        "without weights → with them (floor: two halves of the simulation). EBM − exact: standard deviation of the difference of the "
        "log-likelihoods (kT). Above a Pareto-k of 0.7 no weighted figure of a row can be trusted.",
    )
    _bullets(parts, "Why a figure cannot be relied on, or is missing:", _peptide_warnings(results))
    section(
        "Weights",
        _ess_rows(results),
        "ESS is the effective share of the samples. Above a Pareto-k of 0.7 averages over the weights, ESS among them, cannot be trusted.",
    )
    section(
        "Distances to the reference data",
        _distance_rows(results),
        "Wasserstein-2 distances of energies (kT), and of (φ, ψ) on the torus (rad) or of positions in the plane; KL, where given, is "
        "KL(data ‖ flow) in nats. The floor is the value between two halves of the reference data; the last column is "
        "(weighted − floor) / (unweighted − floor).",
    )
    _bullets(parts, "Why a distance is missing:", _missing_distances(results.get("distances")))
    section(
        "Likelihood of held-out data",
        _held_out_rows(results),
        "Mean negative log-likelihood over the data inside the flow's domain, in nats (positions in nm). Outside it there is no density.",
    )
    section(
        "Conformers left out",
        _excluded_rows(results),
        "Free energies, distances and figures are conditional on all other conformers, on both sides.",
    )
    section(
        "Density on a grid",
        _density_rows(results),
        "Both densities normalized on the grid; divergences in nats. The mode-weight error is the sum of |learned - true| over the modes.",
    )
    section("Populations of the modes", _mode_rows(results))
    section("Energies above the cut", _energy_cut_rows(results))
    section(
        "EBM against exact likelihood",
        _likelihood_rows(results),
        "Spread of (EBM − exact) log-likelihood, up to the EBM's constant.",
    )
    section("Time", _timing_rows(results))
    section("Counts", _key_value_rows(results.get("counts"), "what", "number"))
    if results.get("notes"):
        parts.extend(["## Notes", "\n".join(f"- {note}" for note in results["notes"])])
    if figures:
        parts.append("## Figures")
        parts.extend(
            f"![{name}](figures/{name}.png)\n\n*{captions.get(name, name.replace('_', ' '))}*" for name in figures
        )
    section("Settings", _key_value_rows(results.get("settings"), "setting", "value"))
    return "\n\n".join(parts) + "\n"


def _free_energy_rows(results: dict[str, Any]) -> list[list[str]]:
    table = results.get("free_energy") or {}
    reference = (table.get("reference") or {}).get("value")
    order = [key for key in _FREE_ENERGY_ROWS if key in table] + [key for key in table if key not in _FREE_ENERGY_ROWS]
    rows = []
    for key in order:
        row = table[key]
        if not row:
            continue
        value = row.get("value")
        off = "" if key == "reference" or reference is None else _number(_difference(value, reference), "+.2f")
        kind = "total" if key == "corrected" else "sampling"
        interval = "not reliable" if row.get("reliable") is False else _interval(row.get("interval"))
        seen = f"{row['n_state']} / {row['n_rest']}" if "n_state" in row else ""
        label = _FREE_ENERGY_ROWS.get(key, key)
        rows.append(
            [
                label,
                _number(value, ".2f"),
                _number(row.get("std_error"), ".2f"),
                interval,
                kind if interval != "–" else "",
                off,
                seen,
            ]
        )
    header = ["weights", "ΔF (kT)", "std. error", "95% interval", "kind", "− reference", "samples state / rest"]
    return [header, *rows] if rows else []


def _peptide_rows(results: dict[str, Any]) -> list[list[str]]:
    peptides, average = results.get("peptides") or {}, results.get("average") or {}
    if not peptides:
        return []

    def distance(row: dict[str, Any]) -> str:
        unweighted, weighted, floor = (
            _number(_mean(row.get(key)), ".2f") for key in ("unweighted", "weighted", "floor")
        )
        return f"{unweighted} → {weighted} ({floor})"

    header = [
        "peptide",
        "bonds right",
        "and chirality",
        "ESS",
        "Pareto-k",
        "ΔF weighted",
        "ΔF simulation",
        "error",
        "E-W2",
        "T-W2",
    ]
    header += ["EBM − exact", "speed-up"]
    rows = []
    for name, row in peptides.items():
        free_energy, agreement = row["free_energy"], row.get("agreement") or {}
        rows.append(
            [
                name,
                _number(row.get("right_graph"), ".1%"),
                _number(row.get("kept"), ".1%"),
                _number(row["ess"].get("ess"), ".2%"),
                _number(row["ess"].get("pareto_k"), ".2f"),
                _free_energy_cell(free_energy["weighted"]),
                _free_energy_cell(free_energy["reference"]),
                _number(row.get("error"), "+.2f"),
                *(distance(row["distances"][kind]) for kind in ("E-W2 (kT)", "T-W2 (rad)")),
                _number(agreement.get("std"), ".2f"),
                _number((row.get("md") or {}).get("speed_up"), ".3g"),
            ]
        )
    if not average:
        return [header, *rows]
    moved = [
        f"{_number(average.get(f'{kind}, unweighted'), '.2f')} → {_number(average.get(f'{kind}, weighted'), '.2f')}"
        for kind in ("E-W2 (kT)", "T-W2 (rad)")
    ]
    shares = [
        _number(average.get("right_graph"), ".1%"),
        _number(average.get("kept"), ".1%"),
        _number(average.get("ess"), ".2%"),
    ]
    error, speed_up = _number(average.get("abs_error"), ".2f"), _number(average.get("speed_up"), ".3g")
    return [
        header,
        *rows,
        ["average", *shares, "", "", "", "–" if error == "–" else f"{error} in size", *moved, "", speed_up],
    ]


def _free_energy_cell(row: dict[str, Any]) -> str:
    """ΔF and its interval; in words where a side was not visited, or where the number cannot be relied on."""
    for side in ("state", "rest"):
        if row.get(f"n_{side}") == 0:
            return "not visited" if side == "state" else "rest not visited"
    value = row.get("value")
    if value is None or not math.isfinite(value):
        return "no weight on one side"
    return f"{value:.2f} " + ("not reliable" if row.get("reliable") is False else _interval(row.get("interval")))


def _peptide_warnings(results: dict[str, Any]) -> list[str]:
    names = {"reference": "simulation", "weighted": "weighted samples"}
    warnings = []
    for peptide, row in (results.get("peptides") or {}).items():
        messages = ((label, (row["free_energy"].get(key) or {}).get("message")) for key, label in names.items())
        warnings += [f"{peptide}, ΔF of the {label}: {message}." for label, message in messages if message]
        warnings += [f"{peptide}, {sentence}" for sentence in _missing_distances(row.get("distances"))]
    return warnings


def _missing_distances(distances: Mapping[str, Any] | None) -> list[str]:
    return [f"{name}: {row['missing']}." for name, row in (distances or {}).items() if row.get("missing")]


def _bullets(parts: list[str], heading: str, sentences: list[str]) -> None:
    if sentences:
        parts.append("\n".join([heading, "", *(f"- {sentence}" for sentence in sentences)]))


def _ess_rows(results: dict[str, Any]) -> list[list[str]]:
    table = results.get("ess") or {}
    rows = [
        [name, _number(row.get("ess"), ".3%"), _number(row.get("pareto_k"), ".2f"), _number(row.get("n"), "d")]
        for name, row in table.items()
    ]
    return [["weights", "ESS", "Pareto-k", "samples"], *rows] if rows else []


def _distance_rows(results: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, row in (results.get("distances") or {}).items():
        unweighted, weighted, floor = (_mean(row.get(key)) for key in ("unweighted", "weighted", "floor"))
        ratio = float("nan")
        if None not in (unweighted, weighted, floor) and unweighted > floor:
            ratio = (weighted - floor) / (unweighted - floor)
        rows.append(
            [name, *(_mean_and_std(row.get(key)) for key in ("unweighted", "weighted", "floor")), _number(ratio, ".2f")]
        )
    return [["distance", "unweighted", "weighted", "floor", "excess ratio"], *rows] if rows else []


def _held_out_rows(results: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, row in (results.get("held_out") or {}).items():
        nll = f"{_number(row.get('nll'), '.3f')} ± {_number(row.get('std_error'), '.3f')}"
        rows.append(
            [
                name,
                nll,
                _number(row.get("n"), "d"),
                _number(row.get("n_outside"), "d"),
                _number(row.get("share_outside"), ".3%"),
            ]
        )
    return [["whose", "NLL", "data points", "outside the domain", "their share by weight"], *rows] if rows else []


def _excluded_rows(results: dict[str, Any]) -> list[list[str]]:
    rows = [
        [name, _number(row.get("n"), "d"), *(_number(row.get(key), ".4%") for key in ("by_count", "by_weight", "data"))]
        for name, row in (results.get("excluded") or {}).items()
    ]
    return (
        [["conformers", "samples", "share by count", "share by weight", "share of the reference data"], *rows]
        if rows
        else []
    )


def _density_rows(results: dict[str, Any]) -> list[list[str]]:
    table = results.get("density") or {}
    names = {
        "forward_kl": "KL(true ‖ learned)",
        "reverse_kl": "KL(learned ‖ true)",
        "leaked_mass": "learned mass where there is none",
    }
    names["mode_weight_error"] = "mode-weight error"
    rows = [[name, _number(table.get(key), ".4f")] for key, name in names.items() if table.get(key) is not None]
    return [["what", "value"], *rows] if rows else []


def _mode_rows(results: dict[str, Any]) -> list[list[str]]:
    table = results.get("modes") or {}
    if not table:
        return []
    (name, exact), *others = table.items()
    modes = [
        [str(k), _number(weight, ".4f"), *(_number(values[k], ".4f") for _, values in others)]
        for k, weight in enumerate(exact)
    ]
    errors = [[abs(a - b) for a, b in zip(values, exact, strict=True)] for _, values in others]
    relative = [[error / a for error, a in zip(row, exact, strict=True) if a > 0] for row in errors]
    shown = modes if len(modes) <= MOST_MODES else []
    return [
        ["mode", name, *(other for other, _ in others)],
        *shown,
        ["largest error", "", *(_number(max(row), ".4f") for row in errors)],
        ["largest relative error", "", *(_number(max(row), ".1%") for row in relative)],
    ]


def _energy_cut_rows(results: dict[str, Any]) -> list[list[str]]:
    table = results.get("energy_cut") or {}
    rows = [[name, _number(share, ".3%")] for name, share in (table.get("shares") or {}).items()]
    return [["energies", f"share above {_number(table.get('cut'), '.1f')} kT"], *rows] if rows else []


def _likelihood_rows(results: dict[str, Any]) -> list[list[str]]:
    table = results.get("likelihood") or {}
    if not table:
        return []
    spread = f"{_number(table.get('std'), '.2f')} ± {_number(table.get('std_error'), '.2f')}"
    first = [
        "all",
        _number(table.get("n"), "d"),
        spread,
        _number(table.get("pearson_r"), ".3f"),
        _number(table.get("slope"), ".2f"),
    ]
    states = [
        [name, _number(row.get("n"), "d"), _number(row.get("std"), ".2f"), "", ""]
        for name, row in (table.get("per_state") or {}).items()
    ]
    return [["samples in", "n", "std of (EBM − exact) (kT)", "Pearson r", "slope"], first, *states]


def _timing_rows(results: dict[str, Any]) -> list[list[str]]:
    table = results.get("timing") or {}
    ebm, exact = table.get("ebm_per_sample"), table.get("exact_per_sample")
    rows = [
        [f"{name} likelihood, per sample", _seconds(value)]
        for name, value in (("EBM", ebm), ("exact", exact))
        if value is not None
    ]
    if ebm and exact:
        rows.append(["exact / EBM likelihood", f"{exact / ebm:.0f} times"])
    rows += [[stage, _seconds(seconds)] for stage, seconds in (table.get("stages") or {}).items()]
    return [["what", "time"], *rows] if rows else []


def _key_value_rows(table: Mapping[str, Any] | None, key: str, value: str) -> list[list[str]]:
    return [[key, value], *([name, _short(entry)] for name, entry in table.items())] if table else []


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of cells, the first of them the header."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


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


def _interval(interval: list[float] | None) -> str:
    return f"[{_number(interval[0], '.2f')}, {_number(interval[1], '.2f')}]" if interval else "–"


def _difference(a: float | None, b: float) -> float | None:
    return None if a is None else a - b


def _mean(entry: float | dict[str, float] | None) -> float | None:
    return entry.get("mean") if isinstance(entry, dict) else entry


def _mean_and_std(entry: float | dict[str, float] | None) -> str:
    spread = f" ± {_number(entry['std'], '.3f')}" if isinstance(entry, dict) and "std" in entry else ""
    return _number(_mean(entry), ".3f") + spread


def _plain(value: Any, keep_infinities: bool = False) -> Any:
    """``value`` in the types of JSON: dataclasses as dicts, arrays as lists, numbers that are not finite as None unless kept."""
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
