"""The training step: its update against torch's own, and recorded by a double without a GPU."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings

import pytest
import torch
from solvers.recording import Double
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from train import tiny_run

from fmft_fast import fused
from fmft_fast.errors import CaptureWarning, ConfigError, NonFiniteError
from fmft_fast.fields import MLP
from fmft_fast.flow.couplings import Independent, OTFixed, OTMinibatch
from fmft_fast.solvers.recorder import CaptureError, graphs_allowed
from fmft_fast.train import FinetuneConfig, FitConfig, MLEFineTuner, PairBatches, fit
from fmft_fast.train import step as step_module
from fmft_fast.train.host_cost import host_cost
from fmft_fast.train.optim import Average, average_decay, gradient_norm, make_optimizer

CPU = torch.device("cpu")
CONFIG = FinetuneConfig(
    steps=20,
    solver_steps=(2, 3),
    method="midpoint",
    ema_decay=0.9,
    warmup=3,
    lr=1e-2,
    fm_weight=0.1,
    batch_size=16,
    log_every=4,
    eval_every=8,
    checkpoint_every=7,
    device="cpu",
    coupling="ot-fixed",
)


class Field(nn.Module):
    """A field that no whole-trajectory kernel takes."""

    dim = 2

    def __init__(self):
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(2, 8), nn.Linear(8, 2), nn.Linear(1, 1)

    def forward(self, t, x):
        return self.last(torch.sin(self.first(x) + t.reshape(-1, 1)))


@pytest.fixture
def double(monkeypatch):
    """The training step is recorded by a double."""
    double = Double()
    find = lambda _: double if graphs_allowed() else None  # noqa: E731
    monkeypatch.setattr(step_module, "find_recorder", find)
    return double


def make(field=None, out=None, **changes):
    torch.manual_seed(0)
    x1 = torch.randn(200, 2)
    config = dataclasses.replace(CONFIG, **changes)
    return MLEFineTuner(field or Field(), x1, config=config, out=out, progress=False)


def weights(result):
    return list(result.model.state_dict().values())


def test_the_update_is_that_of_torch_bit_for_bit():
    config = FitConfig(lr=0.01, weight_decay=0.1, ema_decay=0.9, grad_clip=0.5)
    ours = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    theirs = copy.deepcopy(ours)
    mine = make_optimizer(list(ours.parameters()), config)
    other = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    average = Average(ours, 0.9)
    step = 0

    def move(averaged, current, count):
        get_ema_multi_avg_fn(average_decay(step, 0.9))(averaged, current, count)

    reference = AveragedModel(theirs, multi_avg_fn=move)
    for step in range(6):
        x = torch.randn(7, 3)
        for model in (ours, theirs):
            model.zero_grad()
            model(x).square().sum().backward()
        mine.set_rate(0.01 / (1 + step))
        other.param_groups[0]["lr"] = 0.01 / (1 + step)
        if step == 3:  # a parameter without a gradient rests
            ours[2].bias.grad = theirs[2].bias.grad = None
        norm = gradient_norm([p.grad for p in ours.parameters() if p.grad is not None], 0.5)
        assert norm == torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        mine.advance()
        other.step()
        average.set_rate(step)
        average.update()
        average.count += 1
        reference.update_parameters(theirs)
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        found, want = average.module.state_dict(), reference.module.state_dict()
        assert all(torch.equal(found[name], want[name]) for name in want)
    for a, b in zip(mine.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_clipping_takes_parameters_of_several_dtypes():
    grads = [torch.full((3,), 3.0), torch.full((2,), 4.0, dtype=torch.float64)]
    want = torch.nn.utils.get_total_norm(grads)
    assert gradient_norm(grads, 1.0) == want
    assert torch.nn.utils.get_total_norm(grads) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("on_device", [False, True])
def test_an_optimizer_goes_on_from_what_torch_saved(on_device):
    layer = nn.Linear(2, 2)
    old = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    torch.optim.lr_scheduler.LambdaLR(old, lambda step: 1.0)
    layer(torch.ones(1, 2)).sum().backward()
    old.step()
    saved = copy.deepcopy(old.state_dict())
    twin = copy.deepcopy(layer)
    new = make_optimizer(list(twin.parameters()), FitConfig(lr=0.1), rate_on_device=on_device)
    new.restore(saved)
    for model, go in (
        (layer, old.step),
        (twin, new.advance),
        (layer, old.step),
        (twin, new.advance),
    ):
        model.zero_grad()
        model(torch.ones(1, 2)).square().sum().backward()
        go()
    for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    state = new.describe(0.1)
    assert state["param_groups"][0]["lr"] == 0.1
    assert not state["param_groups"][0]["capturable"]


@pytest.mark.parametrize("coupling", ["ot-fixed", "ot-minibatch"])
def test_recorded_runs_are_like_usual_ones(double, coupling):
    recorded = make(coupling=coupling).run()
    assert double.records == 2  # one for each number of solver steps
    assert double.replays == 2 + 20 - 2 * (step_module.USUAL_STEPS + 1)
    usual = make(coupling=coupling, cuda_graph=False).run()
    for a, b in zip(weights(recorded), weights(usual), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(recorded.history, usual.history, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


RESIDUALS = [
    {"mode": "residual"},
    {"mode": "residual", "joint": True, "anchor_weight": 0.1},
    {"mode": "residual-mlp", "weight_decay": 0.1},
]


@pytest.mark.parametrize("settings", RESIDUALS, ids=lambda s: "-".join(map(str, s.values())))
def test_residuals_are_recorded_like_any_field(double, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        recorded = make(**settings).run()
    assert double.records == 2 and double.replays > 10
    usual = make(cuda_graph=False, **settings).run()
    for a, b in zip(weights(recorded), weights(usual), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", RESIDUALS, ids=lambda s: "-".join(map(str, s.values())))
def test_on_a_gpu_residuals_are_recorded_like_any_field(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        recorded = make(device="cuda", steps=40, cuda_graph=True, **settings).run()
    usual = make(device="cuda", steps=40, cuda_graph=False, **settings).run()
    for a, b in zip(weights(recorded), weights(usual), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_recorded_run_goes_on_bit_for_bit(double, tmp_path):
    whole = make().run()
    make(out=tmp_path, steps=14, schedule="constant").run()
    constant = make(schedule="constant").run()
    resumed = make(out=tmp_path, schedule="constant").run(resume=True)
    assert all(map(torch.equal, weights(constant), weights(resumed)))
    assert not all(map(torch.equal, weights(constant), weights(whole)))


def test_a_usual_run_goes_on_recorded_and_back(double, tmp_path):
    settings = {"schedule": "constant"}
    whole = make(**settings).run()
    make(out=tmp_path, steps=7, cuda_graph=False, **settings).run()
    make(out=tmp_path, steps=14, **settings).run(resume=True)
    resumed = make(out=tmp_path, cuda_graph=False, **settings).run(resume=True)
    for a, b in zip(weights(whole), weights(resumed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_replays_do_not_overwrite_the_losses_of_earlier_steps(double):
    step = make_step(double)
    kept = [step(n) for n in range(12)]
    values = [(float(a), float(b)) for a, b in kept]
    for n in range(12, 16):
        step(n)
    assert values == [(float(a), float(b)) for a, b in kept] and len(set(values)) == 12


def make_step(double, field=None, loss=None, **changes):
    trainer = make(field, solver_steps=(2,), **changes)
    random = torch.Generator().manual_seed(0)
    step = step_module.TrainStep(
        trainer._field,
        trainer._batches,
        loss or trainer._loss,
        trainer.config,
        CPU,
        random,
        trainer._choose,
    )
    trainer._field.train()
    return step


def test_draws_are_inside_where_they_need_no_word_from_the_host(double):
    step = make_step(double)
    for n in range(5):
        step(n)
    assert step.draws_inside and double.generators == [step.random, *step.batches.generators]
    step = make_step(double, coupling="ot-minibatch")
    for n in range(5):
        step(n)
    assert not step.draws_inside and double.generators == [step.random]
    x1 = torch.randn(20, 2)
    for coupling, inside in ((Independent(), True), (OTFixed(), True), (OTMinibatch(), False)):
        source = PairBatches(coupling.fit(x1), batch_size=4, device=CPU, seed=0)
        assert (source.generators is not None) == inside


def test_batches_of_another_size_have_a_recording_of_their_own(double):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = tiny_run.train(model=nn.Linear(3, 1), config=tiny_run.CONFIG)  # 6 x 8 and 2 rows
    assert double.records == 2 and result.step == tiny_run.CONFIG.steps


def test_dropout_and_hooks_are_told_and_trained_as_usual(double):
    with pytest.warns(CaptureWarning, match="draws random numbers other than"):
        result = tiny_run.train()
    usual = tiny_run.train(config=dataclasses.replace(tiny_run.CONFIG, cuda_graph=False))
    assert double.records == 0
    for a, b in zip(weights(result), weights(usual), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    field = Field()
    field.last.register_forward_hook(lambda *_: None)
    with pytest.warns(CaptureWarning, match="hooks"):
        make(field).run()
    assert double.records == 0


@pytest.mark.parametrize("waits_in", [{0}, {1}])
def test_only_the_first_step_of_a_kind_may_wait(double, monkeypatch, waits_in):
    steps = iter(range(100))

    @contextlib.contextmanager
    def watch(device):
        yield ["called a synchronizing CUDA operation"] if next(steps) in waits_in else []

    monkeypatch.setattr(step_module, "watch_waits", watch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CaptureWarning)
        make(solver_steps=(2,), coupling="ot-fixed").run()
    told = [w for w in caught if "waits for the device" in str(w.message)]
    assert len(told) == (waits_in == {1}) and (double.records > 0) == (not told)


def test_a_failed_recording_loses_no_step(double):
    double.reason = "a wait"
    with pytest.warns(CaptureWarning, match="a wait.*cuda_graph = false"):
        failed = make().run()
    double.reason = None
    usual = make(cuda_graph=False).run()
    for a, b in zip(weights(failed), weights(usual), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_wrong_replay_is_found_and_undone(double, monkeypatch):
    record = double.record

    def spoiled(work, generators=(), *, rehearse=True):
        recorded = record(work, generators, rehearse=rehearse)
        replay = recorded.replay

        def wrong():
            replay()
            with torch.no_grad():
                field.last.bias.add_(0.1)

        recorded.replay = wrong
        return recorded

    monkeypatch.setattr(double, "record", spoiled)
    trainer = make()
    field = trainer._field
    with pytest.warns(CaptureWarning, match="differs from a usual one"):
        got = trainer.run()
    usual = make(cuda_graph=False).run()
    for a, b in zip(weights(got), weights(usual), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_model_that_an_evaluation_changes_is_recorded_anew(double):
    field, changed = Field(), []

    def evaluate(model):
        if len(changed) < 3:
            field.mark = len(changed)
            changed.append(1)
        return {}

    trainer = make(field, solver_steps=(2,))
    trainer._evaluate = evaluate
    trainer.run()
    assert double.records == 3


def test_a_loss_that_is_not_finite_is_found_in_a_replay(double):
    trainer = make(Field(), solver_steps=(2,), lr=1e30, grad_clip=None, warmup=0, eval_every=100)
    with pytest.raises(NonFiniteError, match="became NaN or infinite at step"):
        trainer.run()


def test_the_switch(monkeypatch):
    with pytest.raises(ConfigError, match="cuda_graph: expected auto or false on cpu"):
        make(cuda_graph=True).run()
    assert FitConfig.from_dict({"cuda_graph": "auto"}).cuda_graph == "auto"
    assert FitConfig(cuda_graph=False).cuda_graph is False
    with pytest.raises(ConfigError, match="expected one of auto, true, false, got 'atuo'"):
        FitConfig(cuda_graph="atuo")
    for wrong in (1, None):
        with pytest.raises(ConfigError, match="cuda_graph"):
            FitConfig(cuda_graph=wrong)


def test_the_cost_of_the_host_is_measured_in_and_outside_of_the_loss(double):
    cost = host_cost(make(cuda_graph=False), steps=5, warm_up=1)
    assert cost.inside > cost.outside > 0
    replayed = host_cost(make(solver_steps=(2,)), steps=5, warm_up=5)
    assert replayed.outside > 0 and double.replays > 0


def test_errors_of_recording_carry_a_reason():
    assert CaptureError("why", (1, 2)).args == ("why", (1, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("coupling", ["ot-fixed", "ot-semidiscrete", "ot-minibatch"])
def test_on_a_gpu_recorded_runs_are_like_usual_ones(coupling):
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        recorded = make(coupling=coupling, device="cuda", steps=40, cuda_graph=True).run()
    usual = make(coupling=coupling, device="cuda", steps=40, cuda_graph=False).run()
    for a, b in zip(weights(recorded), weights(usual), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_steps_with_solves_in_one_call_are_recorded():
    field = MLP(2, (16, 16))
    with warnings.catch_warnings(), fused("require"):
        warnings.simplefilter("error", CaptureWarning)
        recorded = make(copy.deepcopy(field), device="cuda", steps=40, cuda_graph=True).run()
    usual = make(copy.deepcopy(field), device="cuda", steps=40, cuda_graph=False).run()
    for a, b in zip(weights(recorded), weights(usual), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_a_recorded_run_goes_on_bit_for_bit(tmp_path):
    settings = {"device": "cuda", "schedule": "constant", "cuda_graph": True}
    whole = make(**settings).run()
    make(out=tmp_path, steps=14, **settings).run()
    resumed = make(out=tmp_path, **settings).run(resume=True)
    assert all(map(torch.equal, weights(whole), weights(resumed)))


def test_fit_passes_on_what_the_host_chooses():
    seen = []

    def loss(model, batch, random, choice):
        seen.append(choice)
        return model(batch[0]).square().mean()

    choices = iter(range(3))
    source = tiny_run.LoaderBatches(tiny_run.make_loader(), seed=0)
    config = FitConfig(steps=3, device="cpu")
    fit(nn.Linear(3, 1), source, loss, config=config, progress=False, choose=lambda: next(choices))
    assert seen == [0, 1, 2]
