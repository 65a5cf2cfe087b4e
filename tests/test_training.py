"""The fit loop: exact resuming, averages, schedules, clipping, skipped steps, early stopping, damage."""

import csv
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from boltznce.checkpoint import Checkpoints, load_weights, save_weights
from boltznce.errors import UserError
from boltznce.logger import CSVLog, open_logger
from boltznce.training import FitSettings, WeightAverage, fit, learning_rate, step_generator

RESUMED = dict(
    steps=60,
    lr=0.03,
    warmup_steps=5,
    plateau_patience=0,
    ema_every=3,
    log_every=4,
    validate_every=6,
    checkpoint_every=10,
)


class Line(nn.Module):
    """Least squares y = a x + b, hard to save: a tied parameter, a buffer that is a view, a counter."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.5]))
        self.b = nn.Parameter(torch.tensor([-1.0]))
        self.tied = self.a
        self.register_buffer("view", torch.arange(6.0).reshape(2, 3).T)
        self.register_buffer("calls", torch.tensor(0))

    def loss(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        error = self.a * x + self.b - (2 * x + 1)
        return {"loss": error.square().mean(), "largest": error.abs().max()}


def noisy_loss(module: Line, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return module.loss(torch.randn(16, generator=generator))


def noisy_validation(module: Line, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"loss": noisy_loss(module, 0, generator)["loss"]}


def train(folder: Path, loss=noisy_loss, validate=noisy_validation, name: str = "line", **settings):
    module = Line()
    result = fit(
        module,
        loss,
        FitSettings(**settings),
        folder,
        fabric=Fabric(accelerator="cpu"),
        seed=3,
        name=name,
        validate=validate,
    )
    return module, result


def rising(module: Line, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A validation that only gets worse (a goes from 0.5 to 2), so that a plateau is always at hand."""
    return {"loss": noisy_validation(module, generator)["loss"] + 100 * module.a.sum()}


