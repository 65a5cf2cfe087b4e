"""Transferable Boltzmann generators (Klein & Noé 2024, arXiv 2406.14426): one flow, weights from its exact likelihood.

Stages: data -> flow -> evaluation -> report.
"""

from dataclasses import asdict

from omegaconf import DictConfig

from boltznce.methods.evaluation import evaluate
from boltznce.methods.models import load_models, solver_settings
from boltznce.methods.preflight import check_evaluation, check_flow, check_training_data
from boltznce.methods.report import make_report, summary
from boltznce.methods.sections import COMMON, slowest_coordinates
from boltznce.methods.stages import make_data, train_flow
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System

__all__ = ["STAGES", "check", "flow_settings", "load_models", "network_in_words", "report", "summary"]

SECTIONS = (*COMMON, slowest_coordinates)


def check(config: DictConfig, system: System) -> None:
    """Raise UserError for what can be known to fail (see `preflight`)."""
    check_training_data(config, system)
    check_flow(config, system)
    check_evaluation(config, system)


def report(work: Workspace) -> dict:
    """The common report."""
    return make_report(work, SECTIONS, flow_settings(work))


def flow_settings(work: Workspace) -> dict[str, str]:
    """Those of the flow, in words."""
    section, model, trained = work.config.flow, work.config.flow.model, work.trained_on
    coupling = model.coupling if isinstance(model.coupling, str) else model.coupling._target_.rpartition(".")[2]
    validated = [] if work.parent else [member.name for member in work.system.members("validation")]
    names = {"trained on": trained, "validated on": [name for name in validated if name not in trained]}
    return {key: " ".join(part) for key, part in names.items() if part} | {
        "flow network": network_in_words(work, "flow"),
        "flow": f"{model.interpolant} interpolant, {coupling} coupling, scales of {section.scales}",
        "solver": ", ".join(f"{key} {value}" for key, value in asdict(solver_settings(section.solver)).items()),
    }


def network_in_words(work: Workspace, name: str) -> str:
    """Class, where its weights come from, steps and batch size."""
    section, steps = work.config[name], work.steps(name)
    parts = [
        section.network._target_.rpartition(".")[2],
        *([f"weights of {work.parent['run']}"] if work.parent else []),
    ]
    return ", ".join([*parts, *([f"{steps} steps of {section.batch_size}"] if steps or not work.parent else [])])


STAGES = {"data": make_data, "flow": train_flow, "evaluation": evaluate, "report": report}
