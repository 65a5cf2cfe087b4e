"""What ``compile=auto|true|false`` means, for networks and energies alike."""

import logging
import shutil

import torch

from boltznce.errors import UserError

__all__ = ["wants_compiling"]

log = logging.getLogger(__name__)
CHOICES = ("auto", "true", "false")
CPU_COMPILERS = ("g++", "clang++", "c++")


def wants_compiling(mode: str | bool) -> bool:
    """Whether to use torch.compile: ``true``, ``false``, or ``auto``: where there is a GPU.

    Never where torch could not compile, for want of a C++ compiler: one warning then. Raises UserError for other words.
    """
    mode = str(mode).lower()
    if mode not in CHOICES:
        raise UserError(f"Unknown compile={mode}: choose one of {', '.join(CHOICES)}.")
    if mode == "false" or (mode == "auto" and not torch.cuda.is_available()):
        return False
    if not torch.cuda.is_available() and not any(shutil.which(name) for name in CPU_COMPILERS):
        log.warning("There is no C++ compiler, so nothing is compiled; install one (g++) or set compile=false.")
        return False
    return True
