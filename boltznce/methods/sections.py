"""Sections of a report of one system: pure functions of `Findings` that return results, figures and notes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from boltznce.analysis import plotting
from boltznce.analysis.free_energy import (
    FreeEnergyDifference,
    corrected_free_energy_difference,
    free_energy_difference,
    stratified_free_energy_difference,
    stratum_log_weights,
)
from boltznce.analysis.headline import choose_headline
from boltznce.analysis.means import weighted_mean
from boltznce.analysis.metrics import between_halves, energy_w2, likelihood_agreement, share_above
from boltznce.analysis.pareto import pareto_k
from boltznce.analysis.profiles import free_energy_profile
from boltznce.analysis.tica import tica_projection
from boltznce.analysis.weights import effective_sample_size, log_importance_weights, normalized_weights
from boltznce.methods.findings import Findings, walker_of
from boltznce.methods.free_energy import reference_difference, reference_profile
from boltznce.methods.provenance import energy_in_words
from boltznce.methods.torsion_states import TOTAL, judge, of_each_phi, rebalanced, two_sided
from boltznce.methods.views import View
from boltznce.smc import corrected_by_ancestors, lineages, refined_free_energy_difference
from boltznce.systems.base import System
from boltznce.systems.coordinates import Coordinate, symbol_of
from boltznce.systems.isomers import TURNED

__all__ = ["COMMON", "Part", "ess_row", "slowest_coordinates"]

WEIGHTS = {"ebm": "EBM weights", "exact": "exact weights"}
HIGHEST = 20.0  # kT, of a profile's figure: above, samples are noise
N_BINS = 72
FEWEST_STEPS = 3  # in β, that are drawn
REMOVED = 0.002  # of the top weights, as the BoltzNCE authors do
REAL_SHARE = 0.001  # of the data, that a note is worth
CONDITIONAL = (
    "All figures are conditional on the structure's own isomer, on both sides: its stereocentres, and each peptide "
    "bond cis or trans as it is there."
)
MISSED = (
    "Of the {}, {:.1%} in the state and {:.1%} in the rest lie where the flow has less "
    "than a hundredth of their density."
)
SPEED_UP = (
    "Speed-up: CPU time (wall clock on a GPU) of a simulation like that of the data until it knows ΔF as well as the "
    "result does, over that of the samples and exact likelihoods of the result, and of the data where it uses them; "
    "and the same with the training, and the data for it, counted. As well: the larger of the result's total error and "
    "its distance to the reference, joined with the error of the reference. Only results and simulations that are "
    "reliable have one."
)
REFINED_EXACT = (
    "Refined: draws of the flow annealed from its exact likelihood to the target, which is consistent. Errors count "
    "walkers of one draw once."
)
REFINED_EBM = (
    "Refined: draws of the flow annealed from the EBM's likelihood to the target. Where that is not the flow's, draws "
    "begin with wrong weights, and ΔF is off by what the row of exact likelihoods takes off: it corrects refined "
    "walkers by their ancestors. No row knows of a mode of which nothing was drawn."
)
TWO_LEGS = (
    "Draws, their weights and their ESS are those of the proxy ({proxy}). Refinement led there first, and from there "
    "to {system}: free energies, energies and distances of refined samples, and the data, are those of {system}."
)
MADE = {"right_chirality": "kept"}  # what a report calls counts of the draws
NOT_MADE = ("batches", "drawn", "not_finite")


class Part(NamedTuple):
    """What a section adds to a report: entries of the results, figures by name, sentences."""

    results: Mapping[str, Any] = {}
    figures: Mapping[str, Figure] = {}
    notes: tuple[str, ...] = ()


# ---- weights --------------------------------------------------------------------------------------------------------


def weights(f: Findings) -> Part:
    """Effective sample sizes of all draws, of the weights as they are and with the top ones removed or clipped."""
    name, drawn, panels = WEIGHTS[f.likelihood], f.drawn, {WEIGHTS[f.likelihood]: f.drawn.log_weights}
    rows = {name: ess_row(drawn.log_weights)}
    if f.likelihood == "ebm":
        rows[f"{name}, top {REMOVED:.1%} removed"] = ess_row(drawn.remove_top(REMOVED).log_weights)
    if clip := f.settings.get("clip"):
        rows[f"{name}, top {clip:.2%} clipped"] = ess_row(drawn.clip(clip).log_weights)
    if f.exact is not None:
        panels["exact weights (subset)"] = _exact_log_weights(f)
        rows["exact weights (subset)"] = ess_row(panels["exact weights (subset)"])
    return Part({"ess": rows}, {"weights": plotting.plot_weights(panels)})


def ess_row(log_weights: np.ndarray) -> dict:
    """ESS, Pareto-k and number of weights, as the report's table wants them."""
    return {"ess": effective_sample_size(log_weights), "pareto_k": pareto_k(log_weights), "n": len(log_weights)}


