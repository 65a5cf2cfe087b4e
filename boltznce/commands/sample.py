"""Weighted samples of a trained run. `boltznce sample run=outputs/... n_samples=100000 likelihood=ebm`

With refine=true they are annealed to the target, from the likelihood that the run has learned.
Of a run for many molecules: `boltznce sample run=outputs/... system=KS`
"""

from pathlib import Path

from omegaconf import DictConfig

from boltznce.analysis.samples_io import SAMPLES
from boltznce.config import build
from boltznce.folders import claim
from boltznce.run import load_run, refined_folder


def main(config: DictConfig) -> None:
    output = Path(config.output)
    places = [output, refined_folder(output)][: 1 + config.refine]
    for place in places:
        claim(place, SAMPLES, "another output")
    samples = load_run(config.run, config.device, config.trust).sample(
        config.n_samples,
        config.likelihood,
        system=build(config.system) if "system" in config else None,
        seed=config.seed,
        batch_size=config.batch_size,
        n_probes=config.n_probes,
        refine=config.refine,
        folder=output,
        format=config.format,
    )
    print(f"{len(samples)} samples in {places[-1]}: ESS {samples.ess:.2%}, Pareto-k {samples.pareto_k:.2f}")
