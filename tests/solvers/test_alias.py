"""The alias of torchdiffeq: only when asked for, complete, and undone without a trace."""

from __future__ import annotations

import subprocess
import sys

import fmft_fast


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_does_not_touch_torchdiffeq() -> None:
    out = run("import sys, fmft_fast; print([m for m in sys.modules if 'torchdiffeq' in m])")
    assert out == "[]"


def test_third_party_code_runs_on_the_alias() -> None:
    code = """
import fmft_fast
fmft_fast.patch_torchdiffeq()
import torch, torchdiffeq
import torchdiffeq._impl.misc
from torchdiffeq import odeint, odeint_adjoint, odeint_event, odeint_dense, __version__
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.adjoint import find_parameters
from torchdiffeq._impl.misc import Perturb, _flat_to_shape
y = torchdiffeq.odeint(lambda t, y: -y, torch.ones(2), torch.linspace(0, 1, 3), method="rk4")
print(odeint is fmft_fast.odeint, "dopri5" in SOLVERS, len(y), __version__)
"""
    assert run(code) == "True True 3 0.2.5"


def test_the_context_manager_restores_what_was_there() -> None:
    before = {name: module for name, module in sys.modules.items() if "torchdiffeq" in name}
    with fmft_fast.patched_torchdiffeq():
        import torchdiffeq

        assert torchdiffeq.odeint is fmft_fast.odeint
        with fmft_fast.patched_torchdiffeq():
            pass
        import torchdiffeq as again

        assert again.odeint is fmft_fast.odeint
    after = {name: module for name, module in sys.modules.items() if "torchdiffeq" in name}
    assert after == before
