"""Which model a fine-tuning run trains: the field itself, or a branch beside it; and its return.

A branch is built from a recipe of plain values, which checkpoints keep, so that the model of a run
can be built again from the pre-trained field alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmft_fast.errors import CheckpointError, ConfigError, FmftError
from fmft_fast.fields import GAV, MLP, Residual
from fmft_fast.train.batches import Batch, stream_seed
from fmft_fast.train.checkpoint import Checkpoint, check_field, load_checkpoint, recipes
from fmft_fast.train.config import FinetuneConfig, unknown_key

HIDDEN = (64, 64)


def add_branch(field: nn.Module, rows: Batch, mean: Tensor, config: FinetuneConfig) -> Residual:
    """Put a new branch beside a field.

    Args:
        field: pre-trained; frozen in place unless `config.joint`.
        rows: some data x1 [n, *state], and conditions [n, ...] if there are any.
        mean: of the data, [*state]; a GAV is centred there.
        config: with a mode other than "direct"; the branch is the same for the same seed.

    Raises:
        ConfigError: an option is unknown, or does not fit the data.
    """
    x, *cond = rows
    recipe = {
        "mode": config.mode,
        "joint": config.joint,
        "state": list(x.shape[1:]),
        # Labels and shaped conditions are for the base alone.
        "cond_dim": cond[0].shape[1] if cond and _is_flat(cond[0]) else 0,
        "options": dict(config.residual_options),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, "branch"))
        branch = make_branch(recipe, mean.cpu())
    return _join(field, branch.to(x.device, x.dtype), recipe).eval()


def make_branch(recipe: Mapping[str, Any], mean: Tensor) -> nn.Module:
    """Build the branch that a recipe describes, untrained."""
    make, options = BRANCHES[recipe["mode"]], recipe["options"]
    try:
        return make(tuple(recipe["state"]), recipe["cond_dim"], dict(options), mean)
    except FmftError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"residual_options: expected values that the branch takes, got {dict(options)} "
            f"({error}); see fmft_fast.fields.GAV and fmft_fast.fields.MLP"
        ) from error


def _join(field: nn.Module, branch: nn.Module, recipe: dict[str, Any]) -> Residual:
    model = Residual(field, branch, recipe["joint"], show_velocity=_sees_velocity(recipe))
    model.recipe = recipe
    return model


def _sees_velocity(recipe: Mapping[str, Any]) -> bool:
    return recipe["mode"] == "residual-mlp" and recipe["options"].get("velocity", True) is True


def load_model(field: nn.Module, path: str | Path) -> nn.Module:
    """Give the model that a run ended with: the field, or the residual around it.

    Args:
        field: of the architecture that was pre-trained (its weights do not matter), in the dtype
            of the run; changed in place.
        path: a checkpoint's folder or a run's folder.

    Raises:
        CheckpointError: the checkpoint is missing, corrupt, or belongs to another model.

    Example:
        >>> import tempfile
        >>> from fmft_fast.train import MLEFineTuner
        >>> out, x1 = tempfile.mkdtemp(), torch.randn(200, 2)
        >>> config = FinetuneConfig(steps=5, mode="residual-mlp", device="cpu")
        >>> tuner = MLEFineTuner(MLP(2), x1, config=config, out=out, progress=False)
        >>> tuned = tuner.run().model
        >>> again = load_model(MLP(2), out)
        >>> torch.equal(again(torch.tensor(0.5), x1), tuned(torch.tensor(0.5), x1))
        True
    """
    return as_saved(field, load_checkpoint(path), path)


def as_saved(field: nn.Module, checkpoint: Checkpoint, path: str | Path) -> nn.Module:
    """Put the branches of a checkpoint beside a field that lacks them, then load its weights."""
    own, theirs = recipes(field), list(checkpoint.architecture.get("residuals", ()))
    model = field
    if theirs[: len(own)] == own:
        for recipe in theirs[len(own) :]:
            model = _wrap(model, recipe, checkpoint, path)
    check_field(model, checkpoint, path)
    model.load_state_dict(dict(checkpoint.model))
    return model


def _wrap(field: nn.Module, recipe: Any, checkpoint: Checkpoint, path: str | Path) -> Residual:
    if recipe is None:
        raise CheckpointError(
            f"{path} holds a residual that was built by hand, expected one built by MLEFineTuner; "
            f"build it as it was and call load_weights"
        )
    # An analytic field may have no tensors of its own; a run has one dtype.
    tensors = chain(field.parameters(), field.buffers(), checkpoint.model.values())
    like = next(filter(Tensor.is_floating_point, tensors), torch.empty(()))
    try:
        branch = make_branch(recipe, torch.zeros(recipe["state"])).to(like.device, like.dtype)
        return _join(field, branch, recipe)
    except (KeyError, TypeError, ValueError, FmftError) as error:
        raise CheckpointError(
            f"{path}: expected the recipe of a branch, got {recipe!r} ({error}); read it with the "
            f"version of fmft_fast that wrote it, or take another checkpoint"
        ) from error


def _make_gav(
    state: tuple[int, ...], cond_dim: int, options: dict[str, Any], mean: Tensor
) -> nn.Module:
    """A GAV around the mean of the data, or around what the option `center` names."""
    center = options.pop("center", "data")
    _check_options(options, GAV, "residual", hidden=("dim", "cond_dim"))
    if center in ("learned", "condition"):
        place = center
    elif center == "origin":
        place = None
    else:
        place = mean if center == "data" else _as_center(center, mean)
    if center == "condition" and not cond_dim:
        raise ConfigError(
            'residual_options: center = "condition" needs conditions [n, size] of numbers, and the '
            'data have none; choose "data", "origin" or "learned"'
        )
    told = cond_dim if center == "condition" else 0
    return GAV(state, center=place, cond_dim=told, **options)


def _make_mlp(
    state: tuple[int, ...], cond_dim: int, options: dict[str, Any], mean: Tensor
) -> nn.Module:
    """An MLP whose last layer is zero: the sum begins as the pre-trained field, exactly.

    It sees the velocity of the field, unless the option `velocity` is false.
    """
    velocity = options.pop("velocity", True)
    if not isinstance(velocity, bool):
        raise ConfigError(f"residual_options: expected velocity = true or false, got {velocity!r}")
    _check_options(options, MLP, "residual-mlp", hidden=("dim", "cond_dim"), more=("velocity",))
    hidden, n = options.pop("hidden", HIDDEN), math.prod(state)
    widths = (hidden,) if isinstance(hidden, int) else tuple(hidden)
    net = MLP(n, hidden=widths, cond_dim=cond_dim + n * velocity, **options)
    for parameter in net.linears[-1].parameters():
        nn.init.zeros_(parameter)
    return net if len(state) == 1 else _Flat(net)


BRANCHES: dict[str, Callable[..., nn.Module]] = {
    "residual": _make_gav,
    "residual-mlp": _make_mlp,
}


class _Flat(nn.Module):
    """A field of flat states, for states of any shape."""

    def __init__(self, net: MLP) -> None:
        super().__init__()
        self.net, self.cond_dim = net, net.cond_dim

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the field at the flattened x, in x's shape."""
        flat = x.flatten(1)
        v = self.net(t, flat) if cond is None else self.net(t, flat, cond)
        return v.reshape(x.shape)


def _is_flat(cond: Tensor) -> bool:
    return cond.ndim == 2 and cond.is_floating_point()


def _as_center(center: Any, mean: Tensor) -> Tensor:
    try:
        return torch.as_tensor(center, dtype=mean.dtype).expand_as(mean)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f'residual_options: expected center = "data", "origin", "learned", "condition" or '
            f"numbers of the shape {list(mean.shape)}, got {center!r}"
        ) from error


def _check_options(
    options: Mapping[str, Any],
    cls: type,
    mode: str,
    *,
    hidden: Sequence[str],
    more: Sequence[str] = (),
) -> None:
    """Refuse an option that the branch does not take."""
    known = [name for name in inspect.signature(cls).parameters if name not in hidden]
    known += more
    for name in options:
        if name not in known:
            raise unknown_key(name, known, f"a residual option of mode {mode}")
