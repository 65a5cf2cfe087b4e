"""Weighted samples of a trained run. `python scripts/sample.py run=outputs/... n_samples=100000 likelihood=ebm`

Of a run for many molecules: `python scripts/sample.py run=outputs/... system=KS`
"""

from pathlib import Path

from omegaconf import DictConfig

from boltznce import load_run
from boltznce.analysis.samples_io import SAMPLES
from boltznce.cli import launch
from boltznce.config import build
from boltznce.folders import claim


def main(config: DictConfig) -> None:
    output = Path(config.output)
    claim(output, SAMPLES, "another output")
    samples = load_run(config.run, config.device, config.trust).sample(
        config.n_samples,
        config.likelihood,
        system=build(config.system) if "system" in config else None,
        seed=config.seed,
        batch_size=config.batch_size,
        n_probes=config.n_probes,
        folder=output,
        format=config.format,
    )
    print(f"{len(samples)} samples in {output}: ESS {samples.ess:.2%}, Pareto-k {samples.pareto_k:.2f}")


if __name__ == "__main__":
    launch("sample", main)
