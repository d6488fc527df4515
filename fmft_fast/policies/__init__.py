"""Flow-matching policies: networks with normalisers that predict sequences of actions."""

from fmft_fast.policies.config import PolicyConfig
from fmft_fast.policies.execution import RecedingHorizon
from fmft_fast.policies.policy import FlowPolicy

__all__ = ["FlowPolicy", "PolicyConfig", "RecedingHorizon"]
