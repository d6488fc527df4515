"""Find out whether a velocity field is a network that whole-trajectory kernels can evaluate."""

from .find import find_plan, hooks_on_all_modules, noted, place_of_notes, undisturbed
from .opened import open_condition
from .plan import Plan
from .refusal import NotFusable

__all__ = [
    "NotFusable",
    "Plan",
    "find_plan",
    "hooks_on_all_modules",
    "noted",
    "open_condition",
    "place_of_notes",
    "undisturbed",
]
