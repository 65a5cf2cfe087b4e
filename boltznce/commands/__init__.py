"""What can be asked for on the command line, one file each: its ``main`` takes the config that its words composed.

`boltznce <command>` (boltznce/__main__.py) and, in a clone, `python scripts/<command>.py` start the same ``main`` by
`boltznce.cli.launch`.
"""

import keyword

__all__ = ["COMMANDS", "module_of"]

COMMANDS = {  # in plain ASCII, for any terminal; told without an import of the commands: torch alone takes seconds
    "train": "the main job: data, a generator, its likelihood, weights and a report",
    "sample": "weighted samples of a trained run, as drawn or refined",
    "free_energy": "free-energy difference and profile of weighted samples, with uncertainties",
    "simulate": "reference data by simulation",
    "import": "data of trajectories made elsewhere",
    "finetune": "a run of many molecules fitted to one of them",
    "benchmark": "what the costly parts cost on this machine",
}


def module_of(command: str) -> str:
    """The Python path of a command; what is a keyword of Python's has a _ there.

    >>> module_of("import"), module_of("train")
    ('boltznce.commands.import_', 'boltznce.commands.train')
    """
    return f"{__name__}.{command}{'_' * keyword.iskeyword(command)}"
