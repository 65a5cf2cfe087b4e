"""The console command: `boltznce train system=aldp`, or the same by `python -m boltznce train system=aldp`."""

import importlib
import sys

import boltznce
from boltznce.commands import COMMANDS, module_of

__all__ = ["main"]


def main() -> None:
    """Run the command that the first word names, with the words after it.

    Without any, or with --help, the commands are listed. An unknown one ends with a sentence and status 2.
    """
    command, *words = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        from boltznce.cli import launch  # not above: the list of commands is to be there at once

        sys.argv[1:] = words
        launch(command, importlib.import_module(module_of(command)).main)
    elif command in ("-h", "--help"):
        print(_overview())
    elif command == "--version":
        print(boltznce.__version__)
    else:
        print(f"Error: Unknown command {command!r}: choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "boltznce <command> [setting=value ...]",
            "",
            *rows,
            "",
            "boltznce <command> --help: its settings. boltznce --version: the version.",
        ]
    )


if __name__ == "__main__":
    main()
