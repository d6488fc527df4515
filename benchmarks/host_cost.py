"""Host time of a training step outside of the solve: python -m benchmarks.host_cost."""

from __future__ import annotations

import argparse

import torch

from fmft_fast.fields import MLP
from fmft_fast.train import FinetuneConfig, MLEFineTuner
from fmft_fast.train.host_cost import HostCost, host_cost


def measure(device: str, ema_decay: float | None, cuda_graph: bool | str) -> HostCost:
    """The least of five measurements: a small MLP, batch 256, 10 Euler steps."""
    x1 = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    config = FinetuneConfig(device=device, ema_decay=ema_decay, cuda_graph=cuda_graph)
    found = []
    for _ in range(5):
        torch.manual_seed(0)
        found.append(host_cost(MLEFineTuner(MLP(2), x1, config=config, progress=False)))
    return min(found, key=lambda cost: cost.outside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    device = parser.parse_args().device
    for ema_decay in (None, 0.99):
        for graph in ("auto", False):
            cost = measure(device, ema_decay, graph)
            print(
                f"ema_decay = {ema_decay}, cuda_graph = {graph}: {cost.outside:.0f} us per step "
                f"outside of loss and gradient, {cost.inside:.0f} us inside"
            )


if __name__ == "__main__":
    main()
