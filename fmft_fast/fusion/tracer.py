"""Record what a field computes, as a list of torch calls on tensors without data.

The field runs on meta tensors under a torch function mode, which sees every torch call, also those
on parameters alone. Shapes, dtypes and devices are concrete, so that checks and branches on them
run as they are; a branch on a value is refused. Nothing of torch is patched. The field is recorded
for two sizes of its leading dimensions; a number that follows such a size becomes a `Lead`, and
everything else has to be the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .effects import Watch
from .refusal import Refusal, user_line
from .shapes import VIEWS, shape_only


@dataclass(frozen=True)
class Lead:
    """The size of a leading dimension of the state."""

    axis: int


@dataclass(eq=False)
class Node:
    """A tensor: an input of the field, one that exists outside of it, or the result of a call.

    Attributes:
        name: "x", "t", "cond"; "tensor"; or the name of the call, such as "linear".
        func: what is called.
        args, kwargs: with nodes in the place of tensors.
        shape: with a `Lead` for every leading dimension of the state.
        deps: which inputs the value depends on.
        tensor: of a tensor that exists outside, itself.
        where: line of the field.
        contiguous: the same values in row-major order, where that has been asked for.
    """

    name: str
    func: Callable | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    shape: tuple = ()
    dtype: torch.dtype = torch.float32
    deps: frozenset[str] = frozenset()
    tensor: Tensor | None = None
    where: str | None = None
    contiguous: Node | None = None

    def inputs(self) -> list[Node]:
        """The nodes among the arguments."""
        found: list[Node] = []
        collect(self.args, found)
        collect(tuple(self.kwargs.values()), found)
        return found


def collect(value: Any, found: list[Node]) -> None:
    """Append the nodes in an argument to a list."""
    if isinstance(value, Node):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            collect(item, found)


def convert(value: Any, change: Callable[[Any], Any]) -> Any:
    """An argument with its leaves changed."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(convert(item, change) for item in value))
    if isinstance(value, tuple):
        return tuple(convert(item, change) for item in value)
    if isinstance(value, list):
        return [convert(item, change) for item in value]
    if isinstance(value, slice):
        return slice(change(value.start), change(value.stop), change(value.step))
    return change(value)


# Read off the tensor without data; nothing is recorded.
_QUESTIONS = set(
    "shape dtype ndim layout is_sparse is_quantized is_nested is_mkldnn is_meta itemsize nbytes "
    "size dim ndimension numel nelement element_size __len__ is_floating_point is_complex "
    "is_signed result_type".split()
)
_SIZES = set("shape size __len__ numel nelement nbytes".split())
_LAYOUT = {"stride", "is_contiguous", "storage_offset", "data_ptr", "is_non_overlapping_and_dense"}
_DEVICES = {"device", "is_cuda", "is_cpu", "get_device"}
# What a trace without values cannot answer.
_VALUES = set(
    "item tolist numpy __bool__ __float__ __int__ __index__ __complex__ __array__ is_nonzero equal "
    "allclose __contains__ __iter__ __format__ __repr__ __str__ nonzero argwhere".split()
)
_GRADS = set(
    "requires_grad requires_grad_ grad grad_fn data detach detach_ is_leaf backward register_hook "
    "retain_grad _version is_inference".split()
)
_TRANSPOSES = {"T", "mT", "H", "mH"}
# Arguments that only lend their shape, dtype or device: at this position, or by this name.
_LENDING = {
    **dict.fromkeys(
        ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"), 0
    ),
    **dict.fromkeys(("expand_as", "view_as", "reshape_as", "type_as", "to"), 1),
}
_UNSET = {"empty", "empty_like", "new_empty", "empty_strided"}
# In place, on a tensor that the field itself has made.
_IN_PLACE = {
    "__iadd__": "add",
    "__isub__": "sub",
    "__imul__": "mul",
    "__itruediv__": "div",
    "add_": "add",
    "sub_": "sub",
    "mul_": "mul",
    "div_": "div",
    "relu_": "relu",
    "leaky_relu_": "leaky_relu",
    "elu_": "elu",
    "selu_": "selu",
    "tanh_": "tanh",
    "sigmoid_": "sigmoid",
    "asinh_": "asinh",
    "arcsinh_": "asinh",
}
_INPLACE_FLAG = {"relu", "leaky_relu", "elu", "selu", "silu", "dropout"}


