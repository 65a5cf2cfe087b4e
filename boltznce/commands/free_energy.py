"""ΔF and profile of weighted samples, with uncertainties and a figure. `boltznce free_energy run=outputs/...`

Of a run for many molecules: `boltznce free_energy run=outputs/... system=KS`
Another state: `coordinate=chi1 state=[0.0,2.0]`, `state=[[phi,[0.0,2.0]],[psi,[-2.0,0.8]]] versus=...`
"""

from pathlib import Path

from omegaconf import DictConfig

from boltznce.command_line import command_line
from boltznce.config import build
from boltznce.errors import UserError
from boltznce.methods.free_energy import write_free_energy
from boltznce.pretrained import is_shipped
from boltznce.records import as_dict
from boltznce.run import Run, load_run
from boltznce.systems.base import System


def main(config: DictConfig) -> None:
    run = load_run(config.run, config.device, config.trust)
    system = run.system.choose(build(config.system) if "system" in config else None)
    label = run.system.label(system)
    print(
        write_free_energy(
            system,
            Path(config.samples or _of_report(run, system)),
            Path(config.output or run.folder.outputs / "free_energy" / label),
            **{key: as_dict(config)[key] for key in ("coordinate", "state", "versus")},
            n_bins=config.n_bins,
            n_bootstrap=config.n_bootstrap,
            seed=config.seed,
        )
    )


def _of_report(run: Run, system: System) -> Path:
    """The samples of the run's report. Raises UserError for a run that ships, which goes without."""
    label = run.system.label(system)
    if is_shipped(run.path):
        draw = command_line("sample", f"run={run.folder}", f"system={label}", "refine=true")
        raise UserError(
            f"{run.folder} ships without samples: {draw} makes some, with a report of ΔF; samples= takes their folder."
        )
    own = "weighted" if system.proxy is None else "refined"  # draws are weighted to the proxy
    return run.path / "samples" / own / label