def _exact_log_weights(f: Findings) -> np.ndarray:
    """Of the uniform subset, each member standing for as many samples as there are of its side."""
    index = f.exact.index
    strata = stratum_log_weights(f.inside, index)
    return log_importance_weights(f.samples.energy[index], f.exact.log_prob) + strata


# ---- free energies --------------------------------------------------------------------------------------------------


def free_energies(f: Findings) -> Part:
    """ΔF of the system's state, by all that is known of it, and the profile along its coordinate."""
    if f.system.state is None:
        return Part()
    log_weights, md = f.samples.log_weights, f.md_difference
    reference = md if f.reference is None else reference_difference(f.reference)
    rows = {"reference": reference} if reference is not None else {}
    if f.weighed:
        rows[f.likelihood] = free_energy_difference(f.inside, log_weights, **f.bootstrap)
    total = TOTAL
    if f.refined is not None:
        by_ancestors = f.refined_inside, f.refined.log_weights, f.refined.ancestors
        rows["refined"] = refined_free_energy_difference(*by_ancestors)
        total = TOTAL if f.likelihood == "ebm" else (*TOTAL, "refined")
    if f.correction is not None:
        index = f.correction.index
        if f.refined is None:
            both = f.samples.log_prob[index], f.correction.log_prob
            rows["corrected"] = corrected_free_energy_difference(f.inside, log_weights, index, *both)
        else:
            both = f.samples.log_prob[f.refined.ancestors[index]], f.correction.log_prob
            rows["corrected"] = corrected_by_ancestors(*by_ancestors, index, *both)
    if f.exact is not None and f.weighed:
        exact_weights = log_importance_weights(f.samples.energy[f.exact.index], f.exact.log_prob)
        rows["exact"] = stratified_free_energy_difference(f.inside, exact_weights, f.exact.index)
    if f.sides is not None:
        rows["two_sided"] = two_sided(f, f.inside, f.inside_of(f.frames)).difference([True], [False])
    bias = {name: judge(rows, name) for name in ("ebm", "refined") if name in rows and f.likelihood == "ebm"}
    rows["unweighted"] = free_energy_difference(f.inside, None, **f.bootstrap)
    if f.data is not None and (md is None or reference is not md):
        whole, title = f.data.whole, f"data ({f.data_name})"
        known = md is not None and not f.data.is_time_series  # else slow motions, which so short a simulation hides
        walkers = walker_of(whole) if known else None
        of_data = free_energy_difference(f.inside_of(whole), whole.log_weights, n_bootstrap=2, walkers=walkers)
        rows |= {title: of_data} if known else {f"{title}, error not estimated": {"value": of_data.value}}
    rows_of_total = {name: rows[name] for name in total if name in rows}
    headline, notes = choose_headline(rows_of_total), []
    best = f.likelihood
    if f.refined is not None:
        among = rows_of_total if f.weighed else rows
        best = next((name for name in ("corrected", "refined") if name in among), best)
    results = {
        "state": f.system.state_in_words(),
        "ebm_bias": bias,
        "free_energy": rows,
        "headline": headline,
        "total": list(rows_of_total),
        "weighted": best,
        "error": _error(rows[best], reference),
    }
    if "two_sided" in rows:
        notes.append(MISSED.format(f.frames_name, rows["two_sided"].missed_state, rows["two_sided"].missed_rest))
    if (costs := _speed_up(f, rows, headline.row)) is not None:
        results["md"] = costs
        notes.append(SPEED_UP)
    return Part(results, _profiles(f, rows), tuple(notes))


