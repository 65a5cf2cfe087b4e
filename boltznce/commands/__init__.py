"""What can be asked for on the command line, one file each: its ``main`` takes the config that its words composed.

`boltznce <command>` (boltznce/__main__.py) and, in a clone, `python scripts/<command>.py` start the same ``main`` by
`boltznce.cli.launch`.
"""

__all__ = ["COMMANDS"]

COMMANDS = {  # in plain ASCII, for any terminal; told without an import of the commands: torch alone takes seconds
    "train": "the main job: data, a generator, its likelihood, weights and a report",
    "sample": "weighted samples of a trained run, as drawn or refined",
    "free_energy": "free-energy difference and profile of weighted samples, with uncertainties",
    "simulate": "reference data by simulation",
    "finetune": "a run of many molecules fitted to one of them",
    "benchmark": "what the costly parts cost on this machine",
}
