"""What the commands share: Hydra's command line, a default budget, and a user's mistake told in one sentence."""

import contextlib
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

from boltznce import ranks
from boltznce.config import available, compose, config_dir, explain, normalize, quoted, unquoted
from boltznce.errors import UserError
from boltznce.folders import Kind, claim
from boltznce.io import disk_reason
from boltznce.pretrained import located
from boltznce.requeue import requeued
from boltznce.run_folder import RUN, RunFolder
from boltznce.settings import check
from boltznce.signals import Stopped, listening
from boltznce.sweep import note_failure

__all__ = ["launch"]

SWEEP = Kind("a sweep", "multirun.yaml")
MULTIRUN = ("-m", "--multirun")
SETTINGS = (HydraException, MissingMandatoryValue, InterpolationToMissingValueError)


def launch(config_name: str, main: Callable[[DictConfig], float | None]) -> None:
    """Compose ``configs/<config_name>.yaml`` with the command line and call ``main``.

    A mistake in the settings, an error of the disk and a `UserError` end with one sentence and status 2; a signal to
    stop with what to do to go on, and 128 + its number (`boltznce.signals`).
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints a trace of its own
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a code page without φ or ± must end nothing
            stream.reconfigure(errors="backslashreplace")
    logging.raiseExceptions = False  # a log file on a full disk is no reason for a trace

    def told(config: DictConfig) -> float | None:
        of_sweep = config_name == "train" and HydraConfig.get().mode == RunMode.MULTIRUN
        with _failure_noted() if of_sweep else _mistakes_told():
            OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # before any work
            check(config, config_name)
            return main(config)

    told.__module__ = main.__module__
    with _mistakes_told(), listening():
        sys.argv[1:] = _prepared(config_name, sys.argv[1:])
        hydra.main(version_base=None, config_path=str(config_dir()), config_name=config_name)(told)()


@contextlib.contextmanager
def _failure_noted() -> Iterator[None]:
    """Of a member of a sweep: what ends it is told, and noted for the table at the end, and ends no other member."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    note_failure(folder, None)
    try:
        yield
    except Exception as error:
        reason = _in_words(error)
        if reason is None:
            logging.getLogger("boltznce").exception("A member of the sweep failed, the others go on.")
        note_failure(folder, reason or f"{type(error).__name__}: {error}")
        print(f"Error: {reason or error}", file=sys.stderr)


@contextlib.contextmanager
def _mistakes_told() -> Iterator[None]:
    try:
        yield
    except Stopped as stopped:
        if ranks.is_first():
            how = requeued(stopped.number) or f"To go on: {stopped.how_to_go_on}"
            print(f"\nStopped by {stopped}. {how}", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except (ValueError, OSError, *SETTINGS) as error:
        logging.getLogger("boltznce").debug("", exc_info=True)
        reason = _in_words(error)
        if reason is None:
            raise
        print(f"Error: {reason}", file=sys.stderr)
        sys.exit(2)


def _in_words(error: BaseException) -> str | None:
    """A mistake of the user's or an error of the disk as one sentence; None of anything else."""
    if isinstance(error, ValueError) and isinstance(error.__cause__, OSError) and not isinstance(error, UserError):
        error = error.__cause__  # of Hydra's log file
    if isinstance(error, SETTINGS):
        return str(explain(error, sys.argv[1:]))
    if isinstance(error, OSError) and not (error.filename is None and disk_reason(error) is None):
        what = f"{error.filename}: " if error.filename else ""
        return f"{what}{error.strerror or error}. Choose another folder, with data_dir=, output= or hydra.run.dir=."
    return str(error) if isinstance(error, UserError) else None


def _prepared(config_name: str, overrides: Sequence[str]) -> list[str]:
    """The command line for Hydra; raises UserError or Hydra's own for a sweep that has a mistake in any member."""
    default_budget = "gpu" if torch.cuda.is_available() else "cpu"
    words = normalize(overrides, default_budget if config_name == "train" else None)
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if config_name == "train" and "resume" in given and "hydra.run.dir" not in given:
        run = RunFolder(located(unquoted(given["resume"])), trust=given.get("trust", "").lower() == "true")
        if not run.path.is_dir():
            raise UserError(f"There is no run folder {run}: give resume= the folder of a run that was started.")
        run.check_own()  # Hydra writes there
        run.check_links()
        # of the run's settings, which may not be those of this composition
        words = [word if _of_the_command(word) else f"++{word.lstrip('+')}" for word in words]
        words += [
            f"hydra.run.dir={quoted(str(run.path))}",
            "hydra.output_subdir=null",
        ]  # .hydra stays that of the start
    elif config_name == "train" and "${" not in given.get("hydra.run.dir", "${"):
        folder = unquoted(given["hydra.run.dir"])
        RunFolder(Path(folder)).check_own()  # before Hydra writes there
        claim(folder, RUN, "another hydra.run.dir")
    words += _of_one_of_many(config_name, given, words)
    if "hydra.sweep.dir" in given and "${" not in given["hydra.sweep.dir"]:
        claim(unquoted(given["hydra.sweep.dir"]), SWEEP, "another hydra.sweep.dir")
    if set(MULTIRUN) & set(words) and all("=" in word or word in MULTIRUN for word in words):
        swept = OverridesParser.create().parse_overrides([word for word in words if word not in MULTIRUN])
        for member in _members(swept):
            OmegaConf.to_container(compose(config_name, member), resolve=True, throw_on_missing=True)
        several = {override.key_or_group for override in swept if override.is_sweep_override()}
        once = sorted({override.key_or_group for override in swept} - several)  # folders are named after the others
        words.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(map(quoted, once))}]")
        for override in filter(Override.is_discrete_sweep, swept):
            if not available(override.key_or_group):  # a value, and no choice of configs
                for word in override.sweep_string_iterator():
                    value = OverridesParser.create().parse_override(f"x={word}").value()
                    check({override.key_or_group: value}, config_name)
    return words


def _of_the_command(word: str) -> bool:
    key = word.lstrip("+").partition("=")[0]
    return key in ("resume", "trust") or key.startswith(("-", "hydra")) or bool(available(key.partition("@")[0]))


def _of_one_of_many(config_name: str, given: Mapping[str, str], words: Sequence[str]) -> list[str]:
    """What Hydra is told in a process that torchrun or srun has started: the first alone writes.

    Raises UserError for commands of one process, and where each would take another folder.
    """
    if ranks.environment() is None:
        return []
    if config_name not in ("train", "sample") or set(MULTIRUN) & set(words):
        raise UserError(
            "A sweep, and each command but train and sample, is started in one process: leave out torchrun or srun."
        )
    if config_name == "sample":
        return []
    if not {"hydra.run.dir", "resume"} & set(given):
        raise UserError(
            "Processes that torchrun or srun has started need one folder: add hydra.run.dir=... or resume=..."
        )
    quiet = ["hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
    return [] if ranks.is_first() else quiet


def _members(swept: Sequence[Override]) -> Iterator[tuple[str, ...]]:
    """A sweep's members, as far as they differ in a choice of configs: of other values the first."""
    choices: list[list[Any]] = []
    for override in swept:
        each = [override.input_line]
        if override.is_discrete_sweep():
            each = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        elif override.is_interval_sweep():
            between: Any = override.value()
            each = [f"{override.get_key_element()}={between.start}"]
        choices.append(each if available(override.key_or_group) else each[:1])
    return itertools.product(*choices)
