"""Training: settings, the one loop, trainers, monitors and checkpoints."""

from fmft_fast.train.batches import LoaderBatches, LoaderPairs, PairBatches
from fmft_fast.train.branch import load_model
from fmft_fast.train.checkpoint import Checkpoint, load_checkpoint, load_weights, save_checkpoint
from fmft_fast.train.config import FinetuneConfig, FitConfig, PretrainConfig
from fmft_fast.train.finetune import FlowMatchingTrainer, MLEFineTuner
from fmft_fast.train.logging import read_metrics
from fmft_fast.train.loop import FitResult, fit
from fmft_fast.train.monitors import (
    Cancellation,
    CurvatureGrowth,
    Finding,
    Monitor,
    OverfittingSpike,
    VarianceCollapse,
)

__all__ = [
    "Cancellation",
    "Checkpoint",
    "CurvatureGrowth",
    "Finding",
    "FinetuneConfig",
    "FitConfig",
    "FitResult",
    "FlowMatchingTrainer",
    "LoaderBatches",
    "LoaderPairs",
    "MLEFineTuner",
    "Monitor",
    "OverfittingSpike",
    "PairBatches",
    "PretrainConfig",
    "VarianceCollapse",
    "fit",
    "load_checkpoint",
    "load_model",
    "load_weights",
    "read_metrics",
    "save_checkpoint",
]
