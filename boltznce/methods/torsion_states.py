"""States by every φ of a peptide: ΔF of the state's interval of each, and populations of their patterns, as ``--+``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from boltznce.analysis.bar import TwoSidedStates, two_sided_states
from boltznce.analysis.free_energy import ebm_bias, free_energy_difference, judged_by_exact
from boltznce.analysis.populations import population_of
from boltznce.analysis.weights import normalized_weights
from boltznce.methods.findings import Findings
from boltznce.methods.views import residues
from boltznce.smc import refined_free_energy_difference
from boltznce.states import in_interval, patterns
from boltznce.systems.base import System

__all__ = ["TOTAL", "judge", "of_each_phi", "rebalanced", "two_sided"]

TOTAL = ("two_sided", "corrected", "exact")  # rows whose errors are total, and "refined" from an exact likelihood
LEAST = 0.01  # of a population that is told of
ABOVE_ZERO = (0.0, np.inf)
ALPHA = (-2.0, 0.8)  # of ψ, rad, where helices are

Masks = Mapping[str, np.ndarray]  # of "draws", "refined" and "data", each as long as there are


def of_each_phi(f: Findings) -> dict[str, Any]:
    """``others``: {φ: rows of ΔF} of the state's interval; ``populations``: {pattern: rows}; none where one φ is all.

    Rows, by their names in the table of ΔF, are those of weighted draws, refined walkers, BAR and the reference.
    """
    names = _phis(f.system)
    if len(names) < 2:
        return {}
    inside = {whose: _inside(f.system, positions, names) for whose, positions in _positions(f).items()}
    words = {whose: patterns(masks) for whose, masks in inside.items()}
    sides = two_sided(f, words["draws"], words.get("refined" if f.refined_frames else "data"))
    others = {}
    for k, name in enumerate(names):
        if name != f.system.state.coordinate:
            two = {"two_sided": sides.difference([word for word in sides.labels if word[k] == "+"])} if sides else {}
            known = _row((f.reference or {}).get("others", {}).get(name))
            others[name] = _rows(f, {whose: masks[k] for whose, masks in inside.items()}, two, known)
    populations = _populations(f, words, sides, _reference_populations(f.reference or {}, names))
    return {"coordinate": f.system.state.coordinate, "others": others, "populations": populations}


def two_sided(f: Findings, of_draws: np.ndarray, of_frames: np.ndarray) -> TwoSidedStates | None:
    """BAR of states by the labels of `Findings.samples` and `Findings.frames`; None where exact likelihoods lack.

    These were chosen at random in the system's state and in the rest, so no label may be in both.
    """
    if f.sides is None:
        return None
    (draws, subset, log_weights), frames = f.sides, f.frames
    return two_sided_states(
        of_draws,
        draws.index,
        f.samples.energy[draws.index] + draws.log_prob,
        of_frames[subset.index],
        frames.energies[subset.index] + subset.log_prob,
        frames_log_weights=log_weights,
        groups=frames.groups[subset.index],
    )


def rebalanced(f: Findings) -> np.ndarray | None:
    """Log weights (refined,) of walkers whose three regions have the populations by BAR; within one as they were.

    The state of φ, and of the rest what has ψ in `ALPHA`, and what has not. For molecules whose one residue with φ and
    ψ has the state; None for others, and where one of the regions is not reliable.
    """
    pairs = residues(f.system.dihedrals)
    if f.refined is None or f.sides is None or [phi for phi, _ in pairs] != [f.system.state.coordinate]:
        return None

    def regions(positions: np.ndarray) -> np.ndarray:
        positions = np.asarray(positions)
        rest = np.where(in_interval(f.system.coordinate(positions, pairs[0][1]), ALPHA), "alpha", "beta")
        return np.where(f.system.in_state(positions), "state", rest)

    ours, sides = regions(f.refined.positions), two_sided(f, regions(f.samples.positions), regions(f.frames.positions))
    own, known = _shares(ours, f.refined.log_weights), dict(zip(sides.labels.tolist(), sides.populations, strict=True))
    if set(own) != set(known) or not all(own.values()) or not all(sides.difference([k]).reliable for k in known):
        return None
    return f.refined.log_weights + sum((ours == region) * np.log(known[region] / own[region]) for region in known)


def judge(rows: dict, name: str) -> dict | None:
    """Take a row that an EBM's likelihood made for reliable only where exact ones do; its bias, by them."""
    ebm, known = rows[name], [rows[name] for name in TOTAL if name in rows]
    reliable = [row for row in known if row.reliable]
    exact = min(reliable or known[:1], key=lambda row: ebm_bias(ebm, row)[1], default=None)
    rows[name] = judged_by_exact(ebm, exact)
    return None if exact is None else dict(zip(("value", "std_error"), ebm_bias(ebm, exact), strict=True))


