"""Weighted samples of a trained run. `boltznce sample run=outputs/... n_samples=100000 likelihood=ebm`

With refine=true they are annealed to the target, from the likelihood that the run has learned.
Of a run for many molecules, or one that ships: `boltznce sample run=pretrained/dipeptides system=KS refine=true`, with
a report of that molecule.
"""

from pathlib import Path

from omegaconf import DictConfig

from boltznce import processes, ranks
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.analysis.samples_io import SAMPLES
from boltznce.config import build
from boltznce.errors import UserError
from boltznce.folders import claim
from boltznce.methods.finetune import start_report
from boltznce.run import Run, refined_folder, set_threads, train
from boltznce.systems.base import System


def main(config: DictConfig) -> None:
    if config.devices > 1 and ranks.environment() is None:
        return processes.run(config.devices, main, config)
    set_threads(config.threads)
    run = Run(config.run, config.device, config.trust, config.devices)
    system = run.system.choose(build(config.system) if "system" in config else None)
    name = f"{config.likelihood}-{config.n_samples}-seed{config.seed}"
    output = Path(config.output or run.folder.outputs / "samples" / run.system.label(system) / name)
    reports = config.refine and run.system.is_family if config.report == "auto" else config.report
    if reports and config.devices > 1:
        raise UserError("A report is made by one process: with devices=... set report=false, or leave devices out.")
    samples, place = (_reported if reports else _drawn)(run, system, output, config)
    if ranks.is_first():
        print(f"{len(samples)} samples in {place}: ESS {samples.ess:.2%}, Pareto-k {samples.pareto_k:.2f}")


def _drawn(run: Run, system: System, output: Path, config: DictConfig) -> tuple[WeightedSamples, Path]:
    """The samples, and where they are: draws in ``output``, refined ones beside them."""
    places = [output, refined_folder(output)][: 1 + config.refine]
    for place in places:
        ranks.by_first(claim)(place, SAMPLES, "another output")
    samples = run.sample(
        config.n_samples,
        config.likelihood,
        system=system,
        seed=config.seed,
        batch_size=config.batch_size,
        n_probes=config.n_probes,
        refine=config.refine,
        folder=output,
        format=config.format,
    )
    return samples, places[-1]


def _reported(run: Run, system: System, output: Path, config: DictConfig) -> tuple[WeightedSamples, Path]:
    """The samples, and where they are: in the run folder ``output`` of the molecule alone, which has a report."""
    how = {key: config[key] for key in ("likelihood", "refine", "seed", "batch_size", "device", "format")}
    print(train(start_report(run.folder, run.generator(system), output, n=config.n_samples, **how)), end="\n\n")
    place = output / "samples" / ("refined" if config.refine else "weighted")
    return WeightedSamples.load(place), place
