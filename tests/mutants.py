"""Makes deliberate bugs of wiring, one by one in a copy of the tree, and tells which of them the tests catch.

``python tests/mutants.py`` (twenty minutes on one core), or ``python tests/mutants.py 8 9`` for some of the numbers. A
bug that cannot be made, since its line has changed, is told as such: write it anew.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TESTS = ("tests/test_known_answers.py", "tests/test_refinement.py", "tests/test_sections.py")


class Mutant(NamedTuple):
    """A bug: (file, text, what it becomes) of every change, and which tests of `TESTS` are run."""

    number: int
    what: str
    edits: tuple[tuple[str, str, str], ...]
    tests: str


def mutant(number: int, what: str, file: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(number, what, ((f"boltznce/{file}", old, new),), tests)


STAGES, MODELS, EVALUATION = "methods/stages.py", "methods/models.py", "methods/evaluation.py"
REFINEMENT = "methods/refinement.py"
FINDINGS, SECTIONS, TABG = "methods/findings.py", "methods/sections.py", "methods/tabg.py"
TORSION_STATES = "methods/torsion_states.py"
FREE_ENERGY, SIMULATE, ISOMERS = "analysis/free_energy.py", "data/simulate.py", "systems/isomers.py"
REPORT = "report or free_energies or disk"

MUTANTS = (
    mutant(
        1, "log 2 of mirror images missing in draws", MODELS, "self._folded(drawn[1][kept])", "drawn[1][kept]", "kept"
    ),
    mutant(
        2,
        "log 2 missing in exact likelihoods",
        MODELS,
        "return self._folded(self.flow.log_prob(positions.to(self.device), **options))",
        "return self.flow.log_prob(positions.to(self.device), **options)",
        "kept",
    ),
    mutant(
        2,
        "log 2 missing in both, by a real network",
        MODELS,
        "math.log(2) if self.mirrors",
        "0 if self.mirrors",
        "network",
    ),
    mutant(2, "log 2 where the flow makes no mirror images", MODELS, " and self.flow.parity_equivariant", "", "kept"),
    mutant(
        3,
        "weights of umbrella windows without the cut",
        SIMULATE,
        "ring = ring_of(jobs[0].options, jobs[0].temperature, angle)",
        "ring = dataclasses.replace(ring_of(jobs[0].options, jobs[0].temperature, angle), cut=None)",
        "umbrella",
    ),
    mutant(
        3,
        "ΔF of umbrella windows without the cut",
        "data/reference.py",
        'ring = ring_of(settings["options"], settings["temperature"], angle)',
        'ring = dataclasses.replace(ring_of(settings["options"], settings["temperature"], angle), cut=None)',
        "umbrella",
    ),
    mutant(
        4,
        "annealing weighted to the hot temperature",
        TABG,
        "at_temperature(cold)",
        "at_temperature(hot)",
        "temperatures",
    ),
    mutant(
        5,
        "the hot stage at the cold temperature",
        TABG,
        "work.system.cheap.at_temperature(section.temperature)",
        "work.system",
        "temperatures",
    ),
    mutant(
        5,
        "flows of the ladder weighted to the system's temperature",
        "methods/spline_models.py",
        "member.at_temperature(temperature)",
        "member",
        "report_of_a_ladder",
    ),
    mutant(6, "EBM validated on its training draws", STAGES, '{"seen": validation}', '{"seen": train}', "ebm"),
    mutant(
        6,
        "EBM trained and validated on one folder",
        STAGES,
        "_draws(work.samples(name, member), work.device)",
        '_draws(work.samples("train", member), work.device)',
        "ebm",
    ),
    mutant(6, "flow validated on its training frames", STAGES, '{"seen": held_out}', '{"seen": train}', "flow"),
    mutant(
        7,
        "evaluation by the stream of the training draws",
        EVALUATION,
        'work.generator("evaluation", member, k)',
        'work.generator("samples train", member, k)',
        "three_sets",
    ),
    Mutant(
        7,
        "evaluation on the folder of the training draws",
        (
            (f"boltznce/{EVALUATION}", 'work.samples("weighted", member)', 'work.samples("train", member)'),
            (f"boltznce/{FINDINGS}", 'work.samples("weighted", member)', 'work.samples("train", member)'),
        ),
        "three_sets or report",
    ),
    mutant(
        7,
        "draws to validate with by the stream of the training draws",
        STAGES,
        'work.generator(f"samples {name}", member, k)',
        'work.generator("samples train", member, k)',
        "three_sets",
    ),
    mutant(
        7,
        "report on frames that the flow was trained on",
        "methods/workspace.py",
        "frames.split(**self.config.data.split)[2]",
        "frames.split(**self.config.data.split)[0]",
        REPORT,
    ),
    mutant(
        7,
        "one stream for all members",
        STAGES,
        'work.generator(f"samples {name}", member, k)',
        'work.generator(f"samples {name}", None, k)',
        "members",
    ),
    mutant(
        8,
        "exact likelihoods of all samples, not of the allowed",
        EVALUATION,
        '"exact_uniform", conformers, subset)',
        '"exact_uniform", samples, subset)',
        "exact_likelihoods or report",
    ),
    mutant(
        8,
        "exact likelihoods in the order of the numbers",
        FINDINGS,
        "np.searchsorted(np.unique(index), index)",
        "np.searchsorted(np.unique(index), np.sort(index))",
        REPORT,
    ),
    mutant(
        8,
        "EBM's likelihoods of other samples in the comparison",
        SECTIONS,
        "f.samples.log_prob[f.exact.index]",
        "f.drawn.log_prob[f.exact.index]",
        REPORT,
    ),
    mutant(
        8,
        "EBM's likelihoods of other samples in the correction",
        SECTIONS,
        "f.samples.log_prob[index]",
        "f.drawn.log_prob[index]",
        REPORT,
    ),
    mutant(
        9,
        "cis conformers not recognized",
        "systems/isomers.py",
        "if system.omegas:",
        "if False:",
        "never_visit or report",
    ),
    mutant(
        9,
        "cis conformers given exact likelihoods",
        EVALUATION,
        "samples[allowed_conformers(excluded, len(samples))]",
        "samples",
        "exact_likelihoods or report",
    ),
    mutant(
        9,
        "cis conformers kept in the report",
        FINDINGS,
        "samples = drawn[allowed_conformers(excluded, len(drawn))]",
        "samples = drawn",
        REPORT,
    ),
    mutant(
        9,
        "cis conformers kept in the data",
        FINDINGS,
        "frames.take(allowed_conformers(excluded, len(frames)))",
        "frames",
        REPORT,
    ),
    mutant(
        10,
        "sign of the regression's constant",
        "ebm.py",
        "difference - _centre(difference.detach(), huber)",
        "difference + _centre(difference.detach(), huber)",
        "constant",
    ),
    mutant(
        10,
        "regression without a constant",
        "ebm.py",
        "difference - _centre(difference.detach(), huber)",
        "difference",
        "constant",
    ),
    mutant(
        11,
        "noise of the EBM weights left out of the interval",
        FREE_ENERGY,
        "sum(of_draws) + sum(of_weights)",
        "sum(of_draws)",
        "interval or free_energies",
    ),
    mutant(
        11,
        "noise of the likelihoods left out of the interval",
        FREE_ENERGY,
        "sum(of_draws) + sum(of_weights)",
        "sum(of_weights)",
        "interval",
    ),
    mutant(
        11,
        "the EBM's row judged by no exact likelihoods",
        TORSION_STATES,
        "rows[name] = judged_by_exact(ebm, exact)",
        "pass",
        REPORT,
    ),
    mutant(12, "buffer not clipped", "annealing.py", "return clipped, record", "return drawn, record", "clipped"),
    mutant(12, "annealing's share to clip not handed on", TABG, "clip=section.clip", "clip=0.0", "clipped"),
    mutant(
        13,
        "methyls not turned in training",
        STAGES,
        "_symmetrized(x, member, generator), *rest",
        "x, *rest",
        "turned_methyls",
    ),
    mutant(
        13,
        "methyls not turned in calibration",
        STAGES,
        '_symmetrized(x[:CALIBRATION], member, work.generator(f"{name} calibration", member))',
        "x[:CALIBRATION]",
        "turned_methyls",
    ),
    mutant(
        13,
        "turned methyls' likelihoods of other draws",
        STAGES,
        "(part[index] for part",
        "(part[: len(x)] for part",
        "ebm",
    ),
    mutant(
        14,
        "frames not balanced",
        STAGES,
        "index = mode_balanced_indices(values, frames.log_weights, n, rng, member.state, **section.balance)",
        "index = boltzmann_indices(frames.log_weights, n, rng)",
        "balanced",
    ),
    mutant(
        15,
        "speed-up upside down",
        SECTIONS,
        '"speed_up": md_seconds / spent',
        '"speed_up": spent / md_seconds',
        REPORT,
    ),
    mutant(
        16,
        "refined walkers corrected by likelihoods of where they are",
        EVALUATION,
        '"exact_weights", conformers[refined.ancestors], subset)',
        '"exact_weights", refined, subset)',
        "refin or ancestors",
    ),
    mutant(
        16,
        "refined walkers corrected by the EBM of other draws",
        SECTIONS,
        "f.samples.log_prob[f.refined.ancestors[index]]",
        "f.samples.log_prob[index]",
        "refin or ancestors",
    ),
    mutant(
        16,
        "ancestors numbered among the own isomers",
        REFINEMENT,
        "start[annealed.ancestors],",
        "annealed.ancestors,",
        "refin or ancestors or isomers",
    ),
    mutant(
        16,
        "other isomers refined too",
        "methods/legs.py",
        "np.where(own_isomers(system, annealed.positions), annealed.log_weights, -np.inf)",
        "annealed.log_weights",
        "refin or isomers",
    ),
    mutant(
        16,
        "refined ΔF without ancestors",
        "smc/lineage.py",
        "walkers = ancestors if units is None else units",
        "walkers = np.arange(len(ancestors)) if units is None else units",
        "refin or ancestors",
    ),
    mutant(
        16,
        "one likelihood a walker, not an ancestor",
        EVALUATION,
        "return kin.first[kin.of[subset]]",
        "return subset",
        "refin or ancestors",
    ),
    mutant(
        16,
        "refined from a clash of units",
        "methods/legs.py",
        "GAS_CONSTANT * system.temperature",
        "1.0",
        "refin or molecule",
    ),
    mutant(
        17,
        "walkers of one ancestor counted for independent frames",
        FINDINGS,
        "walkers.log_weights, walkers.ancestors)",
        "walkers.log_weights, np.arange(len(walkers)))",
        "two_sided or other_side",
    ),
    mutant(
        17,
        "data for the other side where walkers are asked for",
        EVALUATION,
        'if section.frames == "data":',
        "if True:",
        "two_sided or other_side",
    ),
)


def verdict(tree: Path, bug: Mutant) -> tuple[str, str]:
    """What the tests say of a bug in a copy of the tree, which is as it was afterwards; and the test that failed."""
    before = {file: (tree / file).read_text() for file, _, _ in bug.edits}
    if any(before[file].count(old) != 1 for file, old, _ in bug.edits):
        return "CANNOT BE MADE", ""
    for file, old, new in bug.edits:
        (tree / file).write_text(before[file].replace(old, new))
    try:
        result = run_tests(tree, bug.tests)
    finally:
        for file, text in before.items():
            (tree / file).write_text(text)
    failed = re.search(r"^(?:FAILED|ERROR) \S+::(\w+)", result.stdout, re.MULTILINE)
    said = {0: "SURVIVED", 1: "caught"}.get(result.returncode, "NO TEST RAN")
    return said, failed[1] if failed else ""


def run_tests(tree: Path, selection: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", *TESTS, "-k", selection]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def main(*numbers: str) -> int:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in files.splitlines():
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, tree / name)
        if run_tests(tree, "").returncode:
            print(f"{' or '.join(TESTS)} fails without any bug: mend that first.")
            return 1
        missed = 0
        for bug in MUTANTS:
            if not numbers or str(bug.number) in numbers:
                said, by = verdict(tree, bug)
                missed += said != "caught"
                print(f"{bug.number:2d}  {said:14s}  {bug.what:62s}  {by}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
