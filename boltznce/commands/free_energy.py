"""ΔF and profile of weighted samples, with uncertainties and a figure. `boltznce free_energy run=outputs/...`

Of a run for many molecules: `boltznce free_energy run=outputs/... system=KS`
"""

from pathlib import Path

from omegaconf import DictConfig

from boltznce.config import build
from boltznce.methods.free_energy import write_free_energy
from boltznce.run import load_run


def main(config: DictConfig) -> None:
    run = load_run(config.run, config.device, config.trust)
    system = run.system.choose(build(config.system) if "system" in config else None)
    own = "weighted" if system.proxy is None else "refined"  # draws are weighted to the proxy
    print(
        write_free_energy(
            system,
            Path(config.samples or run.path / "samples" / own / run.system.label(system)),
            Path(config.output),
            coordinate=config.coordinate,
            state=None if config.state is None else tuple(config.state),
            n_bins=config.n_bins,
            n_bootstrap=config.n_bootstrap,
            seed=config.seed,
        )
    )
