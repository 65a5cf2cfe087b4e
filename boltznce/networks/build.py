"""From a config of a network to a network for a given system: `boltznce.config.build`; goes with its last caller."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from boltznce.config import build

__all__ = ["build_network"]


def build_network(settings: Mapping[str, Any], **offered: Any) -> nn.Module:
    return build(settings, nn.Module, offered)