class _Schema(TorchDispatchMode):
    """Refuses random and mutating kernels below a recorded call."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Refusal("the field draws random numbers", user_line(sys._getframe()))
        if func._schema.is_mutable:
            raise Refusal(
                f"the field changes a tensor in place ({func})",
                user_line(sys._getframe()),
                "use the operation without the underscore at its end",
            )
        return func(*args, **(kwargs or {}))


class Recorder(TorchFunctionMode):
    """Runs a field on tensors without data and keeps the calls.

    Attributes:
        nodes: all nodes in the order of the calls.
        outside: the tensors that the field reads besides its arguments.
        asked: whether the field has read the size of a tensor.
    """

    def __init__(self, device: torch.device, watch: Watch):
        super().__init__()
        self.device, self.watch = device, watch
        self.nodes: list[Node] = []
        self.outside: list[Tensor] = []
        self.asked = False
        self.made: dict[int, Tensor] = {}
        self.by_id: dict[int, tuple[Node, Tensor]] = {}

    def input(self, name: str, meta: Tensor) -> Tensor:
        """Note an argument of the field."""
        return self._keep(Node(name, deps=frozenset([name])), meta)

    def node_of(self, tensor: Tensor) -> Node:
        """The node of a tensor, which may be one from outside."""
        return self._twin(tensor)[0]

    def _keep(self, node: Node, meta: Tensor) -> Tensor:
        node.shape, node.dtype = tuple(meta.shape), meta.dtype
        self.nodes.append(node)
        self.by_id[id(meta)] = (node, meta)
        return meta

    def _twin(self, tensor: Tensor) -> tuple[Node, Tensor]:
        known = self.by_id.get(id(tensor))
        if known is None:
            if tensor.device.type == "meta":
                raise self._refuse("a tensor comes out of a call that torch does not show")
            if type(tensor) not in (Tensor, torch.nn.Parameter):
                raise self._refuse(f"a {type(tensor).__name__} takes part, not a plain tensor")
            if tensor.layout != torch.strided or tensor.is_quantized:
                raise self._refuse("a sparse or quantised tensor takes part")
            meta = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
            node = Node("tensor", tensor=tensor)
            self._keep(node, meta)
            if id(tensor) not in self.made:
                self.outside.append(tensor)
            known = self.by_id[id(tensor)] = (node, meta)
        return known

    def _refuse(self, reason: str, remedy: str | None = None) -> Refusal:
        refusal = Refusal(reason, user_line(sys._getframe(1)), remedy)
        self.watch.refusal = self.watch.refusal or refusal
        return refusal

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """See one torch call."""
        self.watch.paused = True
        try:
            return self._call(func, args, kwargs or {})
        except Refusal as refusal:
            self.watch.refusal = self.watch.refusal or refusal
            raise
        finally:
            self.watch.paused = False

    def _call(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__", "__delete__"):
            if name != "__get__":
                raise self._refuse("an attribute of a tensor is set")
            name = func.__self__.__name__  # type: ignore[attr-defined]
            if name not in _QUESTIONS | _DEVICES | _TRANSPOSES:
                raise self._refuse(
                    f"the field reads .{name} of a tensor", "leave gradients to the solver"
                )
        if name in _VALUES:
            raise self._refuse(
                f"the field reads the value of a tensor ({name}), on which its result may depend",
                "keep it a tensor: no .item(), float(), bool() or `if` on values",
            )
        if name in _LAYOUT:
            raise self._refuse(f"the field asks how a tensor lies in memory ({name})")
        if name in _GRADS:
            raise self._refuse(
                f"the field handles gradients itself ({name})", "leave gradients to the solver"
            )
        if name in _DEVICES and isinstance(args[0], Tensor):
            real = args[0] if id(args[0]) not in self.by_id else None
            real = real if real is not None and real.device.type != "meta" else None
            device = self.device if real is None else real.device
            return {
                "device": device,
                "is_cuda": device.type == "cuda",
                "is_cpu": device.type == "cpu",
                "get_device": -1 if device.index is None else device.index,
            }[name]
        twin = {}

        def to_meta(value: Any) -> Any:
            if isinstance(value, Tensor):
                node, meta = self._twin(value)
                twin[id(meta)] = node
                return meta
            return torch.device("meta") if isinstance(value, torch.device) else value

        meta_args = convert(args, to_meta)
        meta_kwargs = {k: convert(v, to_meta) for k, v in kwargs.items()}
        if name in _QUESTIONS:
            self.asked |= name in _SIZES
            return func(*meta_args, **meta_kwargs)
        if name == "tensor":
            return self._constant(func, args, kwargs)
        if "out" in kwargs and kwargs["out"] is not None:
            raise self._refuse("the field writes into a tensor (out=)")
        target = self._target(name, args, kwargs)
        if target is not None:
            name = _IN_PLACE.get(name, name)
            method = getattr(torch.nn.functional, name, None) or getattr(torch, name)
            func = method
            for values in (kwargs, meta_kwargs):
                values.pop("inplace", None)
            if len(args) > 1 and isinstance(args[-1], bool):
                args, meta_args = args[:-1], meta_args[:-1]
        if isinstance(meta_kwargs.get("device"), (str, int, torch.device)) or not twin:
            meta_kwargs["device"] = "meta"
        if name == "to" and len(args) > 1 and isinstance(args[1], str):
            meta_args = (args[0] if not args else meta_args[0], "meta", *meta_args[2:])
        if name in ("cuda", "cpu", "pin_memory"):
            raise self._refuse("the field moves tensors between devices")
        try:
            if name in VIEWS:
                out = func(*meta_args, **meta_kwargs)
            elif (out := shape_only(name, func, meta_args, meta_kwargs)) is None:
                with _Schema():
                    out = func(*meta_args, **meta_kwargs)
        except (NotImplementedError, TypeError) as error:
            raise self._refuse(f"{name} cannot be traced ({str(error).splitlines()[0]})") from None
        return self._record(name, func, args, kwargs, out, target)

    def _lend(self, node: Node) -> Node:
        """A tensor in the likeness of another, without its values."""
        kind = {"dtype": node.dtype, "device": self.device}
        like = Node("like", torch.empty, (node.shape,), kind, node.shape, node.dtype)
        self.nodes.append(like)
        return like

    def _constant(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        found: list[Any] = []
        convert((args, tuple(kwargs.values())), found.append)
        if not all(
            isinstance(v, (int, float, torch.dtype, torch.device, str, type(None))) for v in found
        ):
            raise self._refuse("torch.tensor copies a tensor or array", "use the tensor itself")
        if kwargs.get("requires_grad"):
            raise self._refuse("the field makes a leaf that requires grad")
        out = func(*args, **kwargs)
        self.made[id(out)] = out
        return out

    def _target(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The tensor that a call changes in place, if the field itself has made it."""
        flagged = name in _INPLACE_FLAG and (
            kwargs.get("inplace") or (len(args) > 1 and args[-1] is True)
        )
        if not flagged and name not in _IN_PLACE:
            if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
                raise self._refuse(
                    f"the field changes a tensor in place ({name})",
                    "use the operation without the underscore at its end",
                )
            return None
        if not args:
            raise self._refuse(f"{name} is called by names only")
        node, meta = self._twin(args[0])
        storage = meta.untyped_storage()._cdata
        shared = sum(m.untyped_storage()._cdata == storage for _, m in self.by_id.values())
        if node.func is None or shared > 1:
            raise self._refuse(
                f"the field changes a tensor in place that something else may read ({name})",
                "use the operation without in-place",
            )
        return args[0]

    def _record(
        self,
        name: str,
        func: Callable,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        target: Tensor | None,
    ) -> Any:
        def to_node(value: Any) -> Any:
            return self._twin(value)[0] if isinstance(value, Tensor) else value

        if name in _UNSET:
            raise self._refuse(f"the field reads memory that nobody wrote ({name})")
        node = Node(name, func, convert(args, to_node))
        node.kwargs = {k: convert(v, to_node) for k, v in kwargs.items()}
        lent = _LENDING.get(name)
        if lent is not None:
            node.args = tuple(
                self._lend(v) if i == lent and isinstance(v, Node) else v
                for i, v in enumerate(node.args)
            )
            if isinstance(node.kwargs.get("other"), Node):
                node.kwargs["other"] = self._lend(node.kwargs["other"])
        node.deps = frozenset().union(*(n.deps for n in node.inputs()))
        node.where = user_line(sys._getframe(3))
        if isinstance(out, Tensor):
            if target is not None and (out.shape, out.dtype) == (target.shape, target.dtype):
                self._keep(node, out)
                self.by_id[id(target)] = (node, target)
                return target
            if id(out) in self.by_id:  # such as x.to(x.dtype), which is x
                return out
            return self._keep(node, out)
        if not isinstance(out, (tuple, list)):
            raise self._refuse(f"{name} gives a {type(out).__name__}, not a tensor")
        self.nodes.append(node)
        parts = []
        for i, part in enumerate(out):
            if not isinstance(part, Tensor):
                raise self._refuse(f"{name} gives something besides tensors")
            item = Node("part", None, (node, i), deps=node.deps, where=node.where)
            parts.append(self._keep(item, part))
        return tuple(parts) if type(out) in (tuple, list) else type(out)(parts)


