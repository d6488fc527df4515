"""Copies tell every change of a tensor, to the byte, also those that torch does not count."""

from __future__ import annotations

import pytest
import torch

from fmft_fast.ops.copies import Copies, can_copy

pytest.importorskip("fmft_fast._cpu", exc_type=ImportError)


def test_what_has_not_changed_holds_and_what_has_does_not():
    tensors = [torch.randn(3, 5), torch.tensor([torch.nan, 0.0]), torch.zeros(0)]
    copies = Copies(tensors)
    assert copies.hold() and Copies([]).hold()
    tensors[1].detach().numpy()[1] = -0.0
    assert not copies.hold()
    tensors[1][1] = 0.0
    assert copies.hold()
    tensors[0].data.t()[4, 2] += 1
    assert not copies.hold()


def test_new_memory_and_another_layout_are_seen():
    x = torch.randn(4, 4)
    copies = Copies([x])
    x.data = x.data.clone()
    assert copies.hold()
    x.data = x.data.t()
    assert not copies.hold()
    x.data = torch.zeros(4, 4)
    assert not copies.hold()


def test_only_small_tensors_that_lie_together_are_copied():
    x = torch.zeros(4, 6)
    assert can_copy([x, x], 192) and not can_copy([x, x], 191)
    assert not can_copy([x.t()], 192) and can_copy([], 0)
