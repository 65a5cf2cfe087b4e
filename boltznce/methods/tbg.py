"""Transferable Boltzmann generators (Klein & Noé 2024, arXiv 2406.14426): one flow for many peptides, weights from its exact likelihood.

Stages: data -> flow -> evaluation -> report. Each leaves its result in the run's folder, and a killed one goes on.
"""

from boltznce.methods.report_parts import summary
from boltznce.methods.transfer import load_models, make_data, train_flow
from boltznce.methods.transfer_report import evaluate, report

__all__ = ["STAGES", "load_models", "summary"]

STAGES = {"data": make_data, "flow": train_flow, "evaluation": evaluate, "report": report}
