"""The figures of a run, each a function of arrays that returns a matplotlib Figure; nothing is shown or saved here."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from boltznce.analysis.main_numbers import Number, over_seeds
from boltznce.analysis.pareto import pareto_k
from boltznce.analysis.profiles import FreeEnergyProfile, FreeEnergySurface
from boltznce.analysis.weights import effective_sample_size, normalized_weights
from boltznce.errors import UserError
from boltznce.states import in_interval

__all__ = [
    "plot_conformers",
    "plot_densities",
    "plot_energy_cost",
    "plot_energy_histograms",
    "plot_error_over_cost",
    "plot_ladder",
    "plot_learning_curves",
    "plot_likelihood_agreement",
    "plot_marginals",
    "plot_plane",
    "plot_profiles",
    "plot_ramachandran",
    "plot_refinement",
    "plot_seconds",
    "plot_surface",
    "plot_sweep",
    "plot_weights",
    "style",
]

P = ParamSpec("P")
Drawn = TypeVar("Drawn")

MOST_COLUMNS = 6  # of panels
MOST_PANELS = 5  # of a sweep's figure in a row
HIGHEST_ERROR = 3.0  # kT, of a point of a profile that is still drawn
FEWEST = 5.0  # effective samples behind a bin of a weighted surface that is drawn
BLOCKS, ENOUGH = (1, 2, 3, 4, 5, 6), 0.9  # of bins, each way, that are joined until so much of the weight is drawn
_STYLE: dict[Any, Any] = (
    dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 9)
    | dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 8)
    | dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.grid", "legend.frameon"), False)
    | {"lines.linewidth": 1.5, "figure.dpi": 110, "savefig.dpi": 200}
)
_own_style: dict[Any, Any] = {}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito, for all eyes
_REFERENCE_COLOUR = "#333333"
_STATE_COLOURS = ("#F0E442", "#56B4E9")
_DENSITY_MAP = "Blues"
_ANGLE_TICKS = np.pi * np.array([-1.0, -0.5, 0.0, 0.5, 1.0]), ["−π", "−π/2", "0", "π/2", "π"]

# colour and size (points²) of each element's ball; others are grey
_ELEMENTS = {
    "H": ("#d9d9d9", 10),
    "C": ("#5a5a5a", 36),
    "N": ("#3b5bdb", 36),
    "O": ("#d6336c", 36),
    "S": ("#e8b400", 50),
}

AnglesAndWeights = tuple[np.ndarray, np.ndarray | None]
Panels = Mapping[str, AnglesAndWeights | np.ndarray]
Box = tuple[tuple[float, float], tuple[float, float]]


@contextlib.contextmanager
def style(given: str | Path | None) -> Iterator[None]:
    """Inside, figures follow a style of matplotlib, by its name or the path of its file, where ours says otherwise.

    Raises UserError for one that there is not.
    """
    global _own_style
    before = _own_style
    try:
        _own_style = {} if given is None else _settings_of(str(given))
        yield
    finally:
        _own_style = before


def _settings_of(style: str) -> dict[str, Any]:
    if style in matplotlib.style.library:
        return {str(key): value for key, value in matplotlib.style.library[style].items()}
    if not Path(style).is_file():  # nothing is fetched from an address
        raise UserError(
            f"figures.style={style} is no style of matplotlib: give the path of a .mplstyle file, or one of "
            f"{', '.join(matplotlib.style.available)}."
        )
    own = matplotlib.rc_params_from_file(style, use_default_template=False)
    return {str(key): value for key, value in own.items()}


def _styled(function: Callable[P, Drawn]) -> Callable[P, Drawn]:
    @functools.wraps(function)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Drawn:
        with matplotlib.rc_context(_STYLE | _own_style):
            return function(*args, **kwargs)

    return drawn


def plot_ramachandran(
    panels: Panels,
    n_bins: int = 72,
    highest: float = 10.0,
    angle_names: tuple[str, str] = ("φ", "ψ"),
    zero_of: str | None = None,
) -> Figure:
    """Free energy -log p(φ, ψ) in kT, panels on one colour scale.

    ``panels``: title -> (angles (n, 2), log weights or None), or -log p (n_bins, n_bins) itself, p summing to one. The
    zero of every panel is the lowest bin of the panel ``zero_of``, by default the first (the MD): equal colours are
    equal densities. By weights bins of fewer than ``FEWEST`` effective samples are left out, and joined where that
    would leave out much.
    """
    edges = np.linspace(-np.pi, np.pi, n_bins + 1)
    figure, axes = _plot_surfaces(panels, (edges, edges), highest, zero_of, [f"{name} (rad)" for name in angle_names])
    for ax in axes.flat:
        ax.set_xticks(*_ANGLE_TICKS)
        ax.set_yticks(*_ANGLE_TICKS)
    return figure


@_styled
def plot_conformers(
    panels: Mapping[str, np.ndarray],
    elements: Sequence[str],
    bonds: Sequence[tuple[int, int]],
    core: Sequence[int] | None = None,
) -> Figure:
    """Balls and sticks of conformers, superposed on ``core`` atoms (default: all but hydrogens), the first seen widest.

    ``panels``: title -> positions (k, n_atoms, 3) in nm, k conformers drawn over one another; ``elements``: symbols.
    """
    core = [k for k, element in enumerate(elements) if element != "H"] if core is None else list(core)
    template = np.asarray(next(iter(panels.values()))[0], dtype=np.float64)
    template = template - template[core].mean(axis=0)
    axes = np.linalg.svd(template[core], full_matrices=True)[2]
    axes *= np.sign(np.linalg.det(axes))  # longest axis along x, shortest towards the eye; no mirror image
    template = template @ axes.T
    reach = 1.05 * np.abs(template).max()
    colours, sizes = zip(*(_ELEMENTS.get(element, ("0.4", 36)) for element in elements), strict=True)
    figure, grid = _panels(1, len(panels), 2.6, 2.6, subplot_kw={"projection": "3d"})
    for ax, (title, conformers) in zip(grid.flat, panels.items(), strict=True):
        opacity = 1.0 / np.sqrt(len(conformers))
        for conformer in conformers:
            x = _superposed(np.asarray(conformer, dtype=np.float64), template, core)
            for a, b in bonds:
                ax.plot(*x[[a, b]].T, color="0.5", linewidth=1.2, alpha=opacity, zorder=1)
            ax.scatter(*x.T, c=colours, s=sizes, alpha=opacity, edgecolors="0.3", linewidths=0.3, depthshade=False)
        ax.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), zlim=(-reach, reach))
        ax.set_box_aspect((1, 1, 1), zoom=1.5)
        ax.view_init(elev=80, azim=-90)
        ax.set_axis_off()
    return figure


def plot_plane(
    panels: Panels,
    box: Box,
    n_bins: int = 100,
    highest: float = 8.0,
    zero_of: str | None = None,
    axes_names: tuple[str, str] = ("x", "y"),
    aspect: str = "equal",
) -> Figure:
    """Free energy -log p(x, y) in kT of samples in a plane; ``panels``: title -> (points (n, 2), log weights or None).

    The zero of every panel is the lowest bin of the panel ``zero_of``, by default the first (exact draws).
    ``aspect``: ``auto`` where the two coordinates have no common unit.
    """
    x_edges, y_edges = (np.linspace(*side, n_bins + 1) for side in box)
    return _plot_surfaces(panels, (x_edges, y_edges), highest, zero_of, axes_names, aspect)[0]


@_styled
def plot_densities(
    rows: Mapping[str, Mapping[str, np.ndarray]],
    boxes: Mapping[str, Box],
    notes: Mapping[tuple[str, str], str] | None = None,
) -> Figure:
    """Densities in the plane, rows = systems, columns = the truth and what was learned, on one colour scale a row.

    ``rows``: system -> {title: density (n, n), x along the first axis}; the first column is the truth, whose highest
    value is the darkest colour. ``boxes``: system -> the ranges of x and y; ``notes``: (system, title) -> a line below.
    """
    notes = notes or {}
    titles = list(dict.fromkeys(title for columns in rows.values() for title in columns))
    figure, axes = _panels(len(rows), len(titles), 1.75, 1.95 if notes else 1.75, extra=(0.0, 0.2))
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    for row, (system, columns) in zip(axes, rows.items(), strict=True):
        box, highest = boxes[system], max(float(np.quantile(next(iter(columns.values())), 0.9999)), 1e-300)
        for ax, title in zip(row, titles, strict=True):
            ax.set(aspect="equal", xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set(visible=True, linewidth=0.6, color="0.6")
            ax.set_xlabel(notes.get((system, title), ""), fontsize=7.5, labelpad=2)
            if title in columns:
                colours = {"cmap": _DENSITY_MAP, "vmin": 0.0, "vmax": highest}
                ax.imshow(columns[title].T, origin="lower", extent=(*box[0], *box[1]), **colours)
            else:
                ax.set_axis_off()
        row[0].set_ylabel(system.replace("_", " "))
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
    return figure


@_styled
def plot_energy_histograms(
    panels: Mapping[str, AnglesAndWeights], n_bins: int = 100, energy_range: tuple[float, float] | None = None
) -> Figure:
    """Densities of reduced energies; ``panels``: label -> (energies (n,) in kT, log weights or None), the first filled.

    The default range holds the first set (the MD) whole and the others up to their median plus the width of the first;
    the share beyond it is in the legend.
    """
    first = np.asarray(next(iter(panels.values()))[0])
    if energy_range is None:
        low, high = np.quantile(first, [0.001, 0.999])
        width = high - low or 1.0  # a flat energy has none
        highest = max(high, *(np.median(energies) for energies, _ in panels.values()))
        energy_range = (float(low - 0.1 * width), float(highest + 0.8 * width))
    edges = np.linspace(*energy_range, n_bins + 1)
    figure, ax = _single_axes()
    for position, (label, (energies, log_weights)) in enumerate(panels.items()):
        weights = _weights(energies, log_weights)
        beyond = float(weights[~(np.asarray(energies) <= energy_range[1])].sum())
        label = f"{label} ({beyond:.1%} beyond)" if beyond >= 0.001 else label
        style: dict[str, Any] = {"color": "0.75", "fill": True}
        if position:
            style = {"color": _COLOURS[position - 1], "linewidth": 1.5}
        ax.stairs(_density(energies, edges, weights), edges, label=label, **style)
    ax.set(xlabel="energy u (kT)", ylabel="probability density (1/kT)", xlim=energy_range, ylim=(0, None))
    ax.legend(loc="upper right")
    return figure


@_styled
def plot_profiles(
    profiles: Mapping[str, FreeEnergyProfile],
    reference: FreeEnergyProfile | None = None,
    state: tuple[float, float] | Mapping[str, tuple[float, float]] | None = (0.0, 2.0),
    coordinate: str = "φ",
    unit: str = "rad",
    highest: float | None = None,
    limits: tuple[float, float] | None = None,
    reference_name: str = "reference",
    unreliable: Collection[str] = (),
) -> Figure:
    """Free-energy profiles on the circle or between ``limits``, bands of 1.96 standard errors; the reference in black.

    The ``state`` is shaded, or several by their names. Profiles named in ``unreliable`` are dotted, without a band, and
    the legend says so. Where a curve with errors has none, or one above ``HIGHEST_ERROR``, nothing is known and it has
    a gap; other gaps stay gaps, and the legend says of a curve that is nothing but gaps that it is not known. Curves
    have the probability of what is outside of the first state in common, and so the noise of no single bin; the first
    curve's lowest bin is zero. ``highest``: upper end of the axis in kT, if a curve reaches it.
    """
    curves: list[tuple[str, FreeEnergyProfile, dict[str, Any]]] = []
    if reference is not None:
        curves.append((reference_name, reference, {"color": _REFERENCE_COLOUR, "linewidth": 2.0}))
    for position, (label, profile) in enumerate(profiles.items()):
        curves.append((label, profile, {"color": _COLOURS[position % len(_COLOURS)], "linewidth": 1.3}))
    figure, ax = _single_axes()
    ends = limits or (-np.pi, np.pi)
    states = {} if state is None else state if isinstance(state, Mapping) else {"state": state}
    for colour, (name, interval) in zip(_STATE_COLOURS, states.items(), strict=False):
        in_legend: str | None = name
        for turn in (0.0,) if limits else (0.0, -2.0 * np.pi, 2.0 * np.pi):
            low, high = np.clip(np.add(interval, turn), *ends)
            if low < high:
                ax.axvspan(low, high, color=colour, alpha=0.25, linewidth=0, label=in_legend)
                in_legend = None  # once
    top, bottom, of_rest = 1.0, 0.0, None
    for name, profile, style in curves:
        label = name
        values, band = np.where(_known(profile), profile.free_energy, np.nan), 1.96 * profile.std_error
        rest = _minus_log_sum(profile, next(iter(states.values()), None), periodic=limits is None)
        of_rest = rest if of_rest is None else of_rest
        values = values + (of_rest - rest)
        bottom = min(bottom, np.nanmin(values, initial=0.0))
        if name in unreliable:
            label, band, style = f"{name}: not reliable", np.zeros_like(band), style | {"linestyle": ":"}
        ax.fill_between(profile.centres, values - band, values + band, color=style["color"], alpha=0.25, linewidth=0)
        upper = (values + np.nan_to_num(band))[np.isfinite(values)]
        ax.plot(profile.centres, values, label=label if len(upper) else f"{name}: not known", **style)
        top = upper.max(initial=top)
    top = top if highest is None else min(top, highest)
    ax.set(ylabel="free energy (kT)", xlim=ends, ylim=(bottom - 0.04 * top, 1.08 * top))
    if limits is None:
        ax.set_xticks(*_ANGLE_TICKS)
    ax.set_xlabel(_axis_label(coordinate, unit))
    _legend_above(ax)
    return figure


@_styled
def plot_surface(
    surface: FreeEnergySurface,
    coordinates: Sequence[tuple[str, str]],
    limits: Sequence[tuple[float, float] | None] = (None, None),
    states: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    highest: float = 10.0,
) -> Figure:
    """Free energy over two ``coordinates`` (symbol, unit), and its standard error where there is one, side by side.

    ``limits``: of each, None where it goes round the circle; ``states``: name -> an interval of each, drawn as a frame.
    Gaps are as in `plot_profiles`.
    """
    edges = [np.linspace(*(ends or (-np.pi, np.pi)), len(surface.free_energy) + 1) for ends in limits]
    figure, axes = _panels(1, 2, 3.4, 2.9, sharex=True, sharey=True)
    known = _known(surface)
    highest = min(highest, np.nanmax(surface.free_energy, where=known, initial=1.0))
    columns = {"free energy (kT)": (surface.free_energy, highest), "standard error (kT)": (surface.std_error, 1.0)}
    for ax, (label, (values, top)) in zip(axes.flat, columns.items(), strict=True):
        mesh = ax.pcolormesh(
            *edges, np.where(known, values, np.nan).T, cmap="viridis", vmin=0.0, vmax=top, rasterized=True
        )
        figure.colorbar(mesh, ax=ax, label=label, extend="max")
        ax.set(xlim=edges[0][[0, -1]], ylim=edges[1][[0, -1]], xlabel=_axis_label(*coordinates[0]))
        for colour, (name, box) in zip((_COLOURS[1], _COLOURS[3]), (states or {}).items(), strict=False):
            in_legend: str | None = name
            for corner, width, height in _frames(box, limits, edges):
                frame = Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=1.5, label=in_legend)
                ax.add_patch(frame)
                in_legend = None  # once
        for set_ticks, ends in zip((ax.set_xticks, ax.set_yticks), limits, strict=True):
            if ends is None:
                set_ticks(*_ANGLE_TICKS)
    axes[0, 0].set_ylabel(_axis_label(*coordinates[1]))
    if states:
        _legend_above(axes[0, 0])
    return figure


@_styled
def plot_likelihood_agreement(ebm: np.ndarray, exact: np.ndarray, inside: np.ndarray | None = None) -> Figure:
    """EBM against exact log-likelihoods (n,), the mean difference taken off, coloured by state."""
    ebm, exact = np.asarray(ebm, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    shifted = ebm - (ebm - exact).mean()
    groups = {"samples": np.full(len(ebm), True)} if inside is None else {"rest": ~inside, "state": inside}
    both = np.concatenate([shifted, exact])
    margin = 0.05 * np.ptp(both)
    limits = (both.min() - margin, both.max() + margin)
    figure, ax = _single_axes(3.4, 3.4)
    ax.plot(limits, limits, color=_REFERENCE_COLOUR, linewidth=0.8, zorder=1)
    for colour, (label, mask) in zip(_COLOURS, groups.items(), strict=False):
        style: dict[str, Any] = {"s": 12, "color": colour, "alpha": 0.7, "linewidth": 0, "zorder": 2}
        ax.scatter(exact[mask], shifted[mask], label=f"{label} (n = {mask.sum()})", **style)
    ax.set(xlabel="exact log q", ylabel="EBM log q + constant", xlim=limits, ylim=limits, aspect="equal")
    said = f"std {(ebm - exact).std(ddof=1):.2f} kT\nr = {np.corrcoef(ebm, exact)[0, 1]:.3f}"
    ax.text(0.97, 0.03, said, transform=ax.transAxes, ha="right", va="bottom")
    ax.legend(loc="upper left", handletextpad=0.2)
    return figure


@_styled
def plot_learning_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str = "step",
    kept: Mapping[str, float] | None = None,
) -> Figure:
    """Columns of a training log; ``curves``: label -> (steps, values), NaN left out, a panel a name before a ``/``.

    ``"flow/train"`` and ``"flow/validation"`` share the panel *flow*. A panel is logarithmic where its values are
    positive and span more than a factor of five. Training (noisy) is drawn faint with its running median. ``kept``:
    panel -> the step whose weights were kept, where it is not the last.
    """
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for label, columns in curves.items():
        panel, _, name = label.rpartition("/")
        steps, values = (np.asarray(column, dtype=np.float64) for column in columns)
        if (seen := np.isfinite(values)).any():
            panels.setdefault(panel or "loss", {})[name] = (steps[seen], values[seen])
    figure, axes = _panels(1, max(1, len(panels)), 3.2, 2.6)
    for ax, (panel, lines) in zip(axes.flat, panels.items(), strict=False):
        for colour, (name, (steps, values)) in zip(_COLOURS, lines.items(), strict=False):
            if len(values) > 200:
                ax.plot(steps, values, color=colour, alpha=0.2, linewidth=0.6)
                steps, values = _running_median(steps, values)
            ax.plot(steps, values, color=colour, label=name, marker="." if len(values) < 30 else "")
        values = np.concatenate([values for _, values in lines.values()])
        if values.min() > 0.0 and values.max() > 5.0 * values.min():
            ax.set_yscale("log")
        elif len(values) > 20:
            low, high = np.quantile(values, [0.005, 0.99])  # without outliers
            ax.set_ylim(low - 0.08 * (high - low) - 1e-12, high + 0.08 * (high - low) + 1e-12)
        ax.set(title=panel, xlabel=x_label, ylabel="loss")
        if (step := (kept or {}).get(panel)) is not None:
            ax.axvline(step, color=_REFERENCE_COLOUR, linewidth=0.8, linestyle=":", label=f"kept: step {step:.0f}")
        ax.legend()
    return figure


@_styled
def plot_weights(sets: Mapping[str, np.ndarray], n_bins: int = 60) -> Figure:
    """Histograms of log weights relative to the mean weight; ``sets``: label -> log weights (n,)."""
    weights = {label: normalized_weights(log_weights) for label, log_weights in sets.items()}
    logs = {label: np.log(w[w > 0.0] * len(w)) for label, w in weights.items()}
    everything = np.concatenate(list(logs.values()))
    low = float(np.clip(np.quantile(everything, 0.002), -40.0, -1.0))  # the weights below count for nothing
    edges = np.linspace(low, max(float(everything.max()), 1.0), n_bins + 1)
    figure, ax = _single_axes()
    for colour, (label, values) in zip(_COLOURS, logs.items(), strict=False):
        note = f"{label}: ESS {effective_sample_size(sets[label]):.2%}, Pareto-k {pareto_k(sets[label]):.2f}"
        shares = np.histogram(values, bins=edges)[0] / len(sets[label])
        ax.stairs(shares, edges, color=colour, label=note, linewidth=1.5)
    ax.axvline(0.0, color=_REFERENCE_COLOUR, linewidth=0.8)
    ax.set(xlabel="log(weight / mean weight)", ylabel="share of samples", yscale="log", xlim=(edges[0], edges[-1]))
    _legend_above(ax, columns=1)
    return figure


@_styled
def plot_energy_cost(rows: Sequence[Mapping]) -> Figure:
    """µs a conformer over the number of atoms (log-log), a panel for each ``kind``, a line for each ``backend``.

    Quartiles are bars.
    """
    kinds, backends = (list(dict.fromkeys(row[key] for row in rows)) for key in ("kind", "backend"))
    figure, axes = _panels(1, len(kinds), 3.4, 3.0, sharey=True)
    for ax, kind in zip(axes.flat, kinds, strict=True):
        for colour, backend in zip(_COLOURS, backends, strict=False):
            here = [row for row in rows if (row["kind"], row["backend"]) == (kind, backend)]
            n, median, low, high = (
                np.array([row[key] for row in here]) for key in ("n_atoms", "median", "low", "high")
            )
            style = {"color": colour, "marker": "o", "markersize": 4, "capsize": 2}
            ax.errorbar(n, median, (median - low, high - median), label=backend, **style)
        atoms = sorted({row["n_atoms"] for row in rows})
        ax.set(xscale="log", yscale="log", xlabel="atoms", title=f"{kind}, batch {here[0]['batch_size']}")
        ax.set_xticks(atoms, [str(n) for n in atoms])
        ax.minorticks_off()
    axes[0, 0].set_ylabel("µs a conformer")
    axes[0, 0].legend()
    return figure


@_styled
def plot_error_over_cost(rows: Sequence[Mapping]) -> Figure:
    """``std`` (kT) over ``ms`` a sample (log-log), each with its label, ``likelihood``, a colour for each ``kind``.

    One without a ``std`` is a vertical line, as is one whose is zero. Labels stand right and left by turns.
    """
    figure, ax = _single_axes(6.4, 4.2)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for place, row in enumerate(sorted(rows, key=lambda row: row["ms"])):
        colour = _COLOURS[kinds.index(row["kind"]) % len(_COLOURS)]
        text: dict[str, Any] = {"color": colour, "fontsize": 7, "textcoords": "offset points", "annotation_clip": False}
        if row["std"]:
            ax.plot(row["ms"], row["std"], marker="o", markersize=4, color=colour)
            text |= {"xytext": (-5, -3), "ha": "right"} if place % 2 else {"xytext": (5, -3), "ha": "left"}
            ax.annotate(row["likelihood"], (row["ms"], row["std"]), **text)
        else:
            ax.axvline(row["ms"], color=colour, linewidth=0.8, linestyle="--")
            text |= {"xycoords": ax.get_xaxis_transform(), "rotation": 90, "va": "bottom", "ha": "right"}
            ax.annotate(row["likelihood"], (row["ms"], 0.02), xytext=(-2, 0), **text)
    ax.set(xscale="log", yscale="log", xlabel="ms a sample", ylabel="standard deviation of the error (kT)")
    return figure


@_styled
def plot_seconds(bars: Mapping[str, tuple[float, float]], title: str) -> Figure:
    """A bar for each label (logarithmic), (seconds, seconds of training), the latter on top of the former and paler."""
    figure, ax = _single_axes(5.6, 0.8 + 0.35 * max(1, len(bars)))
    seconds, training = np.array(list(bars.values())).reshape(-1, 2).T
    places = np.arange(len(bars))
    ax.barh(places, seconds + training, color=_COLOURS[5], label="and the training")
    ax.barh(places, seconds, color=_COLOURS[0], label="by itself")
    ax.set_yticks(places, list(bars))
    if training.any():
        _legend_above(ax)
    if len(bars):
        ax.set_xlim(seconds.min() / 3, 2 * (seconds + training).max())
    ax.set(xscale="log", xlabel=title)
    ax.invert_yaxis()
    return figure


@_styled
def plot_sweep(
    panels: Mapping[str, Mapping[str, Sequence[Number]]], references: Mapping[str, float], shares: Collection[str] = ()
) -> Figure:
    """Numbers of the runs of a sweep, a panel each, settings one below the other: dots are runs, the bar their mean.

    ``panels``: title -> {setting: numbers}; those that are not reliable are hollow, and count in the mean only where
    nothing else does. ``references``: title -> a line. Panels named in ``shares`` are in per cent.
    """
    n_rows = -(-len(panels) // MOST_PANELS)
    n_columns, labels = -(-len(panels) // n_rows), list(next(iter(panels.values())))
    lines = max(label.count("\n") + 1 for label in labels)
    longest = max(len(line) for label in labels for line in label.split("\n"))
    height = 0.75 + len(labels) * (0.22 + 0.14 * lines)
    figure, axes = _panels(n_rows, n_columns, 1.9, height, extra=(0.075 * longest, 0.25), sharey=True)
    for ax, (title, sets) in zip(axes.flat, panels.items(), strict=False):
        scale = 100.0 if title in shares else 1.0
        for place, label in enumerate(labels):
            numbers, colour = sets[label], _COLOURS[place % len(_COLOURS)]
            for k, number in enumerate(numbers):
                y = place + 0.4 * ((k + 0.5) / len(numbers) - 0.5)
                if number.interval is not None:
                    ax.plot(scale * np.array(number.interval), (y, y), color=colour, linewidth=1.0, alpha=0.6)
                face = colour if number.reliable else "white"
                ax.plot(scale * number.value, y, "o", markersize=4.5, color=colour, markerfacecolor=face, zorder=3)
            if numbers:
                bar = {"markersize": 16, "markeredgewidth": 1.3, "color": "0.2", "zorder": 4}
                ax.plot(scale * over_seeds(numbers).mean, place, "|", **bar)
            else:
                ax.annotate("–", (0.5, place), xycoords=("axes fraction", "data"), ha="center", va="center")
        if title in references:
            ax.axvline(scale * references[title], color=_REFERENCE_COLOUR, linewidth=1.0, linestyle="--", zorder=1)
        ax.set_title(f"{title} (%)" if title in shares else title.replace(", ", "\n"))
        ax.set_yticks(range(len(labels)), labels)
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.margins(x=0.15)
        ax.locator_params(axis="x", nbins=4)
        ax.grid(axis="x", color="0.92", linewidth=0.6)
        ax.set_axisbelow(True)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    every = [number for sets in panels.values() for numbers in sets.values() for number in numbers]
    note = "dots: runs; bar: mean"
    note += "; line: its 95% interval" if any(number.interval for number in every) else ""
    note += "; hollow: not reliable" if not all(number.reliable for number in every) else ""
    figure.supxlabel(f"{note}; dashed: reference" if references else note, fontsize=8)
    return figure


@_styled
def plot_ladder(temperatures: Sequence[float], sets: Mapping[str, Sequence[float]], unit: str = "K") -> Figure:
    """Effective sample sizes (0 to 1) at the steps of a temperature ladder, from hot to cold; NaN where a set has none.

    Steps stand side by side: a temperature that comes twice is seen twice. Logarithmic if most are below a tenth.
    """
    figure, ax = _single_axes()
    steps, everything = np.arange(len(temperatures)), np.concatenate([np.array(v, dtype=float) for v in sets.values()])
    for colour, marker, (label, values) in zip(_COLOURS, "osD^v<", sets.items(), strict=False):
        ax.plot(steps, np.array(values, dtype=float), marker=marker, markersize=4, color=colour, label=label)
    ax.set(xlabel=f"temperature ({unit})" if unit else "temperature", ylabel="effective sample size", ylim=(0, 1.02))
    if np.nanmedian(everything) < 0.1:
        ax.set(ylim=(0.5 * np.nanmin(everything), 1.0), yscale="log")
    ax.set_xticks(steps, [f"{t:.0f}" if t >= 100 else f"{t:.3g}" for t in temperatures], rotation=45)
    _legend_above(ax, columns=1)
    return figure


@_styled
def plot_refinement(steps: Sequence[Mapping], n_walkers: int) -> Figure:
    """What happened on the way of ``n_walkers`` along β; ``steps``: those of `boltznce.smc.Annealed.history`.

    Of legs that follow each other β begins anew: one is added for each leg before.
    """
    beta = np.array([step["beta"] for step in steps])
    leg = np.cumsum(np.diff(beta, prepend=0.0) < 0)
    ends = np.array([np.flatnonzero(leg == number)[-1] for number in leg])
    beta = beta + leg
    column = lambda key: np.array([step[key] for step in steps], dtype=float)  # noqa: E731
    figure, axes = _panels(1, 2, 4.0, 2.8)
    left, right = axes.flat
    shares = {
        "ESS of the weights": column("ess"),
        "ancestors left": column("ancestors") / n_walkers,
        "acceptance": column("acceptance"),
    }
    for colour, marker, (label, values) in zip(_COLOURS, "osD", shares.items(), strict=False):
        left.plot(beta, values, marker=marker, markersize=3, color=colour, label=label)
    for at in beta[column("resampled") > 0]:
        left.axvline(at, color=_REFERENCE_COLOUR, linewidth=0.6, linestyle=":", zorder=0)
    left.set(xlabel="β", ylabel="share", xlim=(0, leg[-1] + 1.02), ylim=(0, 1.05))
    _legend_above(left, columns=3)
    mean_u = column("mean_u")
    right.plot(beta, mean_u - mean_u[ends], marker="o", markersize=3, color=_COLOURS[0])
    right.set(xlabel="β", ylabel="⟨u⟩ − ⟨u⟩ at the end (kT)", xlim=(0, leg[-1] + 1.02))
    return figure


@_styled
def plot_marginals(
    panels: Mapping[str, AnglesAndWeights], angle_names: Sequence[str] = ("φ", "ψ"), n_bins: int = 72
) -> Figure:
    """Probability densities of angles (n, k), an axis for each angle, logarithmic so that rare states show.

    ``panels``: label -> (angles (n, k), log weights or None), "MD" as a filled curve. Empty bins are gaps.
    """
    edges = np.linspace(-np.pi, np.pi, n_bins + 1)
    figure, axes = _panels(1, len(angle_names), 3.4, 2.9, sharey=True)
    for number, (ax, name) in enumerate(zip(axes.flat, angle_names, strict=True)):
        colours = iter(_COLOURS)
        for label, (angles, log_weights) in panels.items():
            density = _density(angles[:, number], edges, _weights(angles, log_weights))
            if label == "MD":
                ax.stairs(density, edges, fill=True, color="0.75", label=label)
                continue
            centres, seen = 0.5 * (edges[1:] + edges[:-1]), np.where(density > 0.0, density, np.nan)
            ax.plot(centres, seen, color=next(colours), linewidth=1.3, label=label)
        ax.set(xlabel=f"{name} (rad)", yscale="log", xlim=(-np.pi, np.pi))
        ax.set_xticks(*_ANGLE_TICKS)
    axes[0, 0].set(ylabel="probability density (1/rad)", ylim=(1e-5, 10.0))
    _legend_above(axes[0, 0])
    return figure


@_styled
def _plot_surfaces(
    panels: Panels,
    edges: tuple[np.ndarray, np.ndarray],
    highest: float,
    zero_of: str | None,
    labels: Sequence[str],
    aspect: str = "equal",
) -> tuple[Figure, np.ndarray]:
    """-log p of points in the plane, panels in rows of at most `MOST_COLUMNS`, and their axes, the empty ones off."""
    zero = np.nanmin(_surface(panels[next(iter(panels)) if zero_of is None else zero_of], edges, fewest=0.0))
    surfaces = {title: _surface(given, edges, FEWEST) for title, given in panels.items()}
    n_rows = -(-len(panels) // MOST_COLUMNS)
    n_columns = -(-len(panels) // n_rows)
    figure, axes = _panels(n_rows, n_columns, 2.3, 2.3, "compressed", extra=(0.9, 0.4), sharex=True, sharey=True)
    for ax, (title, surface) in zip(axes.flat, surfaces.items(), strict=False):
        # rasterized: thousands of vector cells show seams in a PDF viewer
        mesh = ax.pcolormesh(*edges, (surface - zero).T, cmap="viridis", vmin=0.0, vmax=highest, rasterized=True)
        ax.set(title=title, aspect=aspect, xlim=edges[0][[0, -1]], ylim=edges[1][[0, -1]])
        if np.isnan(surface).all():
            said = f"no bin of {FEWEST:.0f}\neffective samples"
            ax.text(0.5, 0.5, said, transform=ax.transAxes, ha="center", va="center", color="0.5")
        for spine in ax.spines.values():
            spine.set_visible(True)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    bar: dict[str, Any] = {"extend": "both", "shrink": 0.9, "aspect": 20 * n_rows, "pad": 0.01}
    figure.colorbar(mesh, ax=list(axes.flat), label="free energy (kT)", **bar)
    for row in axes:
        row[0].set_ylabel(labels[1])
    for column in axes.T:
        lowest = [ax for ax in column if ax.axison][-1]
        lowest.set_xlabel(labels[0])
        lowest.tick_params(labelbottom=True)
    return figure, axes


def _panels(
    n_rows: int,
    n_columns: int,
    width: float,
    height: float,
    layout: Literal["constrained", "compressed"] = "constrained",
    extra: tuple[float, float] = (0.0, 0.0),
    **options: Any,
) -> tuple[Figure, np.ndarray]:
    """A figure of panels of one size (inches) and something ``extra``, and its axes (rows, columns)."""
    figure = Figure(figsize=(width * n_columns + extra[0], height * n_rows + extra[1]), layout=layout)
    return figure, figure.subplots(n_rows, n_columns, squeeze=False, **options)


def _single_axes(width: float = 4.6, height: float = 3.2) -> tuple[Figure, Axes]:
    figure, axes = _panels(1, 1, width, height)
    return figure, axes[0, 0]


def _known(found: FreeEnergyProfile | FreeEnergySurface) -> np.ndarray:
    """Mask of the bins about which something is known."""
    return (found.std_error <= HIGHEST_ERROR) | np.isnan(found.std_error).all()


def _minus_log_sum(profile: FreeEnergyProfile, state: tuple[float, float] | None, periodic: bool) -> float:
    """-log Σ exp(-F) over the bins outside of a state; over all without a state, or where none outside is known."""
    outside = np.ones(len(profile.centres), bool) if state is None else ~in_interval(profile.centres, state, periodic)
    factors = np.exp(-np.nan_to_num(profile.free_energy, nan=np.inf))
    return -float(np.log(factors[outside].sum() or factors.sum()))


def _axis_label(symbol: str, unit: str) -> str:
    return f"{symbol} ({unit})" if unit else symbol


def _frames(
    box: Sequence[tuple[float, float]], limits: Sequence[tuple[float, float] | None], edges: Sequence[np.ndarray]
) -> list[tuple[tuple[float, float], float, float]]:
    """Corner, width and height of what is seen of a box, which may come again at the other end of a circle."""
    pieces = []
    for interval, ends, column in zip(box, limits, edges, strict=True):
        turns = (0.0,) if ends else (0.0, -2.0 * np.pi, 2.0 * np.pi)
        seen = [np.clip(np.add(interval, turn), column[0], column[-1]) for turn in turns]
        pieces.append([(low, high - low) for low, high in seen if low < high])
    return [((x, y), width, height) for x, width in pieces[0] for y, height in pieces[1]]


def _legend_above(ax: Axes, columns: int = 3) -> None:
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
    ax.legend(ncols=columns, columnspacing=1.2, handlelength=1.5, **place)


def _surface(given: AnglesAndWeights | np.ndarray, edges: tuple[np.ndarray, np.ndarray], fewest: float) -> np.ndarray:
    """-log p (n, n) of points, NaN where none is, and by weights where fewer than ``fewest`` effective ones are.

    Where that would leave out much of the weight, bins are joined: into blocks of few enough of them, if need be.
    """
    if isinstance(given, np.ndarray):
        return given
    points, log_weights = given
    weights, (x, y) = _weights(points, log_weights), points.T[:2]
    total, squares = (np.histogram2d(x, y, bins=list(edges), weights=w)[0] for w in (weights, weights**2))
    if log_weights is None or not np.ptp(log_weights) or not fewest:
        return -np.log(np.where(total > 0.0, total, np.nan))
    for size in (size for size in BLOCKS if len(total) % size == 0):
        sums, of_squares = (_in_blocks(histogram, size) for histogram in (total, squares))
        seen = (sums > 0.0) & (sums**2 >= fewest * of_squares)
        if sums[seen].sum() >= ENOUGH * sums.sum():
            break
    return np.kron(-np.log(np.where(seen, sums / size**2, np.nan)), np.ones((size, size)))


def _in_blocks(histogram: np.ndarray, size: int) -> np.ndarray:
    """Sums (n / size, n / size) over blocks of bins."""
    n = len(histogram) // size
    return histogram.reshape(n, size, n, size).sum(axis=(1, 3))


def _weights(values: np.ndarray, log_weights: np.ndarray | None) -> np.ndarray:
    return normalized_weights(np.zeros(len(values)) if log_weights is None else log_weights)


def _density(values: np.ndarray, edges: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weight in each bin over its width; what lies beyond the edges counts as weight all the same."""
    return np.histogram(values, bins=edges, weights=weights)[0] / np.diff(edges)


def _superposed(x: np.ndarray, template: np.ndarray, core: Sequence[int]) -> np.ndarray:
    """``x`` (n, 3) turned and shifted so that its core lies best on that of the template, centred there (Kabsch)."""
    x = x - x[core].mean(axis=0)
    u, _, vt = np.linalg.svd(x[core].T @ template[core])
    return x @ u @ np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))]) @ vt


def _running_median(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    chunks = np.array_split(np.arange(len(values)), 60)
    return np.array([steps[c].mean() for c in chunks]), np.array([np.median(values[c]) for c in chunks])
