from collections.abc import Sequence

PARTIALS: int

def rk_combine(
    out: int,
    y: int,
    k: Sequence[int],
    h: float,
    h_device: int,
    h_type: int,
    w: Sequence[float],
    size: int,
    type: int,
    k_type: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def rk_finish(
    out: int,
    ratio: int,
    partials: int,
    y: int,
    k: Sequence[int],
    h: float,
    h_device: int,
    h_type: int,
    b: Sequence[float],
    b_err: Sequence[float],
    rtol: float,
    atol: float,
    size: int,
    type: int,
    k_type: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def dense_eval(
    out: int,
    y: int,
    k: Sequence[int],
    h: float,
    h_device: int,
    h_type: int,
    p: Sequence[Sequence[float]],
    theta: int,
    thetas: int,
    size: int,
    type: int,
    k_type: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def architectures() -> list[str]: ...
def runtime_version() -> int: ...
def device_count() -> int: ...

class Field:
    def __init__(
        self,
        head: Sequence[int],
        layers: Sequence[Sequence[int]],
        terms: Sequence[Sequence[int]],
        skips: Sequence[int],
        skippers: Sequence[int],
        consumers: Sequence[int],
        /,
    ) -> None: ...

class Solve:
    def __init__(
        self,
        addresses: Sequence[Sequence[int]],
        columns: Sequence[int],
        parameter_at: Sequence[int],
        table_at: Sequence[int],
        gradient_size: int,
        a: Sequence[Sequence[float]],
        b: Sequence[float],
        batch: int,
        steps: int,
        /,
    ) -> None: ...

class Control:
    def __init__(
        self,
        bounds: Sequence[float],
        numbers: Sequence[int],
        c: Sequence[float],
        b_err: Sequence[float],
        dense: Sequence[Sequence[float]],
        addresses: Sequence[int],
        /,
    ) -> None: ...

class Pass:
    forward: Pass
    backward: Pass
    adaptive: Pass
    by_row: Pass
    by_row_backward: Pass

def trajectory_shared_memory(device: int, /) -> int: ...
def multiprocessors(device: int, /) -> int: ...
def trajectory_capacity(field: Field, work: Pass, device: int, /) -> int: ...
def trajectory_forward(
    field: Field, solve: Solve, blocks: int, device: int, stream: int, /
) -> None: ...
def trajectory_adaptive(
    field: Field,
    solve: Solve,
    control: Control,
    log: Sequence[int],
    first: int,
    room: int,
    by_row: bool,
    blocks: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def trajectory_backward(
    field: Field, solve: Solve, blocks: int, gradients: int, device: int, stream: int, /
) -> None: ...
