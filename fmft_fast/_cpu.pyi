from collections.abc import Callable, Iterable, Sequence
from typing import Any

def rk_combine(
    out: int,
    y: int,
    k: Sequence[int],
    h: float,
    w: Sequence[float],
    size: int,
    type: int,
    k_type: int,
    threads: int,
    /,
) -> None: ...
def rk_finish(
    out: int,
    ratio: int,
    y: int,
    k: Sequence[int],
    h: float,
    b: Sequence[float],
    b_err: Sequence[float],
    rtol: float,
    atol: float,
    size: int,
    type: int,
    k_type: int,
    threads: int,
    /,
) -> None: ...
def dense_eval(
    out: int,
    y: int,
    k: Sequence[int],
    h: float,
    p: Sequence[Sequence[float]],
    theta: int,
    thetas: int,
    size: int,
    type: int,
    k_type: int,
    threads: int,
    /,
) -> None: ...
def same_bytes(a: Sequence[int], b: Sequence[int], sizes: Sequence[int], /) -> bool: ...

class Unchanged:
    def __init__(self) -> None: ...
    def size(self, scope: Any, size: int, /) -> None: ...
    def entry(self, scope: Any, key: Any, want: Any, /) -> None: ...
    def listing(self, scope: Any, key: Any, items: Iterable[tuple[Any, Any]], /) -> None: ...
    def named(self, found: dict[str, Any], ids: Sequence[tuple[str, int]], /) -> None: ...
    def absent(self, scope: dict[str, Any], key: str, /) -> None: ...
    def type(self, thing: Any, kind: type, /) -> None: ...
    def attribute(self, thing: Any, name: str, want: Any, /) -> None: ...
    def call(self, look: Callable[[], Any], want: Any, /) -> None: ...
    def hold(self) -> bool: ...

class Chain:
    def __init__(self, links: Sequence[tuple[int, int, int, int, float, int, int]], /) -> None: ...
    def run(
        self,
        type: int,
        rows: int,
        parameters: Sequence[int],
        leading: Sequence[int],
        values: Sequence[int],
        /,
    ) -> None: ...

def memory_use() -> tuple[int, int, int]: ...
def reset_memory_peak() -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str, /) -> None: ...

_Layer = tuple[
    int,
    Sequence[tuple[int, int, int]],
    int,
    int,
    int,
    int,
    int,
    int,
    float,
    Sequence[int],
]

class Field:
    def __init__(self, state: int, layers: Sequence[_Layer], /) -> None: ...

class Method:
    def __init__(self, a: Sequence[Sequence[float]], b: Sequence[float], /) -> None: ...

class Solve:
    def __init__(
        self,
        field: Field,
        method: Method,
        type: int,
        shared: bool,
        threads: int,
        batch: int,
        steps: int,
        times: int,
        h: int,
        outputs: Sequence[int],
        weights: int,
        y0: int,
        parameters: Sequence[int],
        leading: Sequence[int],
        tables: Sequence[int],
        conds: Sequence[int],
        /,
    ) -> None: ...

class Kept: ...

class PerSample:
    def counts(self, counts: int, /) -> int: ...
    def ended(self, row: int, /) -> tuple[int, float]: ...
    def steps(self, row: int, /) -> tuple[list[float], list[float]]: ...

class Run:
    @property
    def finite(self) -> bool: ...

class Repeated:
    def __init__(
        self,
        like: Solve,
        sizes: Sequence[int],
        links: Chain | None,
        link_leading: Sequence[int],
        wanted: Sequence[int],
        /,
    ) -> None: ...
    def forward(self, keep: int, threads: int, out: int, tensors: Sequence[int], /) -> Run: ...
    def backward(self, run: Run, grad: int, gradients: Sequence[int], /) -> None: ...

def all_finite(x: int, size: int, type: int, /) -> bool: ...
def trajectory_forward(solve: Solve, keep: int, out: int, /) -> Kept: ...
def trajectory_adaptive(
    solve: Solve,
    c: Sequence[float],
    b_err: Sequence[float],
    dense: Sequence[float],
    order: int,
    control: Sequence[float],
    max_num_steps: int,
    t: Sequence[float],
    keep: int,
    out: int,
    /,
) -> tuple[int, list[float], list[float], list[int], list[float], int, int, Kept]: ...
def trajectory_backward(
    solve: Solve,
    kept: Kept,
    grad: int,
    y0: int,
    parameters: Sequence[int],
    sizes: Sequence[int],
    leading: Sequence[int],
    tables: Sequence[int],
    conds: Sequence[int],
    /,
) -> None: ...
def per_sample_forward(
    solve: Solve,
    c: Sequence[float],
    b_err: Sequence[float],
    order: int,
    control: Sequence[float],
    max_num_steps: int,
    t0: float,
    t1: float,
    keep: int,
    out: int,
    /,
) -> PerSample: ...
def per_sample_backward(
    solve: Solve,
    kept: PerSample,
    grad: int,
    y0: int,
    parameters: Sequence[int],
    sizes: Sequence[int],
    leading: Sequence[int],
    tables: Sequence[int],
    conds: Sequence[int],
    /,
) -> None: ...
