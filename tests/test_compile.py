"""compile=true gives the same numbers, and falls back where it cannot work."""

import pytest
import torch

from boltznce.errors import UserError
from boltznce.networks.compile import compile_forward
from boltznce.networks.mlp import MLPVectorField


@pytest.mark.slow
def test_compiled_network_equals_the_eager_one():
    torch.manual_seed(0)
    network = MLPVectorField(2, 2, 16, 2)
    x, t = torch.randn(8, 2, 2), torch.rand(8)
    expected = network(x, t)
    compile_forward(network, True)
    torch.testing.assert_close(network(x, t), expected)
    torch.testing.assert_close(network(x[:3], t[:3]), expected[:3])
    _, jv = torch.func.jvp(lambda y: network(y, t), (x,), (torch.ones_like(x),))
    assert jv.isfinite().all()


def test_failing_compiler_falls_back_with_one_warning(monkeypatch, caplog):
    def broken(function, dynamic):
        def call(*args):
            raise RuntimeError("no backend")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    network = MLPVectorField(2, 2, 16, 2)
    x, t = torch.randn(8, 2, 2), torch.rand(8)
    expected = network(x, t)
    compile_forward(network, "true")
    torch.testing.assert_close(network(x, t), expected)
    network(x, t)
    assert sum("torch.compile" in record.message for record in caplog.records) == 1


def test_unknown_mode():
    with pytest.raises(UserError, match="auto"):
        compile_forward(MLPVectorField(), "maybe")