def _phis(system: System) -> list[str]:
    """Names of every φ, in order; none where the state is not of one."""
    names = [name for name in system.dihedrals if name.startswith("phi")]
    return names if system.state is not None and system.state.coordinate in names else []


def _positions(f: Findings) -> dict[str, np.ndarray]:
    sets = {"draws": f.samples, "refined": f.refined, "data": f.data and f.data.frames}
    return {whose: samples.positions for whose, samples in sets.items() if samples is not None}


def _inside(system: System, positions: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
    """Of each coordinate, masks (n,) of the positions in the state's interval."""
    positions = np.asarray(positions)
    return [system.state.contains(system.coordinate(positions, name)) for name in names]


def _rows(f: Findings, inside: Masks, more: Mapping[str, Any], reference: Any) -> dict[str, Any]:
    """ΔF of a state by masks of who is in it, and ``more`` rows; data whose errors are known are the reference of none.

    Those of an EBM are reliable only where ``more`` rows say so.
    """
    values = {whose: np.where(mask, 1.0, -1.0) for whose, mask in inside.items()}
    if reference is None and "data" in inside and (units := f.units_of(inside["data"])) is not None:
        log_weights = f.data.frames.log_weights
        reference = free_energy_difference(values["data"], log_weights, ABOVE_ZERO, walkers=units)
    rows = {"reference": reference} if reference is not None else {}
    if f.weighed:
        rows[f.likelihood] = free_energy_difference(values["draws"], f.samples.log_weights, ABOVE_ZERO, **f.bootstrap)
    if f.refined is not None:
        given = values["refined"], f.refined.log_weights, f.refined.ancestors
        rows["refined"] = refined_free_energy_difference(*given, ABOVE_ZERO)
    rows |= more
    for name in {"ebm", "refined"} & set(rows) if f.likelihood == "ebm" else ():
        judge(rows, name)
    return rows


def _populations(
    f: Findings, words: Masks, sides: TwoSidedStates | None, reference: Mapping[str, dict]
) -> dict[str, dict[str, Any]]:
    """{pattern: rows} of what any row has for a hundredth or more, in the order of the first row."""
    shares = [{word: row["value"] for word, row in reference.items()}]
    shares += [_shares(words["draws"], f.samples.log_weights)] if f.weighed else []
    shares += [_shares(words["refined"], f.refined.log_weights)] if f.refined is not None else []
    shares += [dict(zip(sides.labels.tolist(), np.nan_to_num(sides.populations), strict=True))] if sides else []
    found = {}
    for word in sorted(set().union(*shares), key=lambda word: -next(s[word] for s in shares if word in s)):
        if max(share.get(word, 0.0) for share in shares) >= LEAST:
            more, known = {"two_sided": sides.difference([word])} if sides else {}, reference.get(word)
            rows = _rows(f, {whose: each == word for whose, each in words.items()}, more, known)
            found[word] = {name: row if row is known else population_of(row) for name, row in rows.items()}
    return found


def _reference_populations(reference: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict]:
    """Rows of the reference that ships, if its patterns are of the same coordinates."""
    firsts = [pair[0] for pair in reference.get("made_by", {}).get("bias_along", ())]
    return {word: _row(entry) for word, entry in reference.get("populations", {}).items() if firsts == list(names)}


def _shares(words: np.ndarray, log_weights: np.ndarray) -> dict[str, float]:
    labels, number = np.unique(words, return_inverse=True)
    return dict(zip(labels.tolist(), np.bincount(number, normalized_weights(log_weights)).tolist(), strict=True))


def _row(entry: Mapping[str, float] | None) -> dict[str, Any] | None:
    """An entry of a reference that ships, with its interval."""
    if entry is None:
        return None
    value, error = entry["value"], entry["std_error"]
    return {"value": value, "std_error": error, "interval": (value - 1.96 * error, value + 1.96 * error)}
