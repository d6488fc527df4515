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
