"""A Runge-Kutta method is a table, not code: the coefficients and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

Row = tuple[float, ...]


@dataclass(frozen=True)
class Tableau:
    """Butcher tableau of a Runge-Kutta method with s stages.

    One step from (t, y) with step h evaluates k_i = f(t + c_i h, y + h sum_j a_ij k_j) and returns
    y + h sum_i b_i k_i.

    Attributes:
        name: the name in messages.
        order: order of the solution that is carried on.
        c: [s] nodes.
        a: [s] rows; row i of an explicit method has i entries, of an implicit one s entries.
        b: [s] weights of the solution.
        b_err: [s] weights of the error estimate (b minus those of the embedded solution), or None.
        mid: [s] weights of the solution at t + h/2, from which the quartic dense output is made,
            or None.

    Source: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", chapter II.
    """

    name: str
    order: int
    c: Row
    a: tuple[Row, ...]
    b: Row
    b_err: Row | None = None
    mid: Row | None = None
    # Not a cached_property, whose lock cannot be traced by torch.compile.
    _trimmed: Tableau | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        s = len(self.c)
        assert len(self.a) == s and len(self.b) == s, f"{self.name}: a, b, c differ in length"
        assert self.explicit or all(len(row) == s for row in self.a), f"{self.name}: ragged a"
        for c, row in zip(self.c, self.a, strict=True):
            assert abs(sum(row) - c) < 1e-8, f"{self.name}: row sum {sum(row)} is not node {c}"
        assert abs(sum(self.b) - 1) < 1e-12, f"{self.name}: sum of b is {sum(self.b)}"
        if self.b_err is not None:
            assert len(self.b_err) == s and abs(sum(self.b_err)) < 1e-8, f"{self.name}: b_err"
        if self.mid is not None:
            assert len(self.mid) == s and abs(sum(self.mid) - 0.5) < 1e-8, f"{self.name}: mid"
        if self.fsal:
            trimmed = Tableau(self.name, self.order, self.c[:-1], self.a[:-1], self.b[:-1])
            object.__setattr__(self, "_trimmed", trimmed)

    @property
    def advancing(self) -> Tableau:
        """The same step without the last stage of a FSAL method, which only the error needs."""
        return self._trimmed or self

    @property
    def stages(self) -> int:
        """Number of stages s."""
        return len(self.c)

    @property
    def explicit(self) -> bool:
        """True when stage i needs the stages before it only."""
        return all(len(row) == i for i, row in enumerate(self.a))

    @property
    def fsal(self) -> bool:
        """True when the last stage is the first one of the next step ("first same as last")."""
        return self.explicit and self.c[-1] == 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0

    @cached_property
    def dense(self) -> tuple[Row, ...]:
        """[s, 4] matrix P of the dense output y(t + theta h) = y + h sum_ij k_i P_ij theta^(j+1).

        It is the quartic through both ends and the midpoint with the slopes k_1 and k_s at the
        ends (a cubic through the ends and slopes when the method has no midpoint weights).
        Source: Shampine, "Some practical Runge-Kutta formulas", Math. Comp. 46 (1986).
        """
        rows = []
        for i, b in enumerate(self.b):
            first, last = float(i == 0), float(i == self.stages - 1)
            if self.mid is None:
                quartic = (-2 * first - last + 3 * b, first + last - 2 * b, 0.0)
            else:
                m = self.mid[i]
                quartic = (
                    last - 4 * first - 5 * b + 16 * m,
                    5 * first - 3 * last + 14 * b - 32 * m,
                    2 * (last - first) - 8 * b + 16 * m,
                )
            rows.append((first, *quartic))
        return tuple(rows)
