"""Batch sources repeat their order after a resume, and take what loaders yield."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fmft_fast.errors import InputError, InputTypeError
from fmft_fast.flow import make_coupling
from fmft_fast.train import LoaderBatches, LoaderPairs, PairBatches
from fmft_fast.train.batches import as_batch, gather


def loader(**options):
    return DataLoader(TensorDataset(torch.arange(10.0).reshape(10, 1)), batch_size=4, **options)


def sources():
    x1 = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    fitted = make_coupling("ot-fixed").fit(x1, generator=torch.Generator().manual_seed(1))
    return {
        "shuffled loader": lambda: LoaderBatches(loader(shuffle=True), seed=3),
        "loader with its own generator": lambda: LoaderBatches(
            loader(shuffle=True, generator=torch.Generator()), seed=3
        ),
        "list of batches": lambda: LoaderBatches(list(x1.split(16)), seed=3),
        "paired loader": lambda: LoaderPairs(
            loader(shuffle=True), make_coupling("independent"), dtype=torch.float64, seed=3
        ),
        "coupling": lambda: PairBatches(fitted, batch_size=8, device=torch.device("cpu"), seed=3),
    }


def take(source, count):
    return [source.next() for _ in range(count)]


@pytest.mark.parametrize("kind", sources())
@pytest.mark.parametrize("used", [0, 1, 3, 5])
def test_a_restored_source_goes_on_as_the_first_did(kind, used):
    first = sources()[kind]()
    take(first, used)
    state = first.state()
    expected = take(first, 5)
    torch.manual_seed(used + 99)
    second = sources()[kind]()
    second.load_state(state)
    for ours, theirs in zip(take(second, 5), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_epochs_of_a_loader_are_shuffled_differently_and_completely():
    source = LoaderBatches(loader(shuffle=True), seed=0)
    epochs = [torch.cat([batch[0] for batch in take(source, 3)]).flatten() for _ in range(3)]
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(10))
    assert not torch.equal(epochs[0], epochs[1])


def test_loader_does_not_disturb_the_global_stream():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    take(LoaderBatches(loader(shuffle=True), seed=0), 7)
    assert torch.equal(torch.get_rng_state(), before)


def test_gather_gives_every_row_once():
    (rows,) = gather(loader(shuffle=True), seed=0)
    assert rows.flatten().sort().values.tolist() == list(range(10))


def test_pairs_take_the_dtype_asked_for_and_keep_labels():
    data = DataLoader(TensorDataset(torch.randn(8, 2), torch.arange(8)), batch_size=4)
    source = LoaderPairs(data, make_coupling("independent"), dtype=torch.float64, seed=0)
    x0, x1, cond = source.next()
    assert (x0.dtype, x1.dtype, cond.dtype) == (torch.float64, torch.float64, torch.int64)


def test_wrong_loaders_are_explained():
    with pytest.raises(InputTypeError, match="spent after one epoch"):
        LoaderBatches(iter([torch.ones(2, 2)]), seed=0)
    with pytest.raises(InputError, match="empty loader"):
        LoaderBatches([], seed=0).next()
    with pytest.raises(InputTypeError, match=r"expected batches.*got \(dict\).*collate_fn"):
        as_batch({"x": torch.ones(2)})
