"""Every method, each one literal: its tableau and the family of loops that runs it.

Explicit tableaux stand here, implicit ones in `implicit_tableaux`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UnknownMethodError
from .implicit_tableaux import IMPLICIT_TABLEAUX
from .tableau import Tableau

Family = Literal["fixed", "adaptive", "implicit", "adams", "bdf", "scipy"]


@dataclass(frozen=True)
class Method:
    """A named method.

    Attributes:
        family: which loop runs it in `odeint`.
        tableau: its coefficients, for Runge-Kutta methods.
        implicit: for Adams methods, whether the Moulton corrector runs.
        diagonal: for implicit Runge-Kutta methods, whether the stages are solved one by one.
    """

    family: Family
    tableau: Tableau | None = None
    implicit: bool = False
    diagonal: bool = False


EULER = Tableau("euler", 1, c=(0.0,), a=((),), b=(1.0,))

MIDPOINT = Tableau("midpoint", 2, c=(0.0, 1 / 2), a=((), (1 / 2,)), b=(0.0, 1.0))

HEUN2 = Tableau("heun2", 2, c=(0.0, 1.0), a=((), (1.0,)), b=(1 / 2, 1 / 2))

HEUN3 = Tableau(
    "heun3",
    3,
    c=(0.0, 1 / 3, 2 / 3),
    a=((), (1 / 3,), (0.0, 2 / 3)),
    b=(1 / 4, 0.0, 3 / 4),
)

# Kutta's 3/8 rule, as in torchdiffeq: a smaller error constant than the classical weights.
RK4 = Tableau(
    "rk4",
    4,
    c=(0.0, 1 / 3, 2 / 3, 1.0),
    a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
)

# The pair Heun (2) / Euler (1).
ADAPTIVE_HEUN = Tableau(
    "adaptive_heun",
    2,
    c=(0.0, 1.0),
    a=((), (1.0,)),
    b=(1 / 2, 1 / 2),
    b_err=(1 / 2, -1 / 2),
    mid=(1 / 2, 0.0),
)

# Fehlberg (1969), RK1(2).
FEHLBERG2 = Tableau(
    "fehlberg2",
    2,
    c=(0.0, 1 / 2, 1.0),
    a=((), (1 / 2,), (1 / 256, 255 / 256)),
    b=(1 / 512, 255 / 256, 1 / 512),
    b_err=(-1 / 512, 0.0, 1 / 512),
    mid=(0.0, 1 / 2, 0.0),
)

# Bogacki and Shampine (1989).
BOSH3 = Tableau(
    "bosh3",
    3,
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0.0),
    b_err=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    mid=(0.0, 1 / 2, 0.0, 0.0),
)

# Dormand and Prince (1980), error weights and midpoint of Shampine (1986).
_DOPRI5_B = (
    35 / 384,
    0.0,
    500 / 1113,
    125 / 192,
    -2187 / 6784,
    11 / 84,
)
DOPRI5 = Tableau(
    "dopri5",
    5,
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _DOPRI5_B,
    ),
    b=(*_DOPRI5_B, 0.0),
    b_err=(
        35 / 384 - 1951 / 21600,
        0.0,
        500 / 1113 - 22642 / 50085,
        125 / 192 - 451 / 720,
        -2187 / 6784 + 12231 / 42400,
        11 / 84 - 649 / 6300,
        -1 / 60,
    ),
    mid=(
        6025192743 / 60171106304,
        0.0,
        51252292925 / 130801643196,
        -2691868925 / 90256659456,
        187940372067 / 3189068634112,
        -1776094331 / 39487288512,
        11237099 / 470086768,
    ),
)

# Tsitouras (2011). The solution that is carried on is the fifth-order one, whose weights are the
# last row of a; torchdiffeq carries the embedded fourth-order solution instead.
_TSIT5_B = (
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
)
TSIT5 = Tableau(
    "tsit5",
    5,
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (
            5.86145544294642,
            -12.92096931784711,
            8.159367898576159,
            -0.071584973281401,
            -0.028269050394068383,
        ),
        _TSIT5_B,
    ),
    b=(*_TSIT5_B, 0.0),
    b_err=(
        0.0017800110522257714,
        0.0008164344596567469,
        -0.007880878010261995,
        0.1447110071732629,
        -0.5823571654525552,
        0.45808210592918697,
        -1 / 66,
    ),
    mid=(
        0.10741235230100377,
        0.01135625,
        0.39560903056045305,
        -0.34475214352593553,
        1.3161853649581645,
        -1.0170608542936508,
        0.03125,
    ),
)

# Prince and Dormand (1981), RK8(7)13M with a FSAL stage and a sixth-order midpoint.
_DOPRI8_B = (
    14005451 / 335480064,
    0.0,
    0.0,
    0.0,
    0.0,
    -59238493 / 1068277825,
    181606767 / 758867731,
    561292985 / 797845732,
    -1041891430 / 1371343529,
    760417239 / 1151165299,
    118820643 / 751138087,
    -528747749 / 2220607170,
    1 / 4,
)
DOPRI8 = Tableau(
    "dopri8",
    8,
    c=(
        0.0,
        1 / 18,
        1 / 12,
        1 / 8,
        5 / 16,
        3 / 8,
        59 / 400,
        93 / 200,
        5490023248 / 9719169821,
        13 / 20,
        1201146811 / 1299019798,
        1.0,
        1.0,
        1.0,
    ),
    a=(
        (),
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0.0, 3 / 32),
        (5 / 16, 0.0, -75 / 64, 75 / 64),
        (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
        (
            29443841 / 614563906,
            0.0,
            0.0,
            77736538 / 692538347,
            -28693883 / 1125000000,
            23124283 / 1800000000,
        ),
        (
            16016141 / 946692911,
            0.0,
            0.0,
            61564180 / 158732637,
            22789713 / 633445777,
            545815736 / 2771057229,
            -180193667 / 1043307555,
        ),
        (
            39632708 / 573591083,
            0.0,
            0.0,
            -433636366 / 683701615,
            -421739975 / 2616292301,
            100302831 / 723423059,
            790204164 / 839813087,
            800635310 / 3783071287,
        ),
        (
            246121993 / 1340847787,
            0.0,
            0.0,
            -37695042795 / 15268766246,
            -309121744 / 1061227803,
            -12992083 / 490766935,
            6005943493 / 2108947869,
            393006217 / 1396673457,
            123872331 / 1001029789,
        ),
        (
            -1028468189 / 846180014,
            0.0,
            0.0,
            8478235783 / 508512852,
            1311729495 / 1432422823,
            -10304129995 / 1701304382,
            -48777925059 / 3047939560,
            15336726248 / 1032824649,
            -45442868181 / 3398467696,
            3065993473 / 597172653,
        ),
        (
            185892177 / 718116043,
            0.0,
            0.0,
            -3185094517 / 667107341,
            -477755414 / 1098053517,
            -703635378 / 230739211,
            5731566787 / 1027545527,
            5232866602 / 850066563,
            -4093664535 / 808688257,
            3962137247 / 1805957418,
            65686358 / 487910083,
        ),
        (
            403863854 / 491063109,
            0.0,
            0.0,
            -5068492393 / 434740067,
            -411421997 / 543043805,
            652783627 / 914296604,
            11173962825 / 925320556,
            -13158990841 / 6184727034,
            3936647629 / 1978049680,
            -160528059 / 685178525,
            248638103 / 1413531060,
            0.0,
        ),
        _DOPRI8_B,
    ),
    b=(*_DOPRI8_B, 0.0),
    b_err=(
        14005451 / 335480064 - 13451932 / 455176623,
        0.0,
        0.0,
        0.0,
        0.0,
        -59238493 / 1068277825 + 808719846 / 976000145,
        181606767 / 758867731 - 1757004468 / 5645159321,
        561292985 / 797845732 - 656045339 / 265891186,
        -1041891430 / 1371343529 + 3867574721 / 1518517206,
        760417239 / 1151165299 - 465885868 / 322736535,
        118820643 / 751138087 - 53011238 / 667516719,
        -528747749 / 2220607170 - 2 / 45,
        1 / 4,
        0.0,
    ),
    mid=(
        0.04103130360739393,
        0.0,
        0.0,
        0.0,
        0.0,
        0.05100562801991382,
        0.2388930677412202,
        0.3096870143996103,
        -0.2172325471755352,
        0.07833405679331928,
        -0.0018614369715579948,
        0.007072844202678841,
        0.00690847373200576,
        -0.013838404349047373,
    ),
)

METHODS: dict[str, Method] = {
    "dopri8": Method("adaptive", DOPRI8),
    "dopri5": Method("adaptive", DOPRI5),
    "tsit5": Method("adaptive", TSIT5),
    "bosh3": Method("adaptive", BOSH3),
    "fehlberg2": Method("adaptive", FEHLBERG2),
    "adaptive_heun": Method("adaptive", ADAPTIVE_HEUN),
    "euler": Method("fixed", EULER),
    "midpoint": Method("fixed", MIDPOINT),
    "heun2": Method("fixed", HEUN2),
    "heun3": Method("fixed", HEUN3),
    "rk4": Method("fixed", RK4),
    "explicit_adams": Method("adams"),
    "implicit_adams": Method("adams", implicit=True),
    "fixed_adams": Method("adams", implicit=True),
    "implicit_euler": Method("implicit", IMPLICIT_TABLEAUX["implicit_euler"]),
    "implicit_midpoint": Method("implicit", IMPLICIT_TABLEAUX["implicit_midpoint"]),
    "trapezoid": Method("implicit", IMPLICIT_TABLEAUX["trapezoid"]),
    "radauIIA3": Method("implicit", IMPLICIT_TABLEAUX["radauIIA3"]),
    "gl4": Method("implicit", IMPLICIT_TABLEAUX["gl4"]),
    "radauIIA5": Method("implicit", IMPLICIT_TABLEAUX["radauIIA5"]),
    "gl6": Method("implicit", IMPLICIT_TABLEAUX["gl6"]),
    "sdirk2": Method("implicit", IMPLICIT_TABLEAUX["sdirk2"], diagonal=True),
    "trbdf2": Method("implicit", IMPLICIT_TABLEAUX["trbdf2"], diagonal=True),
    "bdf2": Method("bdf"),
    "scipy_solver": Method("scipy"),
}


def find_method(name: str) -> Method:
    """Look a method up by name.

    Raises:
        UnknownMethodError: no such method; the message lists the known ones.
    """
    try:
        return METHODS[name]
    except (KeyError, TypeError):
        known = ", ".join(METHODS)
        raise UnknownMethodError(
            f'Invalid method "{name}": expected one of {{{known}}}. method=None chooses dopri5.'
        ) from None
