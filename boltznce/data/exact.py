"""A dataset of exact draws, for systems that can be sampled without simulation."""

from datetime import date
from pathlib import Path

from boltznce.data.dataset import Dataset
from boltznce.errors import UserError
from boltznce.training import step_generator

__all__ = ["draw_dataset"]


def draw_dataset(system, folder: Path, n_samples: int, seed: int = 0) -> Dataset:
    """Draw ``n_samples`` of a system with ``sample(n, generator)`` and write them as a dataset to ``folder``.

    Raises UserError for a system that cannot be sampled so.
    """
    if not hasattr(system, "sample"):
        raise UserError(f"{system.name} cannot be drawn from exactly: give data.simulation, how to simulate it.")
    x = system.sample(n_samples, step_generator(seed, "data", 0))
    meta = {
        "system": system.identity,
        "settings": {"method": "exact", "n_samples": n_samples, "seed": seed},
        "date": date.today().isoformat(),
    }
    return Dataset.write(folder, x.numpy(), system.energy(x).double().numpy(), meta=meta)
