"""BoltzNCE (arXiv 2507.00846): a flow, an EBM trained on the flow's draws, weights from its likelihood.

Stages: data -> flow -> samples -> ebm -> evaluation -> report; for one molecule or many.
"""

from omegaconf import DictConfig

from boltznce.methods import tbg
from boltznce.methods.evaluation import evaluate
from boltznce.methods.models import load_models
from boltznce.methods.preflight import check_ebm
from boltznce.methods.report import make_report, summary
from boltznce.methods.stages import draw_training_samples, make_data, train_ebm, train_flow
from boltznce.methods.tbg import SECTIONS, flow_settings, network_in_words
from boltznce.methods.workspace import Workspace
from boltznce.systems.base import System

__all__ = ["STAGES", "check", "load_models", "report", "summary"]


def check(config: DictConfig, system: System) -> None:
    """Raise UserError for what can be known to fail (see `preflight`)."""
    tbg.check(config, system)
    check_ebm(config, system)


def report(work: Workspace) -> dict:
    """The common report."""
    return make_report(work, SECTIONS, flow_settings(work) | ebm_settings(work))


def ebm_settings(work: Workspace) -> dict[str, str]:
    """Those of the EBM, in words."""
    section, samples = work.config.ebm, work.config.samples
    objective = section.model.objective
    if section.regression_weight:
        objective += f" + {section.regression_weight:g} × regression onto {samples.likelihood} likelihoods"
    return {
        "EBM network": network_in_words(work, "ebm"),
        "EBM objective": objective,
        "samples the EBM was trained on": f"{samples.n_train} of each molecule",
    }


STAGES = {
    "data": make_data,
    "flow": train_flow,
    "samples": draw_training_samples,
    "ebm": train_ebm,
    "evaluation": evaluate,
    "report": report,
}