def torsion_states(f: Findings) -> Part:
    """ΔF of the same interval of every φ, and populations of the states by all of them, where there are several."""
    return Part(of_each_phi(f))


def _speed_up(f: Findings, rows: Mapping[str, Any], row: str | None) -> dict | None:
    """What the result cost, and a simulation that knows ΔF as well; None where one of them cannot be relied on."""
    md, reference = f.md_difference, rows.get("reference")
    if row is None or md is None or not md.reliable or "cpu_seconds" not in f.data.whole.meta:
        return None
    off = abs(rows[row].value - _value(reference, "value"))
    error = float(np.hypot(max(off, rows[row].std_error), _value(reference, "std_error")))
    simulated, share = f.data.whole.meta["cpu_seconds"], len(f.data.log_weights) / len(f.data.whole)
    likelihoods = {"two_sided": ("uniform", "frames"), "corrected": ("weights",), "exact": ("uniform",)}.get(row, ())
    n = sum(len(np.unique(f.subsets[kind].index)) for kind in likelihoods if kind in f.subsets)
    spent, training = f.seconds["draw"] * len(f.drawn) + f.seconds.get("exact", 0.0) * n, f.training_seconds
    if row in ("refined", "corrected") and f.refined is not None:
        n_draws = f.refined.meta["refinement"].get("n_draws", len(f.refined))
        spent += f.seconds["refine"] * len(f.refined) - f.seconds["draw"] * (len(f.drawn) - n_draws)
    if row == "two_sided" and f.refined_frames:
        spent += f.seconds["refine"] * len(f.refined)
    elif row == "two_sided":  # uses the data
        spent += f.seconds["draw"] * len(f.frames_log_prob if f.frames_log_prob is not None else ())
        spent, training = spent + simulated, training - (simulated if share < 1 else 0.0)
    md_seconds = simulated * share * (md.std_error / error) ** 2
    result = {"error": error, "flow_seconds": spent, "training_seconds": training, "md_seconds": md_seconds}
    return result | {"speed_up": md_seconds / spent, "speed_up_trained": md_seconds / (spent + training)}


def _value(row, key: str) -> float:
    return row[key] if isinstance(row, dict) else getattr(row, key)


def _error(row: FreeEnergyDifference, reference) -> float:
    """Of a row against the reference; NaN where one is unknown, or infinite: a side not visited."""
    known = np.nan if reference is None else _value(reference, "value")
    return row.value - known if np.isfinite([row.value, known]).all() else np.nan


def _profiles(f: Findings, rows: Mapping[str, Any]) -> dict[str, Figure]:
    """``profile`` along the state's first coordinate, and others by its name; none along one that is yes or no."""
    found = {}
    for k, (given, interval) in enumerate(f.system.state.sides):
        coordinate = f.system.coordinate_of(given)
        if (figure := _profile(f, rows, coordinate, interval, f.reference if k == 0 else None)) is not None:
            found[f"{coordinate.name}_profile" if k else "profile"] = figure
    return found