@dataclass
class Trace:
    """A recorded field."""

    nodes: list[Node]
    result: Node
    outside: list[Tensor]
    asked: bool


def record(
    field: Callable, lead: Sequence[int], y0: Tensor, cond: Tensor | None, watch: Watch
) -> Trace:
    """Record a field for a state [*lead, state] that is otherwise like y0."""
    recorder = Recorder(y0.device, watch)
    kind: dict[str, Any] = {"dtype": y0.dtype, "device": "meta"}
    given = [
        recorder.input("t", torch.empty((), **kind)),
        recorder.input("x", torch.empty((*lead, y0.shape[-1]), **kind)),
    ]
    if cond is not None:
        shape = list(cond.shape)
        for axis in range(min(len(lead), cond.ndim)):
            if cond.shape[axis] == y0.shape[axis]:
                shape[axis] = lead[axis]
        meta = torch.empty(shape, dtype=cond.dtype, device="meta")
        given.append(recorder.input("cond", meta))
    try:
        with recorder, watch.watching():
            out = field(*given)
    except Refusal:
        raise watch.refusal or Refusal("the trace was ended") from None
    if not isinstance(out, Tensor):
        raise Refusal(f"the field returns a {type(out).__name__}, not a tensor")
    return Trace(recorder.nodes, recorder.node_of(out), recorder.outside, recorder.asked)
