"""What a sweep ends with: a table of its runs, mean ± standard deviation over seeds for each setting, and a figure."""

import csv
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from boltznce.analysis.main_numbers import DELTA_F, ERROR_OF_DELTA_F, Number, form_of, main_numbers, over_seeds
from boltznce.config import locate
from boltznce.errors import UserError
from boltznce.io import atomic_file
from boltznce.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FAILED", "DrawSweep", "Member", "draw_sweep", "note_failure"]

FAILED = "failed.txt"  # in the folder of a member: why it ended
SHARED = ("seed", "hydra.", "threads", "device", "logger", "data_dir")  # beginnings of settings that make no row


class DrawSweep(Callback):
    """Writes table and figure when a sweep has ended (``hydra.callbacks`` of configs/train.yaml)."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        try:
            print(draw_sweep(folder, trust=True))  # composed by the user, just now
        except UserError as error:  # Hydra would make a warning of it
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(2)
        if not all(member.finished for member in members_of(folder)):
            sys.exit(2)


@dataclass(frozen=True)
class Member:
    """A run of a sweep: its folder, its number in the sweep, and what was set for it on the command line."""

    path: Path
    number: int
    words: Mapping[str, str]
    trust: bool = False

    @property
    def finished(self) -> bool:
        """Whether it has its report."""
        return (self.path / "metrics.json").exists()

    @property
    def state(self) -> str:
        """Finished; or why it is not."""
        failed = self.path / FAILED
        if self.finished:
            return "finished"
        return failed.read_text(encoding="utf-8").strip() if failed.exists() else "not finished"

    @cached_property
    def run(self) -> RunFolder:
        """Its `RunFolder`. Raises UserError where it is damaged, or not trusted."""
        return RunFolder.open(self.path, self.trust)

    @cached_property
    def metrics(self) -> Mapping[str, Any]:
        """The numbers of its report."""
        return self.run.metrics

    @cached_property
    def numbers(self) -> dict[str, Number]:
        """Its main numbers, none where it is not finished."""
        if not self.finished:
            return {}
        losses = {name: record.get("validation_loss") for name, record in self.run.stages.items()}
        return main_numbers(self.metrics, losses)


def note_failure(folder: Path, reason: str | None) -> None:
    """Leave in the folder of a member why it failed, or (None) that it did not."""
    if reason is None:
        (folder / FAILED).unlink(missing_ok=True)
    else:
        (folder / FAILED).write_text(" ".join(reason.split()) + "\n", encoding="utf-8")


def draw_sweep(folder: Path | str, trust: bool = False) -> str:
    """Write ``table.md``, ``table.csv``, ``runs.csv`` and ``figure.png`` of a sweep's folder; return the first.

    Rows are the settings that differ between the members, seeds left out. ``runs.csv`` has each run by itself. Means of
    ΔF are of the runs whose own ΔF is reliable, if there are any; the table says how many, and tells what failed or is
    not finished. Raises UserError where no run is finished, one is damaged, or names foreign classes without ``trust``.
    """
    from boltznce.analysis.report import markdown_table  # loads matplotlib, which only the end of a sweep needs

    folder, members = Path(folder), members_of(Path(folder), trust)
    done = [member for member in members if member.finished]
    if not done:
        why = f" ({members[0].state})" if members else ""
        raise UserError(f"{folder} has no finished runs{why}: give the folder of a sweep.")
    keys = _swept(members)
    groups: dict[tuple[str, ...], list[Member]] = {}
    for member in members:
        groups.setdefault(tuple(member.words.get(key, "") for key in keys), []).append(member)
    titles = list(dict.fromkeys(title for member in done for title in member.numbers))
    rows = [_row(dict(zip(keys, setting, strict=True)), group, titles) for setting, group in groups.items()]
    columns = list(dict.fromkeys(key for row in rows for key in row.words))
    text = markdown_table([columns, *([row.words.get(key, "") for key in columns] for row in rows)])
    lost = [f"- {member.path.relative_to(folder)}: {member.state}" for member in members if not member.finished]
    if lost:
        text += f"\n\n{len(lost)} of {len(members)} runs are not in it:\n\n" + "\n".join(lost)
    with atomic_file(folder / "table.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    _write_csv(folder / "table.csv", [row.values for row in rows])
    _write_csv(folder / "runs.csv", [_line(member, keys, titles, folder) for member in members])
    with atomic_file(folder / "figure.png") as path:
        _figure(rows, done).savefig(path, format="png", dpi=200)
    return (
        f"{text}\n\nTable: {folder / 'table.md'}, of each run: {folder / 'runs.csv'}\nFigure: {folder / 'figure.png'}"
    )


def members_of(folder: Path, trust: bool = False) -> list[Member]:
    """The members whose folders lie below ``folder``, in the order of the sweep, by what Hydra leaves in each."""
    found = []
    for path in folder.rglob(".hydra/overrides.yaml"):
        words = (str(word).lstrip("+").partition("=") for word in OmegaConf.load(path))
        number = OmegaConf.load(path.with_name("hydra.yaml")).hydra.job.get("num", 0)
        found.append(Member(path.parents[1], number, {key: value for key, _, value in words}, trust))
    return sorted(found, key=lambda member: (member.number, str(member.path)))


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One setting: what is swept, its numbers {title: of each run}, and the table's cells in words and as numbers."""

    settings: Mapping[str, str]
    numbers: Mapping[str, Sequence[Number]]
    words: Mapping[str, str]
    values: Mapping[str, Any]


