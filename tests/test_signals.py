"""Signals to stop: a script keeps what is done; a notebook is left alone."""

import os
import signal

import pytest
import test_training
import torch

from boltznce.signals import Stopped, asked_to_stop, deferred, listening, stop_if_asked

SETTINGS = {"steps": 20, "lr": 1e-2, "log_every": 4, "validate_every": 6, "checkpoint_every": 0}
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_training_stops_at_the_next_step_and_goes_on_to_the_same_weights(tmp_path, number):
    def stopped(module, step, generator):
        if step == 7:
            os.kill(os.getpid(), number)
        return test_training.noisy_loss(module, step, generator)

    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stop, listening():
        test_training.train(tmp_path / "stopped", stopped, **SETTINGS)
    assert stop.value.number == number
    assert signal.getsignal(number) is before
    assert [path.name for path in (tmp_path / "stopped/checkpoints/line").iterdir()] == ["step_0000008"]
    again, _ = test_training.train(tmp_path / "stopped", **SETTINGS)
    whole, _ = test_training.train(tmp_path / "whole", **SETTINGS)
    assert torch.equal(again.a, whole.a)
    assert test_training.rows(tmp_path / "stopped/line.csv") == test_training.rows(tmp_path / "whole/line.csv")


def test_elsewhere_a_signal_interrupts_at_once_and_one_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(Stopped, match="SIGINT"):
            stop_in_the_middle()
        stop_if_asked()  # of an earlier script in this process nothing is left
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_in_the_middle():
    with listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert not asked_to_stop()
        with deferred():
            os.kill(os.getpid(), signal.SIGINT)
            assert asked_to_stop()
        stop_if_asked()


def test_in_a_notebook_ctrl_c_is_a_keyboard_interrupt():
    with pytest.raises(KeyboardInterrupt) as error:
        os.kill(os.getpid(), signal.SIGINT)
    assert error.type is KeyboardInterrupt
