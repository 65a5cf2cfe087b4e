"""Weights as safetensors files, and numbered checkpoints of an unfinished training, of which the last few are kept."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from boltznce.errors import UserError
from boltznce.io import atomic_file, atomic_folder, file_digest

__all__ = ["Checkpoints", "load_weights", "save_weights"]


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping | None = None) -> None:
    """Write named tensors to a safetensors file, whole or not at all, and ``metadata`` (JSON) to its header."""
    with atomic_file(path) as temporary:
        _save(temporary, tensors, metadata)


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors on the CPU, and metadata, as `save_weights` wrote them. Raises UserError for a damaged file or none."""
    if not Path(path).is_file():
        raise UserError(f"There are no weights at {path}: train first, or name another run folder.")
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = json.loads((handle.metadata() or {}).get("boltznce", "{}"))
            return {key: handle.get_tensor(key) for key in handle.keys()}, metadata  # noqa: SIM118, not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"The weights file {path} is damaged ({error}): delete it and resume the run.") from error


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping | None = None) -> None:
    # safetensors refuses tensors that share memory (tied weights, views), so each entry is given its own.
    own = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    save_file(own, path, metadata={"boltznce": json.dumps(dict(metadata or {}))})


class Checkpoints:
    """The folders ``step_XXXXXXX`` of a training: ``<part>.safetensors`` of each weights, ``state.pt``, digests."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, weights: Mapping[str, Mapping[str, Tensor]], state: dict) -> None:
        """Write the checkpoint of ``step`` whole or not at all, then delete all but the newest ``keep``."""
        with atomic_folder(self.folder / f"step_{step:07d}") as temporary:
            for part, tensors in weights.items():
                _save(temporary / f"{part}.safetensors", tensors)
            torch.save(state, temporary / "state.pt")
            digests = {file.name: file_digest(file) for file in sorted(temporary.iterdir())}
            (temporary / "digests.json").write_text(json.dumps(digests, indent=1))
        left_by_kills = self.folder.glob(".step_*.tmp")
        for old in [*self._saved()[: -self.keep], *left_by_kills]:
            shutil.rmtree(old)

    def newest(self) -> tuple[dict[str, dict[str, Tensor]], dict] | None:
        """Weights by part and the state of the newest checkpoint, or None. Raises UserError if it is damaged."""
        saved = self._saved()
        if not saved:
            return None
        newest = saved[-1]
        try:
            digests = json.loads((newest / "digests.json").read_text())
            for name, digest in digests.items():
                if file_digest(newest / name) != digest:
                    raise ValueError(f"{name} is not what was written")
            weights = {file.stem: load_weights(file)[0] for file in newest.glob("*.safetensors")}
            return weights, torch.load(newest / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, ValueError) as error:
            before = f"the one before, {saved[-2].name}" if len(saved) > 1 else "its beginning"
            raise UserError(
                f"The checkpoint {newest} is damaged ({error}): delete it, and this training resumes from {before}."
            ) from error

    def _saved(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"), key=lambda folder: int(folder.name.removeprefix("step_")))
