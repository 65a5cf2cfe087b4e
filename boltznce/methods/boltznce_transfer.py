"""BoltzNCE (arXiv 2507.00846) for many peptides: one flow trained on data, one EBM trained on its draws for the training peptides.

Stages: data -> flow -> samples -> ebm -> evaluation -> report. Each leaves its result in the run's folder, and a killed one goes on.
"""

from boltznce.methods.report_parts import summary
from boltznce.methods.transfer import draw_training_samples, load_models, make_data, train_ebm, train_flow
from boltznce.methods.transfer_report import evaluate, report

__all__ = ["STAGES", "load_models", "summary"]

STAGES = {
    "data": make_data,
    "flow": train_flow,
    "samples": draw_training_samples,
    "ebm": train_ebm,
    "evaluation": evaluate,
    "report": report,
}
