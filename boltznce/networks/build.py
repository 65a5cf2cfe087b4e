"""From a config of a network to a network for a given system."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["build_network"]


def build_network(settings: Mapping[str, Any], **offered: Any) -> nn.Module:
    """Call ``_target_`` with its settings and with those of ``offered`` (n_atoms, dim, n_features, bonds) that it asks for."""
    settings = dict(settings)
    module, _, name = settings.pop("_target_").rpartition(".")
    factory = getattr(importlib.import_module(module), name)
    wanted = inspect.signature(factory).parameters
    return factory(**{key: value for key, value in offered.items() if key in wanted} | settings)
