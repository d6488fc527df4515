from collections.abc import Sequence

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
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str, /) -> None: ...
