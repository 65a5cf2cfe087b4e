"""What the scripts share: Hydra's command line, a default budget, and a user's mistake told in one sentence."""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from boltznce.config import compose, config_dir, fit_budget, offer_sequences
from boltznce.errors import UserError

__all__ = ["launch"]


def launch(config_name: str, main: Callable[[DictConfig], None], home: str | None = None) -> None:
    """Compose ``configs/<config_name>.yaml`` with the command line and call ``main``; a `UserError` ends with its message and status 2.

    ``home`` names an override such as ``resume`` or ``run`` whose value is a run folder: log files then go there.
    """
    overrides = sys.argv[1:]
    try:
        given = _values(overrides)
        if config_name == "train" and not {"budget", "experiment"} & given.keys():
            overrides = [*overrides, f"budget={'paper' if torch.cuda.is_available() else 'cpu'}"]
        if config_name == "train":
            overrides = fit_budget(overrides)
        if home in given and "hydra.run.dir" not in given:
            if not Path(given[home]).is_dir():
                raise UserError(f"There is no run folder {given[home]}: give {home}= the folder of a run that train.py has started.")
            overrides = [*overrides, f"hydra.run.dir='{given[home]}'"]
        offer_sequences(overrides)
        if not any(word.startswith("-") for word in overrides):
            compose(config_name, overrides)  # mistakes in the settings, told before anything starts
    except UserError as error:
        sys.exit(_tell(error))
    sys.argv[1:] = overrides

    def guarded(config: DictConfig) -> None:
        try:
            main(config)
        except UserError as error:
            logging.getLogger("boltznce").debug("", exc_info=True)
            sys.exit(_tell(error))

    guarded.__module__ = main.__module__
    hydra.main(version_base=None, config_path=str(config_dir()), config_name=config_name)(guarded)()


def _values(overrides: Sequence[str]) -> dict[str, str]:
    """The overrides ``key=value`` of the command line."""
    return dict(word.split("=", 1) for word in overrides if "=" in word and not word.startswith("-"))


def _tell(error: UserError) -> int:
    print(f"Error: {error}", file=sys.stderr)
    return 2
