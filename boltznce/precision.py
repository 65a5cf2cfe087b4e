"""Tensors of our own kind, whatever a session has set: float32 unless said otherwise, and known to autograd."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["ordinary_tensors"]


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """What is made inside, networks and tables that are kept, is float32 by default and no inference tensor.

    So that ``torch.set_default_dtype(torch.float64)`` and ``torch.inference_mode`` of a user's session change nothing
    here. Also a decorator.

    >>> with torch.inference_mode(), ordinary_tensors():
    ...     torch.zeros(2).is_inference()
    False
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False):
            yield
    finally:
        torch.set_default_dtype(default)