def train_and_die(folder: str, schedule: str, step: int) -> None:
    def loss(module, k, generator):
        if k == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return noisy_loss(module, k, generator)

    train(Path(folder), loss, rising, schedule=schedule, **RESUMED)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path) as handle:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(handle)]


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_killed_and_resumed_training_is_the_uninterrupted_one_to_the_bit(tmp_path, schedule):
    whole, expected = train(tmp_path / "whole", validate=rising, schedule=schedule, **RESUMED)

    command = f"import test_training; test_training.train_and_die({str(tmp_path / 'killed')!r}, {schedule!r}, 37)"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    dead = subprocess.run(
        [sys.executable, "-c", command], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert rows(tmp_path / "killed" / "line.csv")[-1]["step"] == "36"  # six steps past the checkpoint
    assert [file.name for file in sorted((tmp_path / "killed/checkpoints/line").iterdir())] == [
        "step_0000020",
        "step_0000030",
    ]

    resumed_steps = []

    def loss(module, step, generator):
        resumed_steps.append(step)
        return noisy_loss(module, step, generator)

    resumed, result = train(tmp_path / "killed", loss, rising, schedule=schedule, **RESUMED)
    assert resumed_steps == list(range(30, 60))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert rows(result.log) == rows(expected.log)
    assert result.validation == expected.validation
    rates = [float(row["lr"]) for row in rows(result.log)]
    assert len(set(rates)) > 3  # the schedule was at work


def test_finished_training_returns_at_once(tmp_path):
    trained, first = train(tmp_path, steps=20)

    def never(*_):
        raise AssertionError("trained again")

    loaded, second = train(tmp_path, never, steps=20)
    assert second == first
    assert torch.equal(trained.a, loaded.a)
    assert not loaded.training


def test_training_finds_the_line(tmp_path):
    module, result = train(tmp_path, steps=600, lr=0.05)
    assert module.a.item() == pytest.approx(2, abs=1e-3)
    assert module.b.item() == pytest.approx(1, abs=1e-3)
    assert result.validation < 1e-5
    assert result.skipped_steps == 0
    assert result.steps == 600
    assert not result.stopped_early


def test_average_is_the_closed_form():
    module, decay = nn.Linear(1, 1, bias=False), 0.9
    values = [float(k) ** 2 for k in range(1, 201)]
    nn.init.zeros_(module.weight)
    average = WeightAverage(module, decay)
    for value in values:
        nn.init.constant_(module.weight, value)
        average.update()
    decays = [min(decay, (1 + k) / (10 + k)) for k in range(len(values))]
    expected = sum((1 - decays[k]) * values[k] * math.prod(decays[k + 1 :]) for k in range(len(values)))
    assert average.values["weight"].item() == pytest.approx(expected, rel=1e-5)

    with average.applied():
        assert module.weight.item() == pytest.approx(expected, rel=1e-5)
    assert module.weight.item() == values[-1]


def test_final_weights_and_validation_are_the_averages(tmp_path):
    last, _ = train(tmp_path / "last", steps=10, schedule="constant", lr=0.05, ema_decay=None)
    averaged, result = train(tmp_path / "averaged", steps=10, schedule="constant", lr=0.05)
    assert averaged.a.item() < last.a.item()  # lags behind on the way from 0.5 to 2
    assert result.validation == pytest.approx(
        noisy_validation(averaged, step_generator(3, "line", "validation"))["loss"].item(), rel=1e-6
    )


@pytest.mark.parametrize(("grad_clip", "expected"), [(0.5, 0.5), (None, 100.0)])
def test_gradients_are_clipped_by_their_global_norm(tmp_path, monkeypatch, grad_clip, expected):
    norms = []
    step = torch.optim.Adam.step

    def spy(self, *args, **kwargs):
        norms.append(torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    _, result = train(
        tmp_path,
        lambda m, k, g: {"loss": 60 * m.a.sum() + 80 * m.b.sum()},
        None,
        steps=3,
        grad_clip=grad_clip,
        log_every=1,
    )
    assert norms == pytest.approx([expected] * 3, rel=1e-4)
    assert float(rows(result.log)[0]["train/grad_norm"]) == pytest.approx(100)  # logged before it is clipped


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_step_without_finite_gradient_changes_nothing(tmp_path, bad):
    seen = []

    def loss(module, step, generator):
        seen.append((module.a.item(), module.b.item()))
        parts = noisy_loss(module, step, generator)
        return {key: value * (bad if step == 3 else 1.0) for key, value in parts.items()}

    module, result = train(tmp_path, loss, None, steps=8, log_every=8, ema_decay=None)
    assert seen[4] == seen[3]
    assert len(set(seen)) == 7
    assert result.skipped_steps == 1
    assert math.isfinite(module.a.item())
    row = rows(result.log)[-1]
    assert row["skipped"] == "1"
    assert math.isfinite(float(row["train/loss"]))  # the mean is over the other seven


def test_hopeless_training_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="diverged"):
        train(tmp_path, lambda m, k, g: {"loss": m.a.sum() * math.nan}, None, steps=1000, log_every=10)
    assert not (tmp_path / "checkpoints/line.safetensors").exists()


def test_early_stopping_keeps_the_best(tmp_path):
    history = []

    def validate(module, generator):  # best where a = 1, on the way from 0.5 to 2
        history.append((abs(module.a.item() - 1), module.a.item()))
        return {"loss": (module.a - 1).abs().sum()}

    settings = dict(steps=5000, lr=0.01, schedule="constant", validate_every=5, early_stopping_patience=4)
    module, result = train(tmp_path, validate=validate, **settings)
    best, weight = min(history)
    assert result.stopped_early
    assert result.steps < 5000
    assert len(history) == history.index((best, weight)) + 1 + 4
    assert module.a.item() == weight
    assert result.validation == pytest.approx(best)


def test_plateau_lowers_the_learning_rate(tmp_path):
    settings = dict(
        steps=60, schedule="plateau", lr=0.01, min_lr=0.002, plateau_patience=2, validate_every=5, log_every=5
    )
    _, result = train(tmp_path, validate=lambda m, g: {"loss": torch.ones(())}, **settings)
    rates = [float(row["lr"]) for row in rows(result.log)]
    # the first validation is the best; after three more the rate is halved, and so on down to min_lr
    assert rates == pytest.approx([0.01] * 4 + [0.005] * 3 + [0.0025] * 3 + [0.002] * 2)


def test_plateau_is_that_of_torch():
    from boltznce.training import _Progress

    settings = FitSettings(steps=1, schedule="plateau", plateau_patience=3, min_lr=0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1e-3)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3)
    ours, losses = _Progress(), 1 + torch.rand(200, generator=torch.Generator().manual_seed(0)) / 10
    for loss in losses.tolist():
        theirs.step(loss)
        ours.validated(loss, settings)
        assert learning_rate(settings, 0, ours.lr_scale) == pytest.approx(optimizer.param_groups[0]["lr"], abs=2e-8)