def _swept(members: Sequence[Member]) -> list[str]:
    """The settings in which members differ, but for seeds and what changes no result."""
    keys = dict.fromkeys(key for member in members for key in member.words)
    return [
        key for key in keys if not key.startswith(SHARED) and len({member.words.get(key) for member in members}) > 1
    ]


def _row(settings: Mapping[str, str], group: Sequence[Member], titles: Sequence[str]) -> Row:
    done = [member for member in group if member.finished]
    words = dict(settings)
    values: dict[str, Any] = dict(settings)
    words["runs"] = str(len(done)) if len(done) == len(group) else f"{len(done)} of {len(group)}"
    values |= {"runs": len(done), "not finished": len(group) - len(done)}
    judged = [each["headline"]["row"] is not None for member in done for each in _molecules(member.metrics)]
    if judged:
        words["ΔF reliable"] = f"{sum(judged)} of {len(judged)}"
        values |= {"ΔF reliable": sum(judged), "ΔF in all": len(judged)}
    numbers = {title: [member.numbers[title] for member in done if title in member.numbers] for title in titles}
    for title in titles:
        mean, std, n = seeds = over_seeds(numbers[title])
        words[title] = seeds.in_words(form_of(title))
        if n and not any(number.reliable for number in numbers[title]):
            words[title] += " (not reliable)"
        values |= {f"{title}, mean": mean, f"{title}, std": std, f"{title}, n": n}
        if title == DELTA_F:
            ends = [number.interval for number in numbers[title] if number.interval is not None]
            lower, upper = np.mean(ends, axis=0) if ends else (math.nan, math.nan)
            words["95% interval"] = f"[{lower:.2f}, {upper:.2f}]" if ends else "–"
            values |= {"lower end, mean": lower, "upper end, mean": upper}
    return Row(settings, numbers, words, values)


def _molecules(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The results of each molecule that was tested and has a free energy."""
    return [each for each in (metrics.get("members") or {"": metrics}).values() if each.get("headline")]


def _line(member: Member, keys: Sequence[str], titles: Sequence[str], folder: Path) -> dict[str, Any]:
    """One run in ``runs.csv``."""
    none = Number(math.nan)
    line: dict[str, Any] = {key: member.words.get(key, "") for key in keys} | {"seed": member.words.get("seed", "")}
    line |= {title: member.numbers.get(title, none).value for title in titles}
    if DELTA_F in titles:
        _, reliable, interval = member.numbers.get(DELTA_F, none)
        lower, upper = interval or (math.nan, math.nan)
        line |= {"ΔF reliable": reliable if DELTA_F in member.numbers else "", "lower end": lower, "upper end": upper}
    return line | {"folder": str(member.path.relative_to(folder)), "state": member.state}


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(dict.fromkeys(key for row in rows for key in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)


def _figure(rows: Sequence[Row], done: Sequence[Member]) -> "Figure":
    """The method's own figure of a sweep, where all runs are of one method that has one; else that of the numbers."""
    from boltznce.analysis.plotting import plot_sweep

    (target, *others) = {member.run.config.method._target_ for member in done}
    own = None if others else vars(locate(target, ModuleType)).get("sweep_figure")
    if own is not None:
        return own([member.run for member in done])
    references = {(member.metrics.get("free_energy") or {}).get("reference", {}).get("value") for member in done}
    reference = references.pop() if len(references) == 1 else None
    titles = [title for title in rows[0].numbers if reference is None or title != ERROR_OF_DELTA_F]
    panels = {title: {_label(row): row.numbers[title] for row in rows} for title in titles}
    lines = {} if reference is None else {title: reference for title in titles if title.startswith("ΔF")}
    return plot_sweep(panels, lines, [title for title in titles if "%" in form_of(title)])


def _label(row: Row) -> str:
    """The values of a row's settings, those of on and off with their names."""
    parts = [
        f"{key.rpartition('.')[2]}={value}" if value in ("true", "false", "null") or value[:1].isdigit() else value
        for key, value in row.settings.items()
        if value
    ]
    return "\n".join(part if len(part) <= 26 else f"{part[:25]}…" for part in parts) or "all"