def _profile(
    f: Findings, rows: Mapping[str, Any], coordinate: Coordinate, interval: tuple, known: dict | None
) -> Figure | None:
    """With the curves of ``rows`` that are not reliable told, and the reference that is ``known``."""
    values = coordinate(f.samples.positions)
    if values.dtype == bool:
        return None
    limits = coordinate.range_of(values if f.data is None else coordinate(f.data.frames.positions))
    curves = {"flow, unweighted": None} | ({WEIGHTS[f.likelihood]: f.samples.log_weights} if f.weighed else {})
    reference, whose = reference_profile(known), "reference"
    if reference is None and f.md_difference is not None:
        given = coordinate(f.data.frames.positions), f.data.frames.log_weights, N_BINS
        reference, whose = free_energy_profile(*given, walkers=f.md_units, limits=limits), f.data_name
    profiles = {label: free_energy_profile(values, lw, N_BINS, limits=limits) for label, lw in curves.items()}
    if f.refined is not None:
        given = coordinate(f.refined.positions), f.refined.log_weights, N_BINS
        profiles["refined"] = free_energy_profile(*given, walkers=f.refined.ancestors, limits=limits)
    row_of = {WEIGHTS[f.likelihood]: f.likelihood, "refined": "refined"}
    return plotting.plot_profiles(
        profiles,
        reference,
        interval,
        unreliable=[label for label, row in row_of.items() if row in rows and not rows[row].reliable],
        coordinate=coordinate.symbol,
        unit=coordinate.unit,
        highest=HIGHEST,
        limits=limits,
        reference_name=whose,
    )


# ---- likelihood -----------------------------------------------------------------------------------------------------


def likelihood_of_ebm(f: Findings) -> Part:
    """How far the EBM's log-likelihood is from the exact one."""
    if f.exact is None or len(f.exact.index) < 3:
        return Part()
    ebm, exact, inside = f.samples.log_prob[f.exact.index], f.exact.log_prob, f.inside[f.exact.index]
    results = {"likelihood": likelihood_agreement(ebm, exact, inside, **f.bootstrap)}
    results["counts"] = {
        f"exact likelihoods, {kind}": len(np.unique(subset.index)) for kind, subset in f.subsets.items()
    }
    return Part(results, {"likelihood": plotting.plot_likelihood_agreement(ebm, exact, inside)})


# ---- refinement -----------------------------------------------------------------------------------------------------


def refinement(f: Findings) -> Part:
    """The way from the generator's likelihood to the target, and how many ancestors each state has left."""
    if f.refined is None:
        return Part()
    done, ancestors, log_weights = f.refined.meta["refinement"], f.refined.ancestors, f.refined.log_weights
    inside = np.zeros(len(ancestors), bool) if f.system.state is None else f.refined_inside
    names = {0: "all"} if f.system.state is None else {1: "state", 0: "rest"}
    lines = lineages(ancestors, log_weights, inside)
    results = {
        "refinement": {
            "steps": done["steps"],
            "lineages": {names[k]: line._asdict() for k, line in sorted(lines.items())[::-1]},
        },
        "counts": {f"refinement, gradients of the {what}": n for what, n in done["gradients"].items()},
    }
    notes = (REFINED_EXACT if f.likelihood == "exact" else REFINED_EBM,)
    if not f.weighed:
        notes += (TWO_LEGS.format(proxy=energy_in_words(f.system.proxy.identity), system=f.system.name),)
    few = len(done["steps"]) < FEWEST_STEPS  # a figure of which says nothing
    figures = {} if few else {"refinement": plotting.plot_refinement(done["steps"], len(ancestors))}
    return Part(results, figures, notes)


# ---- against data ---------------------------------------------------------------------------------------------------


def surfaces(f: Findings) -> Part:
    """Free energy over the two coordinates of every view, and histograms of the energy: data, flow, weighted flow."""
    figures = {view.figure: view.draw(_with_reference(f, view, f.panels(view.points))) for view in f.views}
    if f.data is not None:
        energies = [f.data.frames.energies, *([f.samples.energy] * 2 if f.weighed else [])]
        energies += [f.refined.energy] if f.refined is not None else []
        panels = {name: panel for name, panel in f.panels(len).items() if f.weighed or name != "flow"}
        figures["energy_histograms"] = plotting.plot_energy_histograms(
            {label: (u, log_weights) for (label, (_, log_weights)), u in zip(panels.items(), energies, strict=True)}
        )
    return Part({}, figures)


