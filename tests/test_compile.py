"""compile=true gives the same numbers, and falls back where it cannot work."""

import pytest
import torch

from boltznce.errors import UserError
from boltznce.flows import spline
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


def spline_with_gradients(shape, inverse, fused):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator).requires_grad_()
    tables = [torch.randn(k, *shape, generator=generator).requires_grad_() for k in (8, 8, 9)]
    y, log_slope = spline.rational_quadratic(x, *tables, inverse, fused)
    return y, log_slope, *torch.autograd.grad(y.sin().sum() + log_slope.sum(), (x, *tables))


@pytest.mark.slow
@pytest.mark.parametrize("inverse", [False, True])
def test_fused_splines_equal_the_eager_ones(inverse):
    for shape in ((3, 700), (5, 64)):  # one kernel for all
        for fused, eager in zip(
            *(spline_with_gradients(shape, inverse, fused) for fused in (True, False)), strict=True
        ):
            torch.testing.assert_close(fused, eager, rtol=1e-3, atol=1e-4)


def test_splines_fall_back_with_one_warning(monkeypatch, caplog):
    def broken(function, dynamic):
        def call(*args):
            raise RuntimeError("no backend")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    spline._compiled.cache_clear()
    fused, eager = (spline_with_gradients((2, 5), False, fused) for fused in (True, False))
    spline._compiled.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(fused, eager, strict=True))
    assert sum("torch.compile" in record.message for record in caplog.records) == 2  # forward and backward


def test_unknown_mode():
    with pytest.raises(UserError, match="auto"):
        compile_forward(MLPVectorField(), "maybe")
