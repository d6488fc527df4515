"""What the studies of robustness and regularisation rest on: noise of the said size, pairs seen."""

from __future__ import annotations

import pytest
import torch

from fmft_fast.fields import GAV, MLP, Residual
from fmft_fast.studies import gav_robustness, regularisation
from fmft_fast.studies.models import finetune
from fmft_fast.tasks import find_task
from fmft_fast.train import MLEFineTuner
from fmft_fast.train.batches import stream_seed


def seeded():
    """A generator in a known state."""
    return torch.Generator().manual_seed(3)


def test_starts_are_corrupted_as_much_as_they_should_be():
    x0 = torch.randn(20_000, 2, generator=seeded())
    moved = gav_robustness.corrupted(x0, "gaussian", 0.3, seeded()) - x0
    assert float(moved.std()) == pytest.approx(0.3, rel=0.03)
    salted = gav_robustness.corrupted(x0, "salt-and-pepper", 0.1, seeded())
    assert float((salted != x0).double().mean()) == pytest.approx(0.1, abs=0.005)
    assert set(salted[salted != x0].tolist()) == {-3.0, 3.0}
    assert gav_robustness.corrupted(x0, "input", 0.1, seeded()) is x0


def test_the_steps_are_euler_steps_and_noise_enters_what_the_field_is_given():
    def field(t, x):
        return torch.ones_like(x) * t

    x0, n = torch.zeros(4, 2), gav_robustness.STEPS
    times = torch.arange(n) / n
    torch.testing.assert_close(gav_robustness.end(field, x0), x0 + times.mean())
    noisy = gav_robustness.end(lambda t, x: x, torch.ones(5000, 1), 0.1, seeded())
    factor = 1 + 1 / n
    # Each step adds level eps / n, which the later steps carry on.
    spread = 0.1 / n * sum(factor ** (2 * k) for k in range(n)) ** 0.5
    assert float(noisy.mean()) == pytest.approx(factor**n, rel=1e-3)
    assert float(noisy.std()) == pytest.approx(spread, rel=0.05)


def test_only_a_guaranteed_branch_has_a_certified_rate():
    rate = gav_robustness.certified_rate(Residual(MLP(2), GAV(2, rate=0.5)))
    assert rate == pytest.approx(0.507, abs=0.001)
    free = GAV(2, construction="schur-cayley-free")
    assert gav_robustness.certified_rate(Residual(MLP(2), free)) is None
    assert gav_robustness.certified_rate(MLP(2)) is None


@pytest.mark.parametrize("coupling", ["inversion", "ot-fixed"])
def test_the_pairs_called_trained_are_those_of_the_training(coupling, monkeypatch):
    torch.manual_seed(0)
    options = regularisation.COUPLINGS[coupling]
    task = find_task("digits")
    field, trainers = task.make_field(), []
    begun = MLEFineTuner.run

    def run(self, **keywords):
        trainers.append(self)
        return begun(self, **keywords)

    monkeypatch.setattr(MLEFineTuner, "run", run)
    choice = {"steps": 1, "seed": 4, "coupling": coupling, "coupling_options": options}
    before = {name: p.clone() for name, p in field.state_dict().items()}
    finetune("digits", field, {**choice, "solver_steps": (1,)})
    field.load_state_dict(before)
    random = torch.Generator().manual_seed(stream_seed(4, "coupling"))
    rule = regularisation.make_coupling(coupling, **options)
    rule.fit(task.make_data(4).train, field=field, generator=random)
    own = rule.sample(50, generator=seeded())
    theirs = trainers[0]._coupling.sample(50, generator=seeded())
    assert torch.equal(own.x1, theirs.x1)
    torch.testing.assert_close(own.x0, theirs.x0)
