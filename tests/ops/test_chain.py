"""Chains of dense layers on few rows against torch in float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from ops.kernel_sets import instruction_set
from torch.nn import functional as F

from fmft_fast.ops.chain import MAX_ROWS, Chain, Link
from fmft_fast.ops.network import ACTIVATIONS, activate

pytest.importorskip("fmft_fast._cpu", exc_type=ImportError)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    with instruction_set(request.param):
        yield request.param


def make(activation, dtype):
    """Odd widths, a value that two others read, an input that is wanted behind an activation."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) / shape[-1] ** 0.5

    return [
        Link(0, 67, draw(67, 5), draw(67)),
        Link(1, 67, activation=activation, slope=1.3),
        Link(2, 131, draw(131, 67)),
        Link(2, 9, draw(9, 67), draw(9)),
        Link(0, 5, activation=activation, slope=1.3),
    ]


def by_torch(links, x):
    """All values in float64."""
    values = [x.double()]
    for link in links:
        source = values[link.source]
        if link.weight is None:
            values.append(activate(source, link.activation, link.slope))
        else:
            bias = None if link.bias is None else link.bias.double()
            values.append(F.linear(source, link.weight.double(), bias))
    return values


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_are_those_of_torch(isa, activation):
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        links = make(activation, dtype)
        for rows in range(1, MAX_ROWS + 1):
            x = torch.randn(rows, 5, dtype=dtype)
            exact = by_torch(links, x)
            found = Chain(5, links, [3, 5, 1]).run(x)
            assert found is not None
            for i, value in zip((3, 5, 1), found, strict=True):
                torch.testing.assert_close(value.double(), exact[i], rtol=bound, atol=bound)


@torch.no_grad()
def test_torch_does_what_a_chain_does_not_take():
    links = make("silu", torch.float32)
    chain, x = Chain(5, links, [3]), torch.randn(2, 5)
    assert chain.run(x) is not None
    for other in (torch.randn(MAX_ROWS + 1, 5), torch.randn(0, 5), x.double(), torch.randn(2, 6)):
        assert chain.run(other) is None
    assert chain.run(torch.randn(5, 2).t()) is None
    with torch.enable_grad():
        assert chain.run(x) is None
    weight = links[0].weight
    assert weight is not None
    weight.data = weight.t().contiguous().t()
    assert chain.run(x) is None


@torch.no_grad()
def test_a_chain_reads_the_weights_of_the_moment():
    links = make("tanh", torch.float64)
    chain, x = Chain(5, links, [4]), torch.randn(1, 5, dtype=torch.float64)
    before = chain.run(x)
    assert before is not None and links[0].bias is not None
    links[0].bias.numpy()[...] += 1
    after = chain.run(x)
    assert after is not None and not torch.allclose(after[0], before[0])
    torch.testing.assert_close(after[0], by_torch(links, x)[4])
