"""Runs that tests make from nothing."""

import json

from boltznce.config import compose
from boltznce.run import train
from boltznce.run_folder import RunFolder


def run_in(folder, overrides):
    """Train a run in a folder; returns the numbers of its report."""
    config = compose("train", overrides)
    folder.mkdir(parents=True, exist_ok=True)
    train(RunFolder.create(folder, config, config.system.name))
    return json.loads((folder / "metrics.json").read_text())
