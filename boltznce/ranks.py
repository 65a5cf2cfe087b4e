"""Processes that share a run, one a device: all of them run the same stages, and the first alone writes.

Where there is one process, which is the usual case, everything here does nothing. Random numbers belong to steps and to
batches, never to processes, so that any number of these gives the results of one: of a training's batch each computes
its rows (`part`, `mean_of_all`), of batches of samples each computes every n-th (`in_turn`). What is not shared is done
by the first process while the others wait (`by_first`, `after_first`).

What they tell each other goes over gloo, on the host: none waits for a device, and none waits in vain for hours of
work that another does alone. Gradients are averaged by Fabric's DDP.
"""

import contextlib
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, distributed

from boltznce.errors import UserError
from boltznce.signals import asked_to_stop, deferred, stop

if TYPE_CHECKING:  # slow to import
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import ClusterEnvironment

__all__ = [
    "after_first",
    "average",
    "by_first",
    "check_world",
    "environment",
    "in_turn",
    "is_first",
    "join",
    "mean_of_all",
    "part",
    "sharing",
    "size",
    "stop_asked_of_any",
    "wait",
]

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = timedelta(days=30)  # of the processes that wait for the first
_group: Any = None  # of all processes, once they have found each other
_sharing = False


def environment() -> "ClusterEnvironment | None":
    """Of processes that are to share a run, of torchrun, of srun or ours, where they exist; None for one alone."""
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= set(os.environ):
        from lightning_fabric.plugins.environments import TorchElasticEnvironment  # slow to import

        return TorchElasticEnvironment()
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        from lightning_fabric.plugins.environments import SLURMEnvironment

        return SLURMEnvironment(auto_requeue=False)
    return None


def check_world(devices: int, num_nodes: int) -> None:
    """Raise UserError where the processes that exist are not those that the settings ask for, or cannot be started."""
    found, wanted = environment(), devices * num_nodes
    if found is not None and found.world_size() != wanted:
        raise UserError(
            f"{found.world_size()} processes were started, and devices={devices} of num_nodes={num_nodes} are "
            f"{wanted}: set devices to the processes of a node and num_nodes to the nodes, or start as many."
        )
    if found is None and num_nodes > 1:
        raise UserError(
            f"num_nodes={num_nodes} needs a process for each device of each node: start them with srun, or with "
            "torchrun -m boltznce on every node (docs/scaling.md), or set num_nodes=1."
        )


def join(fabric: "Fabric") -> "Fabric":
    """Wait for the other processes of the run, if there are to be any; returns the launched ``fabric``."""
    global _group
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    if fabric.world_size > 1 and environment() is None:
        raise RuntimeError(f"One process cannot be {fabric.world_size}: they are started by boltznce.processes.")
    fabric.launch()
    if distributed.is_available() and distributed.is_initialized() and _group is None:
        _group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    return fabric


def size() -> int:
    """How many processes share the run."""
    return 1 if _group is None else distributed.get_world_size()


def is_first() -> bool:
    """Whether this is the process that writes; known before they have found each other, too."""
    if _group is not None:
        return distributed.get_rank() == 0
    found = environment()
    return found is None or found.global_rank() == 0


# ---- what one does for all ------------------------------------------------------------------------------------------


def by_first(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, called by the first process alone; the others wait for its result, which can be pickled."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        return _told_by_first(function(*args, **kwargs) if is_first() else None)

    return called


def after_first(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, called by the first process, and then by the others, which find on disk what it has left."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        if not is_first():
            _told_by_first(None)
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        _told_by_first(None)
        return result

    return called


def wait() -> None:
    """For all processes to come here."""
    if size() > 1:
        with _others_there():
            distributed.barrier(group=_group)


def _told_by_first(value: Any) -> Any:
    if size() == 1:
        return value
    told = [value]
    with _others_there():
        distributed.broadcast_object_list(told, src=0, group=_group)
    return told[0]


# ---- shares of samples ----------------------------------------------------------------------------------------------


def in_turn(compute: Callable[[int], T], first: int = 0) -> Iterator[T]:
    """``compute(k)`` for k = first, first + 1, ... without end, each computed by one process and given to all.

    Results are pickled, so that tensors are to be on the CPU. Asked to stop, all stop after the same result.
    """
    if size() == 1:
        yield from map(compute, itertools.count(first))
        return
    for start in itertools.count(first, size()):
        with deferred():
            mine = asked_to_stop(), compute(start + distributed.get_rank())
            each: list[Any] = [None] * size()
            with _others_there():
                distributed.all_gather_object(each, mine, group=_group)
        for _, result in each:
            yield result
        if number := max(number for number, _ in each):
            stop(number)


# ---- shares of a training's batch -----------------------------------------------------------------------------------


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Inside, `part` gives each process its rows: losses are for `average`, and gradients for DDP."""
    global _sharing
    _sharing = size() > 1
    try:
        yield
    finally:
        _sharing = False


def part(n: int) -> slice:
    """This process's of ``n`` rows of a batch; all, where none are shared, or there are fewer than processes."""
    return slice(distributed.get_rank(), None, size()) if _shares(n) else slice(None)


def mean_of_all(values: Tensor, n: int) -> Tensor:
    """What averaged over processes is the mean of a loss over ``n`` rows, with ``values`` of this process's `part`."""
    return values.sum() * (size() / n) if _shares(n) else values.mean()


def _shares(n: int) -> bool:
    return _sharing and n >= size()


def average(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Averages of scalars over the processes."""
    if size() == 1 or not values:
        return values
    total = torch.stack([value.detach().double().cpu() for value in values.values()])
    with _others_there():
        distributed.all_reduce(total, group=_group)
    return {key: mean.to(values[key]) for key, mean in zip(values, total / size(), strict=True)}


def stop_asked_of_any() -> int:
    """The signal that has asked any of the processes to stop, the same answer for all; 0 for none."""
    if size() == 1:
        return asked_to_stop()
    number = torch.tensor(asked_to_stop())
    with _others_there():
        distributed.all_reduce(number, distributed.ReduceOp.MAX, group=_group)
    return int(number)


@contextlib.contextmanager
def _others_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_first():
            raise SystemExit(1) from None  # the first has said why
        raise RuntimeError("Another process of this run has ended: what it says stands above.") from error
