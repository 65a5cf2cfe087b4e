"""Commands that messages tell the reader to give: in the words by which the running program was started."""

import shlex
import sys
from pathlib import Path

__all__ = ["command_line"]

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"  # of a clone


def command_line(command: str, *words: str) -> str:
    """``python scripts/<command>.py`` for whoever runs a script of this clone, else ``boltznce <command>``.

    >>> command_line("train", "resume=my run")
    "boltznce train 'resume=my run'"
    """
    started = Path(sys.argv[0])
    start = ["boltznce", command]
    if started.resolve().parent == SCRIPTS:
        start = ["python", str(started.with_name(f"{command}.py"))]
    elif started.parts[-2:] == ("boltznce", "__main__.py"):
        start = ["python", "-m", *start]
    return shlex.join([*start, *words])