def test_cosine_schedule_with_warmup():
    settings = FitSettings(steps=110, lr=1.0, min_lr=0.2, warmup_steps=10)
    assert learning_rate(settings, 0) == pytest.approx(0.1)
    assert learning_rate(settings, 10) == pytest.approx(1.0)
    assert learning_rate(settings, 60) == pytest.approx(0.6)
    assert learning_rate(settings, 110) == pytest.approx(0.2)
    assert learning_rate(FitSettings(steps=10, lr=1e-6), 10) == 1e-6  # never above lr


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
@pytest.mark.parametrize("part", ["model.safetensors", "state.pt"])
def test_damaged_checkpoint_is_named_and_the_one_before_resumes(tmp_path, damage, part):
    def stop(module, step, generator):
        if step == 25:
            raise KeyboardInterrupt
        return noisy_loss(module, step, generator)

    whole, _ = train(tmp_path / "whole", steps=30, checkpoint_every=10)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop, steps=30, checkpoint_every=10)
    newest = tmp_path / "checkpoints/line/step_0000020"
    data = (newest / part).read_bytes()
    if damage == "missing":
        (newest / part).unlink()
    else:
        (newest / part).write_bytes(
            data[: len(data) // 2] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1])
        )
    with pytest.raises(UserError, match=r"step_0000020 is damaged.*step_0000010"):
        train(tmp_path, steps=30, checkpoint_every=10)
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    resumed, _ = train(tmp_path, steps=30, checkpoint_every=10)
    assert torch.equal(whole.a, resumed.a)


def test_damaged_or_foreign_final_weights(tmp_path):
    _, result = train(tmp_path, steps=5)
    with pytest.raises(UserError, match="other sizes"):
        fit(
            nn.Linear(2, 2),
            noisy_loss,
            FitSettings(steps=5),
            tmp_path,
            fabric=Fabric(accelerator="cpu"),
            seed=0,
            name="line",
        )
    result.weights.write_bytes(result.weights.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"line\.safetensors is damaged"):
        train(tmp_path, steps=5)
    with pytest.raises(UserError, match="no weights"):
        load_weights(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "sine"}, "constant, cosine, plateau"),
        ({"steps": 0}, "steps=0 must be a whole number, 1 or more"),
        ({"schedule": "plateau", "validate_every": 0}, "validate_every"),
        ({"early_stopping_patience": 3, "validate_every": 0}, "early_stopping_patience"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path, **({"steps": 5} | settings))
    assert not list(tmp_path.iterdir())


def test_losses_and_validations_run_in_the_precision_of_fabric(tmp_path):
    seen = []

    def loss(module, *_):
        seen.append(torch.is_autocast_enabled("cpu"))
        return module.loss(torch.ones(4))

    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    fit(Line(), loss, FitSettings(steps=2), tmp_path, fabric=fabric, seed=0, name="line", validate=loss)
    assert seen == [True] * 3


def test_weights_come_back_with_their_metadata(tmp_path):
    tensors = Line().state_dict()
    save_weights(tmp_path / "w.safetensors", tensors, {"epochs": 3, "names": ["a"]})
    loaded, metadata = load_weights(tmp_path / "w.safetensors")
    assert metadata == {"epochs": 3, "names": ["a"]}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) and loaded[key].dtype == tensors[key].dtype for key in tensors)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest() is None
    (tmp_path / ".step_0000007.123.tmp").mkdir()  # as a kill while writing leaves it
    for step in (9_999_998, 9_999_999, 10_000_000):
        checkpoints.save(step, {"model": {"w": torch.full((1,), float(step))}}, {"step": step})
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["step_10000000", "step_9999999"]
    weights, state = checkpoints.newest()
    assert state == {"step": 10_000_000}
    assert weights["model"]["w"].item() == 10_000_000


def test_csv_log_widens_and_forgets(tmp_path):
    log = CSVLog(tmp_path / "log.csv")
    log.append({"step": 1, "loss": 0.5})
    log.append({"step": 2, "loss": 0.25, "validation": 1.5})
    log.append({"step": 3, "loss": 0.125})
    with open(tmp_path / "log.csv", "a") as handle:
        handle.write("1")  # the beginning of a row of step 12, cut by a kill
    CSVLog(tmp_path / "log.csv", step=2)
    assert (tmp_path / "log.csv").read_text().splitlines() == ["step,loss,validation", "1,0.5,", "2,0.25,1.5"]


def test_step_generators_differ_by_seed_name_and_step_alone():
    def draw(*key):
        return torch.rand(1, generator=step_generator(*key)).item()

    keys = [(0, "flow", 0), (1, "flow", 0), (0, "ebm", 0), (0, "flow", 1)]
    assert len({draw(*key) for key in keys}) == 4
    assert draw(*keys[0]) == draw(*keys[0])


def test_loggers(tmp_path, monkeypatch):
    assert open_logger(tmp_path, None, "csv") is None
    with pytest.raises(UserError, match="csv, wandb or tensorboard"):
        open_logger(tmp_path, None, "mlflow")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    with pytest.raises(UserError, match="wandb login"):
        open_logger(tmp_path, None, "wandb", mode="online")
