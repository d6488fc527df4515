"""Settings of a training run: frozen, checked when made, read from TOML and command line."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from torch import Tensor

from fmft_fast.errors import ConfigError
from fmft_fast.flow.couplings import COUPLINGS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ConfigT = TypeVar("ConfigT", bound="Settings")
MODES = ("direct", "residual", "residual-mlp")
PAIRED = f"how noise and data are paired: {', '.join(COUPLINGS)}"


def key(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: tuple[str | bool, ...] | None = None,
) -> Any:
    """Declare a configuration key: its default, its meaning and the values it may take."""
    metadata = {"text": text, "low": low, "above": above, "high": high, "choices": choices}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Keys declared by `key`, converted and checked when made.

    Raises:
        ConfigError: a value has the wrong type or lies outside its range.
    """

    def __post_init__(self) -> None:
        """Convert (list to tuple, int to float, tables to plain values) and check every value."""
        hints = _hints(type(self))
        for item in dataclasses.fields(self):
            value = _convert(item.name, getattr(self, item.name), hints[item.name])
            _check_range(item, value)
            object.__setattr__(self, item.name, value)

    @classmethod
    def from_dict(cls: type[ConfigT], table: Mapping[str, Any]) -> ConfigT:
        """Make a configuration from keys and values; unknown keys are refused by name.

        Example:
            >>> PretrainConfig.from_dict({"steps": 10}).steps
            10
        """
        known = [item.name for item in dataclasses.fields(cls)]
        for name in table:
            if name not in known:
                raise unknown_key(name, known, f"a key of {cls.__name__}")
        return cls(**table)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, ready for JSON and TOML."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    def changed_since(self, saved: Mapping[str, Any], *, free: Collection[str] = ()) -> str:
        """Say which keys, but for the free ones, have another value than was saved; "" if none.

        A key that `saved` lacks is younger than what was saved and counts as its default.

        Example:
            >>> PretrainConfig(time_power=2.0, seed=1).changed_since({"seed": 1})
            'time_power was 1.0, now 2.0'
        """
        return changes({**type(self)().to_dict(), **saved}, self.to_dict(), free=free)

    def to_toml(self, section: str | None = None) -> str:
        """Write the configuration as TOML, under `[section]` when one is named."""
        return format_toml(self.to_dict(), section)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig(Settings):
    """What every training run needs; `fit` reads nothing else."""

    steps: int = key(3000, "optimiser steps", low=1)
    batch_size: int = key(256, "samples per step (a DataLoader brings its own)", low=1)
    lr: float = key(1e-3, "peak learning rate of AdamW", above=0)
    weight_decay: float = key(0.0, "decoupled weight decay", low=0)
    schedule: str = key("cosine", "shape after the warm-up", choices=("constant", "cosine"))
    warmup: int = key(0, "steps of linear warm-up", low=0)
    grad_clip: float | None = key(1.0, "largest gradient norm, or none", above=0)
    ema_decay: float | None = key(
        None, "final decay of the averaged weights, or none", low=0, high=1
    )
    seed: int = key(0, "seed of every random stream of the run", low=0)
    device: str = key("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = key("float32", "dtype of parameters and data", choices=("float32", "float64"))
    cuda_graph: bool | str = key(
        "auto", "replay the training step as one CUDA graph", choices=("auto", True, False)
    )
    log_every: int = key(50, "steps between lines of metrics", low=1)
    eval_every: int = key(250, "steps between evaluations", low=1)
    metric: str = key("heldout", "evaluated metric that picks the best model (lower is better)")
    select: str = key("last", "weights the run ends with", choices=("last", "best"))
    patience: int | None = key(None, "evaluations without a better metric, then stop", low=1)
    checkpoint_every: int = key(500, "steps between checkpoints", low=1)
    keep_last: int = key(2, "checkpoints kept besides the best one", low=1)
    tensorboard: bool = key(False, "write TensorBoard event files, too")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(FitConfig):
    """Settings of flow-matching pre-training: regress the field on the path's velocity."""

    coupling: str = key("ot-minibatch", PAIRED)
    coupling_options: dict = key({}, "options of the coupling")
    sigma: float = key(0.0, "standard deviation of the probability path around its mean", low=0)
    time_power: float = key(
        1.0, "p of the times' density p (1 - t)^(p - 1); above 1 favours early times", above=0
    )
    holdout: float = key(0.1, "share of the data never trained on", low=0, high=0.9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(FitConfig):
    """Settings of MLE fine-tuning: pull the ODE's end point to the data."""

    steps: int = key(1000, "optimiser steps", low=1)
    lr: float = key(5e-4, "peak learning rate of AdamW", above=0)
    select: str = key("best", "weights the run ends with", choices=("last", "best"))
    method: str = key("euler", "solver through which the gradient goes")
    solver_steps: tuple[int, ...] = key((10,), "steps of the solve (one is drawn)", low=1)
    rtol: float | None = key(None, "relative tolerance: makes the solve adaptive", above=0)
    atol: float | None = key(None, "absolute tolerance: makes the solve adaptive", above=0)
    gradient: str = key(
        "discrete", "gradient of the solve", choices=("discrete", "continuous", "backprop")
    )
    mode: str = key(
        "direct",
        "what is trained: the field itself, or a branch (a GAV, an MLP) beside it",
        choices=MODES,
    )
    joint: bool = key(False, "residual modes: train the pre-trained field as well")
    residual_options: dict = key({}, "residual modes: options of the branch")
    coupling: str = key("ot-fixed", PAIRED)
    coupling_options: dict = key({}, "options of the coupling")
    posterior: str = key(
        "unit", "sigma of the Gaussian posterior: 1, or fitted", choices=("unit", "fitted")
    )
    fm_weight: float = key(0.0, "weight of the flow-matching loss mixed in", low=0)
    sigma: float = key(0.0, "standard deviation of the path in the mixed-in loss", low=0)
    time_power: float = key(1.0, "p of its times' density p (1 - t)^(p - 1)", above=0)
    anchor_weight: float = key(
        0.0, "weight of half the squared distance to the weights at the start", low=0
    )
    holdout: float = key(0.1, "share of the data never trained on", low=0, high=0.9)
    curvature_limit: float = key(2.0, "growth of path length / displacement that is named", above=1)
    collapse_limit: float = key(0.5, "share of the data's spread below which is named", above=0)
    cancellation_limit: float = key(
        0.5, "share of their energy that field and branch cancel, above which is named", above=0
    )

    def check_mode(self) -> None:
        """Refuse settings that mean nothing in the mode; a trainer asks, since it may name one."""
        if self.mode == "direct":
            for name, given in (("joint", self.joint), ("residual_options", self.residual_options)):
                if given:
                    raise ConfigError(
                        f"{name}: expected nothing in mode direct, which has no branch, got "
                        f"{given!r}; set mode = residual or residual-mlp, or drop it"
                    )

    @property
    def adaptive(self) -> bool:
        """Whether tolerances, not a number of steps, steer the solve."""
        return self.rtol is not None or self.atol is not None


def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _convert(name: str, value: Any, hint: Any) -> Any:
    """Bring `value` to the type that `hint` names, or say what was expected."""
    if get_origin(hint) in (Union, UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        hints = [arg for arg in get_args(hint) if arg is not type(None)]
        hint = next((arg for arg in hints if isinstance(value, arg)), hints[-1])
        return _convert(name, value, hint)
    if get_origin(hint) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        if not items:
            raise ConfigError(f"{name}: expected at least one value, got an empty list")
        return tuple(_convert(name, item, get_args(hint)[0]) for item in items)
    if hint is dict and isinstance(value, Mapping):
        return {str(k): _plain(f"{name}.{k}", item) for k, item in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    wanted = {int: "a whole number", float: "a finite number", str: "a text", dict: "a table"}
    raise ConfigError(
        f"{name}: expected {wanted.get(hint, hint.__name__)}, got {value!r} "
        f"({type(value).__name__}); set it as {name} = {_sample(hint)} in TOML "
        f"or --{name} {_sample(hint)}"
    )


def _plain(name: str, value: Any) -> Any:
    """Bring what stands in a table to what TOML and JSON give back: equal after a round trip."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(f"{name}.{k}", item) for k, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, item) for item in value]
    finite = not isinstance(value, float) or math.isfinite(value)
    if finite and (value is None or isinstance(value, (bool, int, float, str))):
        return value
    raise ConfigError(
        f"{name}: expected finite numbers, texts, lists or tables of them, got {value!r} "
        f"({type(value).__name__}); checkpoints have to keep it as text"
    )


def _sample(hint: Any) -> str:
    return {int: "100", float: "0.5", str: "text", dict: "{size = 1}", bool: "true"}[hint]


def _check_range(item: dataclasses.Field, value: Any) -> None:
    """Refuse a value outside the range or the choices that the key declares."""
    meta = item.metadata
    choices = meta["choices"]
    if choices is not None and value not in choices:
        names = as_typed(choices)
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{item.name}: expected one of {', '.join(names)}, got {value!r}{hint}")
    for number in value if isinstance(value, tuple) else (value,):
        if number is None or isinstance(number, (str, dict)):
            continue
        low, above, high = meta["low"], meta["above"], meta["high"]
        if low is not None and number < low:
            raise ConfigError(f"{item.name}: expected at least {low}, got {number}; raise it")
        if above is not None and number <= above:
            raise ConfigError(f"{item.name}: expected more than {above}, got {number}; raise it")
        if high is not None and number > high:
            raise ConfigError(f"{item.name}: expected at most {high}, got {number}; lower it")


def as_typed(choices: Sequence[str | bool]) -> list[str]:
    """Spell choices as they are typed on a command line and in TOML."""
    return [choice if isinstance(choice, str) else str(choice).lower() for choice in choices]


def unknown_key(name: str, known: Sequence[str], what: str) -> ConfigError:
    """Make the error for a name that is not known, with the nearest known one."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return ConfigError(f"expected {what}, got {name!r}; {hint}")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file, with errors that name the file.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}; mend that line") from error


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Turn `--key value`, `--key=value` and `--section.key=value` into a nested table.

    Dashes inside a key count as underscores; `1,2,5` is a list.

    Example:
        >>> parse_overrides(["--lr", "1e-3", "--finetune.solver-steps=2,10"])
        {'lr': 0.001, 'finetune': {'solver_steps': [2, 10]}}
    """
    table: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"expected --key value, got {word!r}; put the key in front of it")
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{name}: expected a value, got none; write --{name} VALUE")
            text = rest.pop(0)
        *sections, leaf = name.replace("-", "_").split(".")
        place = table
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--{name}: {section!r} was given a value before; drop one")
        place[leaf] = _parse_value(text)
    return table


def _parse_value(text: str) -> Any:
    """Read a command-line value as TOML where it is TOML, else as a list or plain text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        # TOML wants 1e-3 as 1e-3 but refuses .5 and 1.: Python's own spelling is fine here.
        return float(text)
    except ValueError:
        pass
    if "," in text:
        return [_parse_value(part.strip()) for part in text.split(",") if part.strip()]
    return text


def merge(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `other` over `base`; tables merge key by key, everything else is replaced."""
    merged = dict(base)
    for name, value in other.items():
        old = merged.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merge(old, value)
        merged[name] = value
    return merged


def changes(saved: Mapping[str, Any], now: Mapping[str, Any], *, free: Collection[str] = ()) -> str:
    """Say which keys, but for the free ones, have another value than they had.

    Example:
        >>> changes({"lr": 0.1, "steps": 5}, {"lr": 0.2, "steps": 6}, free={"steps"})
        'lr was 0.1, now 0.2'
    """
    return "; ".join(
        f"{name} was {saved.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(saved.keys() | now.keys())
        if name not in free and saved.get(name) != now.get(name)
    )


def section(table: Mapping[str, Any], name: str, sections: Sequence[str]) -> dict[str, Any]:
    """Pick what concerns `[name]`: that table, over the keys that stand outside any section.

    Args:
        table: a configuration file or the overrides of a command line.
        name: section wanted, one of `sections`.
        sections: every name that is a section and not a key.
    """
    shared = {k: v for k, v in table.items() if k not in sections}
    own = table.get(name, {})
    if not isinstance(own, Mapping):
        raise ConfigError(f"{name}: expected a section of keys, got {own!r}; write [{name}]")
    return merge(shared, own)


def format_toml(table: Mapping[str, Any], name: str | None = None) -> str:
    """Write plain values as TOML; None becomes "none", which is read back as None."""
    lines = [f"[{name}]"] if name else []
    tables = []
    for item, value in table.items():
        if isinstance(value, Mapping):
            if value:
                tables.append("\n" + format_toml(value, f"{name}.{item}" if name else item))
        else:
            lines.append(f"{item} = {toml_value(value)}")
    return "\n".join(lines) + "\n" + "".join(tables)


def toml_value(value: Any) -> str:
    """Write one plain value as TOML has it."""
    if value is None:
        return '"none"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)
