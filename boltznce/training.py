"""One training loop for every model: flows, energy-based models, spline flows. It knows losses, and no physics.

Killed at any moment and started again with the same arguments, it goes on from its last checkpoint; on a CPU the result
is the same to the bit. A script that gets a signal to stop saves a checkpoint of the very step (`boltznce.signals`).
"""

import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from boltznce import ranks
from boltznce.checkpoint import REMEDY, Checkpoints, load_weights, save_weights
from boltznce.errors import UserError
from boltznce.logger import CSVLog, Logger
from boltznce.records import damaged
from boltznce.settings import require
from boltznce.signals import deferred, stop

if TYPE_CHECKING:  # slow to import
    from lightning_fabric import Fabric

__all__ = ["FitResult", "FitSettings", "Loss", "WeightAverage", "check_fit", "fit", "learning_rate", "step_generator"]

PLATEAU_THRESHOLD = 1e-4  # relative improvement that counts, the default of torch's ReduceLROnPlateau
HOPELESS_STEPS = 100  # so many steps on end without a finite gradient, and training gives up

Loss = Callable[[nn.Module, int, torch.Generator], dict[str, Tensor]]
Validation = Callable[[nn.Module, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class FitSettings:
    """How long and how to train. Validations are every ``validate_every`` steps (0: never) and after the last.

    Raises UserError for numbers that make no sense.
    """

    steps: int
    lr: float = 1e-3
    schedule: str = "cosine"  # constant | cosine (to min_lr at the last step) | plateau (on the validation loss)
    warmup_steps: int = 0  # linear, multiplies any schedule
    min_lr: float = 1e-5
    plateau_factor: float = 0.5
    plateau_patience: int = 20  # validations
    weight_decay: float = 0.0  # Adam if 0, else AdamW
    grad_clip: float | None = 1.0  # largest global norm
    ema_decay: float | None = 0.999
    ema_every: int = 1
    log_every: int = 50
    validate_every: int = 500
    early_stopping_patience: int | None = None  # validations without improvement; the best weights are kept
    checkpoint_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        require(**asdict(self))


@dataclass(frozen=True)
class FitResult:
    """What came of a training. ``validation`` is the loss of the weights that were kept, or None without validation."""

    steps: int
    seconds: float  # wall clock, all sessions together
    skipped_steps: int  # gradient not finite
    validation: float | None
    stopped_early: bool
    weights: Path  # safetensors
    log: Path  # CSV


@dataclass
class _Progress:
    """Everything the loop counts; goes into the checkpoint as it is."""

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    hopeless: int = 0  # steps skipped on end
    validation: float | None = None  # the latest
    best: float = math.inf
    stale: int = 0  # validations since the best
    plateau_best: float = math.inf
    plateau_stale: int = 0
    lr_scale: float = 1.0

    def validated(self, loss: float, settings: FitSettings) -> None:
        self.validation = loss
        self.best, self.stale = (loss, 0) if loss < self.best else (self.best, self.stale + 1)
        if math.isinf(self.plateau_best) or loss < self.plateau_best - PLATEAU_THRESHOLD * abs(self.plateau_best):
            self.plateau_best, self.plateau_stale = loss, 0
        else:
            self.plateau_stale += 1
        if self.plateau_stale > settings.plateau_patience:
            self.lr_scale, self.plateau_stale = self.lr_scale * settings.plateau_factor, 0


@dataclass
class _RunningMeans:
    """Means over the steps since the last report, on the device until :meth:`read`: no step waits for the host."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, values: dict[str, Tensor], valid: Tensor) -> None:
        for key, value in values.items():
            value = torch.where(valid, value.detach().float(), 0.0)
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        for key, count in {"_valid": valid, "_skipped": ~valid}.items():
            self.sums[key] = self.sums.get(key, 0) + count.float()

    def read(self) -> tuple[dict[str, float], int, int]:
        """The means over the valid steps, the number of these, and of the others."""
        values = torch.stack(list(self.sums.values())).tolist()  # the one transfer to the host
        totals = dict(zip(self.sums, values, strict=True))
        self.sums.clear()
        valid, skipped = totals.pop("_valid"), totals.pop("_skipped")
        means = {key: total / valid if valid else math.nan for key, total in totals.items()}
        return means, round(valid), round(skipped)


class WeightAverage:
    """Exponential moving average of a module's parameters, started at their present values; buffers are not averaged.

    The k-th update (k = 0, 1, ...) is a <- d a + (1 - d) p with d = min(decay, (1 + k) / (10 + k)): a short training
    forgets its random start as well as a long one does.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self._parameters = dict(module.named_parameters())
        self.values = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.values.values()), list(self._parameters.values()), 1 - decay)
        self.updates += 1

    def load(self, values: dict[str, Tensor], updates: int) -> None:
        for name, value in self.values.items():
            value.copy_(values[name])
        self.updates = updates

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module holds the averages, copied in place: a deep copy would lose a compiled forward."""
        trained = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        _copy(self._parameters, self.values)
        try:
            yield
        finally:
            _copy(self._parameters, trained)


class _Apply(nn.Module):
    """What Fabric wraps: its forward is *any* function of the module.

    Fabric's precision and gradient synchronization act on ``forward`` alone, while losses call other methods of a model
    (velocity, score, log_prob, ...). Run through here they are all inside a forward, and get the plain module to work
    with.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, function: Callable, *arguments):
        with ranks.sharing():
            return function(self.module, *arguments)


