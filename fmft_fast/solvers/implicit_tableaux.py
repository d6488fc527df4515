"""The place for the implicit fixed-grid Runge-Kutta methods: each one a literal.

Row i of `a` has an entry for every stage; a row of zeros with c = 0 is the slope at the start of
the step, which costs nothing. Source: Hairer, Wanner, "Solving Ordinary Differential Equations II",
sections IV.5 and IV.6 (Gauss, Radau IIA, SDIRK); Bank et al. 1985 (TR-BDF2).
"""

from __future__ import annotations

from math import sqrt

from .tableau import Tableau

_S2, _S3, _S6, _S15 = sqrt(2), sqrt(3), sqrt(6), sqrt(15)
_GAMMA = 1 - _S2 / 2
_TR_WEIGHT = _S2 / 4

_TABLEAUX = (
    Tableau(name="implicit_euler", order=1, c=(1.0,), a=((1.0,),), b=(1.0,)),
    Tableau(name="implicit_midpoint", order=2, c=(0.5,), a=((0.5,),), b=(1.0,)),
    Tableau(name="trapezoid", order=2, c=(0.0, 1.0), a=((0.0, 0.0), (0.5, 0.5)), b=(0.5, 0.5)),
    Tableau(
        name="radauIIA3",
        order=3,
        c=(1 / 3, 1.0),
        a=((5 / 12, -1 / 12), (3 / 4, 1 / 4)),
        b=(3 / 4, 1 / 4),
    ),
    # torchdiffeq writes c = 1/2 - sqrt(3)/6 for both stages, which drops the order to 1 for fields
    # that depend on time. The nodes of the Gauss method lie on both sides of the middle.
    Tableau(
        name="gl4",
        order=4,
        c=(1 / 2 - _S3 / 6, 1 / 2 + _S3 / 6),
        a=((1 / 4, 1 / 4 - _S3 / 6), (1 / 4 + _S3 / 6, 1 / 4)),
        b=(1 / 2, 1 / 2),
    ),
    Tableau(
        name="radauIIA5",
        order=5,
        c=(2 / 5 - _S6 / 10, 2 / 5 + _S6 / 10, 1.0),
        a=(
            (11 / 45 - 7 * _S6 / 360, 37 / 225 - 169 * _S6 / 1800, -2 / 225 + _S6 / 75),
            (37 / 225 + 169 * _S6 / 1800, 11 / 45 + 7 * _S6 / 360, -2 / 225 - _S6 / 75),
            (4 / 9 - _S6 / 36, 4 / 9 + _S6 / 36, 1 / 9),
        ),
        b=(4 / 9 - _S6 / 36, 4 / 9 + _S6 / 36, 1 / 9),
    ),
    Tableau(
        name="gl6",
        order=6,
        c=(1 / 2 - _S15 / 10, 1 / 2, 1 / 2 + _S15 / 10),
        a=(
            (5 / 36, 2 / 9 - _S15 / 15, 5 / 36 - _S15 / 30),
            (5 / 36 + _S15 / 24, 2 / 9, 5 / 36 - _S15 / 24),
            (5 / 36 + _S15 / 30, 2 / 9 + _S15 / 15, 5 / 36),
        ),
        b=(5 / 18, 4 / 9, 5 / 18),
    ),
    Tableau(
        name="sdirk2",
        order=2,
        c=(_GAMMA, 1.0),
        a=((_GAMMA, 0.0), (1 - _GAMMA, _GAMMA)),
        b=(1 - _GAMMA, _GAMMA),
    ),
    Tableau(
        name="trbdf2",
        order=2,
        c=(0.0, 2 * _GAMMA, 1.0),
        a=((0.0, 0.0, 0.0), (_GAMMA, _GAMMA, 0.0), (_TR_WEIGHT, _TR_WEIGHT, _GAMMA)),
        b=(_TR_WEIGHT, _TR_WEIGHT, _GAMMA),
    ),
)

IMPLICIT_TABLEAUX: dict[str, Tableau] = {tableau.name: tableau for tableau in _TABLEAUX}
