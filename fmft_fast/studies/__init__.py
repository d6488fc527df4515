"""Studies: one file each with a question, cells, a table and figures; `fmft study` runs them."""

from fmft_fast.studies import (
    checkpoint_timing,
    decomposition,
    gav_robustness,
    one_step,
    policy_finetuning,
    policy_noise,
    policy_timing,
    regularisation,
    solvers,
)
from fmft_fast.studies.base import STUDIES, Rows, Settings, Study, find_study, register
from fmft_fast.studies.models import Models, Pretrained, finetune, in_ninths

__all__ = [
    "STUDIES",
    "Models",
    "Pretrained",
    "Rows",
    "Settings",
    "Study",
    "checkpoint_timing",
    "decomposition",
    "find_study",
    "finetune",
    "gav_robustness",
    "in_ninths",
    "one_step",
    "policy_finetuning",
    "policy_noise",
    "policy_timing",
    "register",
    "regularisation",
    "solvers",
]
