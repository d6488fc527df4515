"""Normalisers map data to a common range and back, and travel in a checkpoint."""

from __future__ import annotations

import pytest
import torch

from fmft_fast.data import Normalizer
from fmft_fast.errors import InputError


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    size, shift = torch.tensor([1e-3, 1.0, 1e3, 50.0]), torch.tensor([5.0, 0.0, -1e4, 512.0])
    return torch.randn(500, 4, generator=generator) * size + shift


def test_min_max_reaches_both_ends(data):
    x = Normalizer.fit(data).normalise(data)
    torch.testing.assert_close(x.amin(0), -torch.ones(4), atol=2e-4, rtol=0)
    torch.testing.assert_close(x.amax(0), torch.ones(4), atol=2e-4, rtol=0)
    # The first dimension varies by 1e-3 around 5: float32 resolves 1e-4 of that range.
    torch.testing.assert_close(x[:, 1:].abs().amax(0), torch.ones(3), atol=1e-6, rtol=0)


def test_mean_std_gives_mean_0_and_variance_1(data):
    x = Normalizer.fit(data, "mean-std").normalise(data).double()
    torch.testing.assert_close(x.mean(0), torch.zeros(4).double(), atol=2e-4, rtol=0)
    torch.testing.assert_close(x.var(0, correction=0), torch.ones(4).double(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["min-max", "mean-std"])
def test_restore_undoes_normalise(data, kind):
    normalizer = Normalizer.fit(data, kind)
    for x in (data, data.reshape(5, 100, 4), data[0]):
        torch.testing.assert_close(normalizer.restore(normalizer.normalise(x)), x)
    assert normalizer(data).equal(normalizer.normalise(data))


@pytest.mark.parametrize("kind", ["min-max", "mean-std"])
@pytest.mark.parametrize("value", [0.0, 0.1, -7e8, 1e-30])
def test_constant_dimensions_map_to_0_with_scale_1(kind, value):
    x = torch.stack([torch.full((9,), value), torch.arange(9.0)], 1)
    normalizer = Normalizer.fit(x, kind)
    assert normalizer.scale[0] == 1
    assert (normalizer.normalise(x)[:, 0] == 0).all()
    assert (normalizer.restore(torch.zeros(2))[0] == x[0, 0]).item()


def test_rounding_counts_as_constant_and_so_does_what_is_below_least_scale():
    x = torch.tensor([[1000.0, 0.0], [1000.0001, 1e-3]])
    assert x[0, 0] != x[1, 0]
    assert Normalizer.fit(x).scale.tolist() == pytest.approx([1.0, 5e-4])
    assert Normalizer.fit(x, least_scale=1e-2).scale.tolist() == [1.0, 1.0]


def test_a_single_row_is_constant():
    assert Normalizer.fit(torch.tensor([[3.0, -2.0]]), "mean-std").scale.tolist() == [1.0, 1.0]


def test_identity_takes_a_state_dict(data):
    fitted = Normalizer.fit(data)
    shell = Normalizer.identity(4)
    assert shell.normalise(data).equal(data)
    shell.load_state_dict(fitted.state_dict())
    assert shell.normalise(data).equal(fitted.normalise(data))
    assert sorted(fitted.state_dict()) == ["offset", "scale"]
    assert not list(fitted.parameters())


def test_integers_and_doubles_serve():
    normalizer = Normalizer.fit(torch.tensor([[0], [10]]))
    assert normalizer.normalise(torch.tensor([[5]])).tolist() == [[0.0]]
    assert normalizer.normalise(torch.tensor([10.0], dtype=torch.float64)).dtype == torch.float64


def test_gradients_pass_and_do_not_touch_the_data(data):
    x = data.clone().requires_grad_()
    normalizer = Normalizer.fit(x)
    normalizer.restore(normalizer.normalise(x)).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    assert not normalizer.scale.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normalizer.fit(torch.zeros(3)), "x: expected finite numbers of shape"),
        (lambda: Normalizer.fit(torch.zeros(0, 3)), "x: expected finite numbers of shape"),
        (lambda: Normalizer.fit(torch.full((2, 2), torch.nan)), "x: expected finite numbers"),
        (lambda: Normalizer.fit(torch.ones(2, 2), "z"), "kind: expected one of min-max, mean-std"),
        (lambda: Normalizer.fit(torch.ones(2, 2), least_scale=-1), "least_scale: expected"),
        (lambda: Normalizer(torch.zeros(2), torch.zeros(2)), "scale above 0"),
        (lambda: Normalizer(torch.ones(2), torch.zeros(3)), "two vectors"),
        (lambda: Normalizer(torch.ones(2), torch.tensor([0, torch.inf])), "finite"),
        (lambda: Normalizer.identity(3).normalise(torch.zeros(2)), r"x: expected shape \[..., 3\]"),
        (lambda: Normalizer.identity(3).restore(torch.zeros(3, 2)), r"x: expected shape"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
