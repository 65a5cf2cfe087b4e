"""From a finished run to one that ships: weights, a config and records without this machine's paths, and a card.

``python -c "from boltznce.pretrained.export import export; export('outputs/my_run', 'dipeptides', half=True)"``
"""

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

import boltznce
from boltznce import pretrained
from boltznce.checkpoint import load_weights, save_weights
from boltznce.errors import UserError
from boltznce.io import atomic_folder
from boltznce.records import sealed
from boltznce.run_folder import RunFolder
from boltznce.run_inputs import INPUTS
from boltznce.settings import leaves
from boltznce.trust import is_plain_name

__all__ = ["export", "halved"]

MOST_BYTES = 16 * 2**20
ELSEWHERE = {"device": "auto", "compile": "auto", "threads": None, "logger": {"kind": "csv"}, "data_dir": "data"}


def export(run: Path | str, name: str, *, half: bool = False, figures: str = "") -> Path:
    """Write ``boltznce/pretrained/<name>`` from a finished run's folder; returns it.

    Data stand in its config by a path from wherever it is used, ``data/<folder>``: what lies there is compared with.

    Args:
        half: whether weights are stored as float16, half as large; they are float32 again when loaded.
        figures: Markdown for the card, on what was measured.

    Raises UserError for a run that is not finished, for a name that is taken or none, for a path of this machine that
    would stay in the config, and for a model of more than 16 MiB.
    """
    source, target = RunFolder.open(Path(run), trust=True), pretrained.FOLDER / name
    if not is_plain_name(name):
        raise UserError(f"A pretrained model cannot be called {name!r}: give it a name without slashes.")
    if target.exists():
        raise UserError(f"{target} is there already: choose another name, or delete it.")
    metrics, settings = source.metrics, source._settings()
    scales = [section for section in ("flow", "ebm") if settings.get(section, {}).get("scales") == "frames"]
    if half and scales:
        raise UserError(f"{scales[0]}.scales=frames are saved with the weights, and lose too much: set half=False.")
    data = str(settings["data"]["folder"])
    config = _portable(settings)
    told = json.loads(json.dumps(metrics).replace(json.dumps(data)[1:-1], str(config["data"]["folder"])))
    with atomic_folder(target) as folder:
        parts = _weights(source, folder, half)
        if (source.path / INPUTS).is_dir():
            starts = shutil.ignore_patterns("flow.start", "ebm.start")
            shutil.copytree(source.path / INPUTS, folder / INPUTS, ignore=starts)
        OmegaConf.save(OmegaConf.create(sealed(config)), folder / "config.yaml")
        _write_json(folder / "run.json", _record(source))
        _write_json(folder / "metrics.json", told)
        rows = told["settings"] | parts | _costs(source) | {"made by": _maker()}
        (folder / "README.md").write_text(_card(name, told, rows, figures), encoding="utf-8")
        files = [path for path in folder.rglob("*") if path.is_file()]
        for path in files:
            path.chmod(0o644)  # safetensors lets nobody else read what it writes
        size = sum(path.stat().st_size for path in files)
        if size > MOST_BYTES:
            most = f"{MOST_BYTES / 2**20:.0f} MiB"
            raise UserError(f"{name} is of {size / 2**20:.1f} MiB, and {most} may ship: set half=True, or train less.")
    return target


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float tensors as float16, if they fit its range; others as they are.

    >>> [str(x.dtype) for x in halved({"a": torch.ones(2), "b": torch.tensor([1e6]), "c": torch.arange(2)}).values()]
    ['torch.float16', 'torch.float32', 'torch.int64']
    """
    most = torch.finfo(torch.float16).max
    fits = {key: x.is_floating_point() and bool((x.abs() <= most).all()) for key, x in tensors.items()}
    return {key: x.half() if fits[key] else x for key, x in tensors.items()}


def _portable(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's config without what is this machine's own."""
    config = settings | ELSEWHERE
    config["data"] = settings["data"] | {"folder": f"data/{Path(settings['data']['folder']).name}"}
    config["system"] = settings["system"] | ({"compile": "auto"} if "compile" in settings["system"] else {})
    for section in ("flow", "ebm"):
        if section in config:
            config[section] = settings[section] | {"start": None}
    for key, value in leaves(config):
        if isinstance(value, str) and Path(value).is_absolute():
            raise UserError(f"{key}={value} is a path of this machine: train with a file, which is copied, or without.")
    return config


def _weights(source: RunFolder, folder: Path, half: bool) -> dict[str, str]:
    """Copy the weights; returns rows for the card."""
    rows = {}
    for path in sorted((source.path / "checkpoints").glob("*.safetensors")):
        tensors, _ = load_weights(path)
        n = sum(tensor.numel() for tensor in tensors.values())
        save_weights(folder / "checkpoints" / path.name, halved(tensors) if half else tensors)
        rows[f"weights of the {path.stem}"] = f"{n:,} numbers, stored as {'float16' if half else 'float32'}"
    return rows


def _record(source: RunFolder) -> dict[str, Any]:
    """The run's record, without where it lay and what its stages left."""
    kept = {key: value for key, value in source._read().items() if key not in ("home", "stages")}
    stages = {
        name: {key: value for key, value in stage.items() if key != "leaves"} for name, stage in source.stages.items()
    }
    return kept | {"stages": stages}


def _costs(source: RunFolder) -> dict[str, str]:
    """Rows for the card: when, and how long each stage took."""
    hours = [f"{name} {record['seconds'] / 3600:.2f}" for name, record in source.stages.items()]
    data = source.stages.get("data", {})
    simulated = f"{data.get('frames', 0):,} frames, {data.get('simulation_seconds', 0.0) / 3600:.2f} hours of the CPU"
    return {"started": source.started, "hours": ", ".join(hours), "simulation": simulated}


def _maker() -> str:
    """The version, and the commit where this is a clone."""
    git = ["git", "-C", str(Path(boltznce.__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return f"boltznce {boltznce.__version__}" + (f", exported at commit {commit}" if commit else "")


def _card(name: str, metrics: Mapping[str, Any], rows: Mapping[str, str], figures: str) -> str:
    what = f"`system={metrics['system']} method={metrics['method']} budget={metrics['budget']}`"
    return "\n".join(
        [
            f"# {name}",
            "",
            f"A trained run, {what}: `run=pretrained/{name}` on the command line,",
            f'`bz.load_pretrained("{name}")` in Python. The numbers of its own report are in `metrics.json`.',
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {key} | {value} |" for key, value in rows.items()),
            "",
            "## What was measured",
            "",
            figures.strip() or "No figures were given when it was exported.",
            "",
        ]
    )


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(sealed(record), indent=1) + "\n", encoding="utf-8")
