"""`import torchdiffeq` that yields this package, for code that cannot be changed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

from . import continuous_adjoint, drop_in, events, inputs, methods

# The version of torchdiffeq whose interface is offered.
TORCHDIFFEQ_VERSION = "0.2.5"
_NAME = "torchdiffeq"
_hidden: dict[str, ModuleType] | None = None


def _module(name: str, **names: object) -> ModuleType:
    module = ModuleType(f"{_NAME}{name}", "fmft_fast in the place of torchdiffeq")
    module.__spec__ = ModuleSpec(module.__name__, None)  # importlib.util.find_spec asks for it
    module.__dict__.update(names)
    return module


def _build() -> dict[str, ModuleType]:
    """The public module, and those private names that downstream code imports."""
    public = {
        "odeint": drop_in.odeint,
        "odeint_adjoint": continuous_adjoint.odeint_adjoint,
        "odeint_event": drop_in.odeint_event,
        "odeint_dense": drop_in.odeint_dense,
    }
    odeint = _module("._impl.odeint", SOLVERS=methods.METHODS, **public)
    adjoint = _module(
        "._impl.adjoint",
        odeint_adjoint=public["odeint_adjoint"],
        find_parameters=continuous_adjoint.find_parameters,
    )
    misc = _module(
        "._impl.misc",
        Perturb=inputs.Perturb,
        _rms_norm=inputs.rms_norm,
        _mixed_norm=inputs.max_rms_norm,
        _flat_to_shape=inputs.unflatten,
    )
    event_handling = _module("._impl.event_handling", combine_event_functions=events.combine_events)
    impl = _module("._impl", **public, adjoint=adjoint, misc=misc, event_handling=event_handling)
    root = _module("", **public, _impl=impl, __version__=TORCHDIFFEQ_VERSION, __path__=[])
    impl.__path__ = []
    return {
        module.__name__: module for module in (root, impl, odeint, adjoint, misc, event_handling)
    }


def patch_torchdiffeq() -> None:
    """Make every later `import torchdiffeq` in this process yield this package.

    Modules that imported torchdiffeq before keep what they have: patch first. Repeated calls do
    nothing. `unpatch_torchdiffeq` undoes it.

    Example:
        >>> import fmft_fast
        >>> fmft_fast.patch_torchdiffeq()
        >>> import torchdiffeq
        >>> torchdiffeq.odeint is fmft_fast.odeint
        True
        >>> fmft_fast.unpatch_torchdiffeq()
    """
    global _hidden
    if _hidden is not None:
        return
    ours = [name for name in sys.modules if name == _NAME or name.startswith(f"{_NAME}.")]
    _hidden = {name: sys.modules.pop(name) for name in ours}
    sys.modules.update(_build())


def unpatch_torchdiffeq() -> None:
    """Undo `patch_torchdiffeq`; does nothing if it is not in place."""
    global _hidden
    if _hidden is None:
        return
    for name in [n for n in sys.modules if n == _NAME or n.startswith(f"{_NAME}.")]:
        del sys.modules[name]
    sys.modules.update(_hidden)
    _hidden = None


@contextmanager
def patched_torchdiffeq() -> Iterator[None]:
    """`patch_torchdiffeq` for the length of a `with` block.

    Example:
        >>> import fmft_fast
        >>> with fmft_fast.patched_torchdiffeq():
        ...     from torchdiffeq import odeint
        >>> odeint is fmft_fast.odeint
        True
    """
    was_patched = _hidden is not None
    patch_torchdiffeq()
    try:
        yield
    finally:
        if not was_patched:
            unpatch_torchdiffeq()
