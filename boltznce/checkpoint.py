"""Weights as safetensors files, and numbered checkpoints of an unfinished training, of which the last few are kept."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from boltznce.errors import UserError
from boltznce.folders import Kind, claim
from boltznce.io import atomic_file, atomic_folder, file_digest, is_temporary
from boltznce.records import damaged, read_json

__all__ = ["Checkpoints", "load_weights", "parameters_digest", "save_weights", "weights_digest"]

REMEDY = "delete it and resume the run"

CHECKPOINT = Kind("a checkpoint", "digests.json", names=r"\w+\.safetensors|state\.pt", whole=True)


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping | None = None) -> None:
    """Write named tensors to a safetensors file, whole or not at all, and ``metadata`` (JSON) to its header."""
    with atomic_file(path) as temporary:
        _save(temporary, tensors, metadata)


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors on the CPU, and metadata, as `save_weights` wrote them. Raises UserError for a damaged file or none.

    A file that `save_weights` wrote holds a digest of both; of others only the form is checked.
    """
    if not Path(path).is_file():
        raise UserError(f"There are no weights at {path}: train first, or name another run folder.")
    try:
        with safe_open(path, framework="pt") as handle:
            header = handle.metadata() or {}
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118, not a dict
        metadata = header.get("boltznce", "{}")
        if header.get("sha256", digest := _digest(tensors, metadata)) != digest:
            raise ValueError("they are not what was written")
        return tensors, dict(json.loads(metadata))
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise damaged(f"The weights file {path}", error, REMEDY) from error


def weights_digest(path: Path) -> str:
    """Of the tensors in a safetensors file, whatever its metadata. Raises UserError as `load_weights` does."""
    return _digest(load_weights(path)[0])


def parameters_digest(modules: Iterable[nn.Module]) -> str:
    """Of all that is trained in modules, on whatever device: short, to be written beside what was made with them."""
    named = (parameter for module in modules for parameter in module.named_parameters())
    return _digest({f"{k} {name}": value.detach().cpu() for k, (name, value) in enumerate(named)})[:16]


def _digest(tensors: Mapping[str, Tensor], metadata: str = "") -> str:
    digest = hashlib.sha256(metadata.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping | None = None) -> None:
    # safetensors refuses tensors that share memory (tied weights, views), so each entry is given its own.
    own = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    text = json.dumps(dict(metadata or {}))
    save_file(own, path, metadata={"boltznce": text, "sha256": _digest(own, text)})


class Checkpoints:
    """The folders ``step_XXXXXXX`` of a training: ``<part>.safetensors`` of each weights, ``state.pt``, digests."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, weights: Mapping[str, Mapping[str, Tensor]], state: dict) -> None:
        """Write the checkpoint of ``step`` whole or not at all, then delete all but the newest ``keep``."""
        folder = self.folder / f"step_{step:07d}"
        with atomic_folder(folder, lambda: claim(folder, CHECKPOINT)) as temporary:
            for part, tensors in weights.items():
                _save(temporary / f"{part}.safetensors", tensors)
            torch.save(state, temporary / "state.pt")
            digests = {file.name: file_digest(file) for file in sorted(temporary.iterdir())}
            (temporary / "digests.json").write_text(json.dumps(digests, indent=1), encoding="utf-8")
        left_by_kills = [path for path in self.folder.glob(".step_*") if is_temporary(path.name)]
        for old in [*self._saved()[: -self.keep], *left_by_kills]:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self) -> tuple[dict[str, dict[str, Tensor]], dict] | None:
        """Weights by part and the state of the newest checkpoint, or None. Raises UserError if it is damaged."""
        saved = self._saved()
        if not saved:
            return None
        newest = saved[-1]
        before = f"the one before, {saved[-2].name}" if len(saved) > 1 else "its beginning"
        remedy = f"delete it, and this training resumes from {before}"
        digests = read_json(newest / "digests.json", remedy.replace("it", "this checkpoint", 1))
        try:
            names = {"state.pt", "model.safetensors", *digests, *(file.name for file in newest.glob("*.safetensors"))}
            for name in sorted(names):
                if file_digest(newest / name) != digests.get(name):
                    raise ValueError(f"{name} is not what was written")
            files = {name.removesuffix(".safetensors"): newest / name for name in names - {"state.pt"}}
            weights = {part: load_weights(path)[0] for part, path in files.items()}
            return weights, torch.load(newest / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # torch's unpickler, zip reader and storage reader each raise their own kinds
            raise damaged(f"The checkpoint {newest}", error, remedy) from error

    def _saved(self) -> list[Path]:
        found = (folder for folder in self.folder.glob("step_*") if re.fullmatch(r"step_\d+", folder.name))
        return sorted(found, key=lambda folder: int(folder.name.removeprefix("step_")))
