"""Why a field cannot be fused, and where in the user's code that is."""

from __future__ import annotations

import linecache
import os
from dataclasses import dataclass
from types import FrameType

import torch

from ..ops import activations, cayley

TORCH = os.path.dirname(torch.__file__) + os.sep
# The tracer, and files of functions that it sees as one call of torch.
OWN = (os.path.dirname(__file__) + os.sep, activations.__file__, cayley.__file__)
_PYTHON = os.path.dirname(os.__file__) + os.sep
_SITE = os.sep + "site-packages" + os.sep


@dataclass(frozen=True)
class NotFusable:
    """Why a field is not fused.

    Attributes:
        reason: what stands in the way.
        where: "file.py:41: the line", where a line of the field is to blame.
        remedy: what would make it fusable, if anything.
    """

    reason: str
    where: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        lines = [f"not fused: {self.reason}"]
        if self.where:
            lines.append(f"  at {self.where}")
        if self.remedy:
            lines.append(f"  to fuse it: {self.remedy}")
        return "\n".join(lines)


class Refusal(BaseException):
    """Ends a trace. No `except Exception` of the user's may swallow it."""

    def __init__(self, reason: str, where: str | None = None, remedy: str | None = None):
        super().__init__(reason)
        self.result = NotFusable(reason, where, remedy)


def source_line(file: str, line: int) -> str:
    """The name of a file, the number of a line and its text."""
    text = linecache.getline(file, line).strip()
    return f"{os.path.basename(file)}:{line}" + (f": {text}" if text else "")


def is_library(file: str) -> bool:
    """Whether a file is torch's, this package's tracer or activations, or Python's own."""
    return file.startswith((TORCH, *OWN)) or (file.startswith(_PYTHON) and _SITE not in file)


def user_line(frame: FrameType | None) -> str | None:
    """The innermost line of the user's that led to a frame."""
    while frame is not None and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    return source_line(frame.f_code.co_filename, frame.f_lineno) if frame else None