def step_generator(seed: int, name: str, step: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step, a function of (seed, name, step) alone: a resumed run stores no state."""
    digest = hashlib.sha256(f"{seed}/{name}/{step}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))


def learning_rate(settings: FitSettings, step: int, lr_scale: float = 1.0) -> float:
    """The learning rate of ``step`` (counted from 0); ``lr_scale`` is what the plateau schedule has come to."""
    floor = min(settings.min_lr, settings.lr)
    if settings.schedule == "cosine":
        done = max(0, step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
        lr = floor + (settings.lr - floor) * (1 + math.cos(math.pi * done)) / 2
    elif settings.schedule == "plateau":
        lr = max(floor, settings.lr * lr_scale)
    else:
        lr = settings.lr
    return lr * min(1.0, (step + 1) / max(1, settings.warmup_steps))


def fit(
    module: nn.Module,
    loss: Loss,
    settings: FitSettings,
    folder: Path,
    *,
    fabric: "Fabric",
    seed: int,
    name: str,
    validate: Validation | None = None,
    memory: nn.Module | None = None,
    after_checkpoint: Callable[[], None] = lambda: None,
    logger: Logger | None = None,
) -> FitResult:
    """Train ``module`` in place; leave it in eval mode with averaged weights (with early stopping: the best of them).

    loss: called with the module, the number of steps done and that step's generator, on the module's device. Returns
        scalars, of which "loss" is minimized and all are logged. Randomness that does not come from the generator
        (dropout) breaks exact resuming.
    validate: called on the averaged weights with the same random numbers each time; returns scalars, among them "loss".
        Gradients are on, since some losses differentiate in x.
    memory: what ``loss`` keeps from step to step, as buffers that are saved in checkpoints.
    after_checkpoint: called when one has been written.
    fabric: launched. Processes that train together share the rows of each batch where the loss does (`ranks.part`);
        any number of them has the losses and weights of one, within rounding.

    Writes ``<name>.csv`` and ``checkpoints/<name>/`` under ``folder``, at the end ``checkpoints/<name>.safetensors``.
    Where that exists it is loaded and nothing trained. Raises UserError for settings that contradict each other, for a
    damaged checkpoint, and when no step has a finite gradient any more.
    """
    check_fit(settings, name, validate is not None)
    folder = Path(folder)
    finished, log_path = folder / "checkpoints" / f"{name}.safetensors", folder / f"{name}.csv"
    module = fabric.to_device(module)
    ranks.wait()  # what the first process has written is there
    if finished.exists():
        trained, metadata = load_weights(finished)
        _load_state(module, trained, finished)
        module.eval()
        if set(metadata) != {field.name for field in fields(FitResult)} - {"weights", "log"}:
            raise damaged(f"The weights file {finished}", "no training of this run has left it", REMEDY)
        return FitResult(**metadata, weights=finished, log=log_path)

    scaled = getattr(fabric.strategy.precision, "scaler", None) is not None  # 16-mixed: it skips such steps itself
    apply, optimizer = fabric.setup(_Apply(module), _optimizer(module, settings, fused=not scaled))
    average = WeightAverage(module, settings.ema_decay) if settings.ema_decay is not None else None
    means, progress = _RunningMeans(), _Progress()
    best: dict[str, Tensor] | None = None
    checkpoints = Checkpoints(folder / "checkpoints" / name, settings.keep_checkpoints)

    checkpoint = checkpoints.newest()
    if checkpoint:
        weights, state = checkpoint
        _load_state(module, weights["model"], checkpoints.folder)
        optimizer.load_state_dict(state["optimizer"])
        if average:
            average.load(weights["ema"], state["ema_updates"])
        means.sums = {key: value.to(fabric.device) for key, value in state["means"].items()}
        progress, best = _Progress(**state["progress"]), weights.get("best")
        if memory is not None:
            _load_state(memory, weights["memory"], checkpoints.folder)
        fabric.strategy.precision.load_state_dict(state.get("precision", {}))
    ranks.wait()  # all have read it

    stream = f"{name}/0"  # of all processes: they share its batches
    writes = fabric.is_global_zero
    table = CSVLog(log_path, progress.step) if writes else None
    if table is not None and table.last:  # time that a kill undid was spent all the same
        progress.seconds = max(progress.seconds, float(table.last["seconds"]))
    started = time.perf_counter() - progress.seconds

    def stopped_early() -> bool:
        return settings.early_stopping_patience is not None and progress.stale >= settings.early_stopping_patience

    def due(every: int) -> bool:
        return every > 0 and (progress.step == settings.steps or progress.step % every == 0)

    interval = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file wants few lines
    module.train()
    shown = {"desc": name, "unit": "step", "mininterval": interval, "disable": not writes}
    with deferred(), tqdm(total=settings.steps, initial=progress.step, **shown) as bar:
        while progress.step < settings.steps and not stopped_early():
            step = progress.step
            lr = learning_rate(settings, step, progress.lr_scale)
            for group in optimizer.param_groups:
                group["lr"] = lr

            parts = apply(loss, step, step_generator(seed, stream, step, fabric.device))
            optimizer.zero_grad()
            fabric.backward(parts["loss"])
            most = settings.grad_clip or math.inf
            norm: Any = fabric.clip_gradients(apply, optimizer, max_norm=most, error_if_nonfinite=False)
            finite = norm.isfinite()
            if not scaled:
                # A fused Adam reads this flag on the device, as for a gradient scaler; at 1 it leaves weights alone.
                optimizer.optimizer.found_inf = (~finite).float()
            optimizer.step()
            if average and (step + 1) % settings.ema_every == 0:
                average.update()
            means.add(parts | {"grad_norm": norm}, finite)
            progress.step += 1
            bar.update()

            row: dict[str, float] = {}
            if due(settings.log_every):
                means.sums = ranks.average(means.sums)
                values, valid, skipped = means.read()
                progress.skipped += skipped
                progress.hopeless = 0 if valid else progress.hopeless + skipped
                row |= {"skipped": progress.skipped} | {f"train/{key}": value for key, value in values.items()}
                bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)
            if validate and due(settings.validate_every):
                generator = step_generator(seed, name, "validation", fabric.device)
                values = _validation(module, validate, average, fabric, generator)
                progress.validated(values["loss"], settings)
                row |= {f"validation/{key}": value for key, value in values.items()}
                if settings.early_stopping_patience is not None and progress.stale == 0:
                    best = _kept_weights(module, average)
            if row and table is not None:
                progress.seconds = time.perf_counter() - started
                row = {"step": progress.step, "seconds": round(progress.seconds, 2), "lr": lr} | row
                table.append(row)
                if logger:
                    logger.log({f"{name}/{key}": value for key, value in row.items()})
            if progress.hopeless >= min(HOPELESS_STEPS, settings.steps):
                raise UserError(
                    f"Training of '{name}' diverged: the last {progress.hopeless} steps had no finite gradient. "
                    "Lower its learning rate, and look for extreme values in the data."
                )
            stopping = ranks.stop_asked_of_any()
            saving = due(settings.checkpoint_every) or stopping
            if saving:
                means.sums = ranks.average(means.sums)
            if writes and saving:
                progress.seconds = time.perf_counter() - started
                weights = {"model": module.state_dict()}
                state = {"progress": asdict(progress), "optimizer": optimizer.state_dict(), "means": means.sums}
                state["precision"] = fabric.strategy.precision.state_dict()
                if average:
                    weights["ema"], state["ema_updates"] = average.values, average.updates
                if best is not None:
                    weights["best"] = best
                if memory is not None:
                    weights["memory"] = memory.state_dict()
                checkpoints.save(progress.step, weights, state)
                after_checkpoint()
            if stopping:
                stop(stopping)

    _load_state(module, best if best is not None else _kept_weights(module, average), finished)
    module.eval()
    summary: dict[str, Any] = {
        "steps": progress.step,
        "seconds": time.perf_counter() - started,
        "skipped_steps": progress.skipped,
        "validation": progress.best if best is not None else progress.validation,
        "stopped_early": stopped_early(),
    }
    if writes:
        save_weights(finished, module.state_dict(), summary)
    ranks.wait()
    return FitResult(**summary, weights=finished, log=log_path)


def check_fit(settings: FitSettings, name: str, validates: bool) -> None:
    """Raise UserError for settings that need a validation, where there is none."""
    validates = validates and settings.validate_every > 0
    if settings.schedule == "plateau" and not validates:
        raise UserError(f"schedule=plateau of '{name}' needs a validation: set validate_every, or another schedule.")
    if settings.early_stopping_patience is not None and not validates:
        raise UserError(
            f"Early stopping of '{name}' needs a validation: set validate_every, or early_stopping_patience=null."
        )


def _optimizer(module: nn.Module, settings: FitSettings, fused: bool) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if settings.weight_decay:
        return torch.optim.AdamW(parameters, settings.lr, weight_decay=settings.weight_decay, fused=fused)
    return torch.optim.Adam(parameters, settings.lr, fused=fused)


def _validation(
    module: nn.Module, validate: Validation, average: WeightAverage | None, fabric, generator: torch.Generator
) -> dict[str, float]:
    module.eval()
    with average.applied() if average else contextlib.nullcontext(), fabric.autocast(), ranks.sharing():
        values = validate(module, generator)
    module.train()
    return {key: float(value.detach()) for key, value in ranks.average(values).items()}


def _kept_weights(module: nn.Module, average: WeightAverage | None) -> dict[str, Tensor]:
    """A copy of the module's state, with averages for parameters."""
    with average.applied() if average else contextlib.nullcontext():
        return {key: value.detach().clone() for key, value in module.state_dict().items()}


def _load_state(module: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"The weights in {source} are of a network of other sizes: restore their config, or delete them."
        ) from error


@torch.no_grad()
def _copy(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