def _with_reference(f: Findings, view: View, panels: dict) -> dict:
    """The panels, and beside the data's the surface of the shipped reference, if it is over the view's coordinates."""
    surface = (f.reference or {}).get("surface")
    if surface is None or tuple(map(symbol_of, surface["coordinates"])) != view.symbols:
        return panels
    # four bins of the figure each
    values = np.array(surface["f"], dtype=np.float64).repeat(2, axis=0).repeat(2, axis=1)
    reference = {"reference": values + np.log(np.nansum(np.exp(-values)))}
    return {title: panels[title] for title in panels if title == f.data_name} | reference | panels


def mean_energies(f: Findings) -> Part:
    """⟨u⟩ of the weighted samples and of the data, with its standard errors: of samples and of walkers, or blocks."""
    rows = {}
    if f.weighed:
        rows["weighted samples"] = _mean(f.samples.energy, f.samples.log_weights, np.arange(len(f.samples)))
    if f.refined is not None:
        rows["refined"] = _mean(f.refined.energy, f.refined.log_weights, f.refined.ancestors)
    if f.data is not None:
        rows[f.data_name] = _mean(f.data.frames.energies, f.data.frames.log_weights, f.frame_groups)
    return Part({"mean_energy": rows})


def _mean(values: np.ndarray, log_weights: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """Of values (n,) by weight, and its error by groups; NaN, if it cannot be relied on."""
    found = weighted_mean(values, log_weights, groups)
    return {"value": found.value, "std_error": found.std_error if found.reliable else np.nan}


def distances(f: Findings) -> Part:
    """E-W2 and W2 of the first view's points between samples and data, and the shares of energies above E-W2's cut."""
    if f.data is None:
        return Part()
    balanced = rebalanced(f)
    balanced = None if balanced is None else normalized_weights(balanced)
    energies, found = f.data.resampled.energies, {"E-W2 (kT)": _energy_distances(f, balanced)}
    for view in f.views[:1]:
        subsets = {"n_points": f.settings.n_torus, "generator": np.random.default_rng(f.seed)}
        ours, theirs = view.points(f.samples.positions), view.points(f.data.resampled.positions)
        found[view.distance] = {
            "unweighted": view.w2(ours, theirs, **subsets),
            "floor": between_halves(view.w2, theirs, **subsets),
        }
        if f.weighed:
            found[view.distance]["weighted"] = view.w2(ours, theirs, f.samples.weights, **subsets)
        if f.refined is not None:
            refined = view.points(f.refined.positions)
            found[view.distance]["refined"] = view.w2(refined, theirs, f.refined.weights, **subsets)
        if balanced is not None:
            found[view.distance]["rebalanced"] = view.w2(refined, theirs, balanced, **subsets)
    shares = {f.data_name: share_above(energies, f.cut)}
    if f.weighed:
        shares["flow"] = share_above(f.samples.energy, f.cut)
        shares["weighted"] = share_above(f.samples.energy, f.cut, f.samples.weights)
    return Part({"distances": found, "energy_cut": {"cut": f.cut, "shares": shares}})


def _energy_distances(f: Findings, balanced: np.ndarray | None) -> dict:
    """E-W2 of the energies below the cut; NaN, and why, where a flow has nothing there."""
    energy, data, cut, found, empty = f.samples.energy, f.data.resampled.energies, f.cut, {}, []
    sets = {"unweighted": (energy, None), "weighted": (energy, f.samples.weights)} if f.weighed else {}
    if f.refined is not None:
        sets["refined"] = (f.refined.energy, f.refined.weights)
    if balanced is not None:
        sets["rebalanced"] = (f.refined.energy, balanced)
    for kind, (values, shares) in sets.items():
        if share_above(values, cut, shares) < 1:
            found[kind] = energy_w2(values, data, shares, cut=cut)
        else:
            found[kind] = np.nan
            empty.append(kind)
    found["floor"] = between_halves(energy_w2, data, cut=cut)
    if empty:
        lowest = min(values[() if shares is None else shares > 0].min() for values, shares in map(sets.get, empty))
        found["missing"] = (
            f"no {' and no '.join(empty)} sample below the cut at {cut:.0f} kT, above which energies are left out "
            f"(the lowest is at {lowest:.0f} kT)"
        )
    return found


def mode_weights(f: Findings) -> Part:
    """Populations of the modes, where they are known."""
    exact = f.system.mode_weights
    if exact is None:
        return Part()
    mode = f.system.mode(torch.from_numpy(np.array(f.samples.positions))).numpy()
    found = {"flow": None, "flow, weighted": f.samples.weights}
    shares = {name: np.bincount(mode, w, minlength=len(exact)) for name, w in found.items()}
    return Part({"modes": {"exact": exact} | {name: counts / counts.sum() for name, counts in shares.items()}})


def slowest_coordinates(f: Findings) -> Part:
    """Free energy over the slowest coordinates of a simulation (TICA)."""
    lag = f.settings.tica_lag
    if not lag or f.data is None or not f.data.has_trajectories or not f.weighed:
        return Part()
    frames = f.data.frames
    features = slow_features(f.system, frames.positions)
    project = tica_projection([features[mask] for mask in f.data.walkers], lag)
    panels = f.panels(lambda positions: project(slow_features(f.system, positions)))
    low, high = np.quantile(panels[f.data_name][0], [0.001, 0.999], axis=0)
    box = np.stack([low - 0.1 * (high - low), high + 0.1 * (high - low)], axis=1).tolist()
    figure = plotting.plot_plane(panels, box, n_bins=60, axes_names=("TIC 1", "TIC 2"), aspect="auto")
    return Part({}, {"tica": figure})


def slow_features(member: System, positions: np.ndarray) -> np.ndarray:
    """Sines and cosines of the torsions and distances between heavy atoms (nm): (n, features)."""
    x = torch.from_numpy(np.array(positions))
    turning = [member.dihedral(x, name)[:, None] for name in member.dihedrals]
    angles = torch.cat([x[:, :0, 0], *turning], dim=-1)
    heavy = [atom.index for atom in member.topology.atoms if atom.element.symbol != "H"]
    i, j = torch.triu_indices(len(heavy), len(heavy), 1)
    apart = (x[:, heavy][:, i] - x[:, heavy][:, j]).norm(dim=-1)
    return torch.cat([angles.sin(), angles.cos(), apart], dim=-1).numpy()


# ---- conformers, costs ----------------------------------------------------------------------------------------------


def conformers(f: Findings) -> Part:
    """Shares of the draws that are the molecule; of what is left out by count and by weight, of data by weight."""
    counts, shares, rows = f.drawn.meta["counts"], f.drawn.weights, {}
    for why, mask in f.excluded.items():
        rows[why] = {"n": int(mask.sum()), "by_count": float(mask.mean()), "by_weight": float(shares[mask].sum())}
        if f.data is not None:
            rows[why]["data"] = float(normalized_weights(f.data.log_weights)[f.data.excluded[why]].sum())
    results = {"excluded": rows, "counts": {"drawn": counts["drawn"], "kept": len(f.drawn)}}
    if "right_graph" in counts:
        made = {MADE.get(key, key): n / counts["drawn"] for key, n in counts.items() if key not in NOT_MADE}
        results["made"] = made | {"turned": rows.get(TURNED, {}).get("by_count")}
    notes = (CONDITIONAL,) if rows else ()
    if lost := [f"{row['data']:.1%} ({why})" for why, row in rows.items() if row.get("data", 0) > REAL_SHARE]:
        notes += (f"Of the data are left out, being other isomers than the structure: {', '.join(lost)}.",)
    return Part(results, {}, notes + f.notes)


def costs(f: Findings) -> Part:
    """Seconds of work a sample."""
    return Part({"timing": {f"{name}_per_sample": seconds for name, seconds in f.seconds.items()}})


COMMON = (
    free_energies,
    torsion_states,
    mean_energies,
    refinement,
    weights,
    likelihood_of_ebm,
    distances,
    mode_weights,
    conformers,
    costs,
    surfaces,
)
