"""Every exception and warning of the package: what was expected, what came, what to do.

Classes that replace an error of torchdiffeq inherit from the type raised there as well, so that
`except AssertionError` in existing code keeps working.
"""

from __future__ import annotations


class FmftError(Exception):
    """Base class of all errors raised by this package."""


class InputError(FmftError, ValueError, AssertionError):
    """An argument has the wrong value, shape or combination."""


class InputTypeError(FmftError, TypeError, AssertionError):
    """An argument has the wrong type or dtype."""


class UnknownMethodError(FmftError, ValueError):
    """The name of a method is not in the registry."""


class MissingBackendError(FmftError, RuntimeError):
    """A kernel backend was asked for by name and cannot run here."""


class MissingDependencyError(FmftError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class StepUnderflowError(FmftError, AssertionError, ArithmeticError):
    """The step size fell below the resolution of the time's dtype."""


class NonFiniteError(FmftError, AssertionError, ArithmeticError):
    """The field or the state became NaN or infinite."""


class MaxStepsError(FmftError, AssertionError, RuntimeError):
    """An adaptive solve needed more steps than allowed."""


class GradientError(FmftError, RuntimeError):
    """The gradient that was asked for would be incomplete or is not defined."""


class CheckpointError(FmftError, RuntimeError):
    """A checkpoint is corrupt, incomplete or belongs to another model."""


class CertificateError(FmftError, ArithmeticError):
    """A guarantee was asked for that does not hold, or that cannot be shown in this precision."""


class ConfigError(FmftError, ValueError):
    """A configuration key or value is not understood."""


class NonFiniteWarning(RuntimeWarning):
    """A fixed-grid solve produced NaN or infinite values."""


class CouplingWarning(UserWarning):
    """A coupling is likely to collapse the model (see `fmft_fast.flow.couplings`)."""


class ConfigWarning(UserWarning):
    """A setting that was given has no effect."""


class CaptureWarning(UserWarning):
    """Work on a GPU could not be recorded as a CUDA graph and runs call by call."""
