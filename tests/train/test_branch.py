"""Residual fine-tuning: what is trained, how it is measured, and how it comes back from disk."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json

import pytest
import torch
import toys
from torch import nn

from fmft_fast import fused
from fmft_fast.errors import CheckpointError, ConfigError, InputError
from fmft_fast.fields import GAV, MLP, Residual
from fmft_fast.train import (
    Cancellation,
    FinetuneConfig,
    MLEFineTuner,
    load_checkpoint,
    load_model,
    load_weights,
    save_checkpoint,
)
from fmft_fast.train.monitors import interplay

QUICK = FinetuneConfig(
    steps=10,
    eval_every=5,
    checkpoint_every=5,
    batch_size=32,
    lr=5e-3,
    device="cpu",
    coupling_options={"size": 128},
    solver_steps=(2,),
)
MODES = ("residual", "residual-mlp")


@pytest.fixture(scope="module")
def field():
    return toys.pretrained()


def make(field, data=None, *, mode=None, out=None, evaluate=None, **settings):
    config = dataclasses.replace(QUICK, **settings)
    return MLEFineTuner(
        copy.deepcopy(field),
        toys.two_modes(400) if data is None else data,
        config=config,
        mode=mode,
        out=out,
        evaluate=evaluate,
        progress=False,
    )


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("joint", [False, True])
def test_the_base_is_bitwise_untouched_unless_joint(field, mode, joint):
    result = make(
        field,
        mode=mode,
        joint=joint,
        weight_decay=0.1,
        ema_decay=0.9,
        fm_weight=0.1,
        select="last",
    ).run()
    model = result.model
    assert isinstance(model, Residual) and model.joint is joint
    assert same(model.base, field) is not joint
    assert {p.requires_grad for p in model.base.parameters()} == {joint}


def test_direct_trains_the_field_itself_and_measures_no_branch(field):
    result = make(field, mode="direct").run()
    assert type(result.model) is MLP and not same(result.model, field)
    assert "cancelled" not in result.history[-1]


def test_the_keyword_lies_over_the_configuration(field):
    assert make(field, mode="residual-mlp").config.mode == "residual-mlp"
    tuner = make(field, mode="residual", joint=True)
    assert tuner.config.joint and isinstance(tuner._field, Residual)
    configured = dataclasses.replace(QUICK, mode="residual")
    again = MLEFineTuner(
        copy.deepcopy(field), toys.two_modes(400), config=configured, progress=False
    )
    assert isinstance(again._field, Residual) and isinstance(again._field.branch, GAV)
    assert isinstance(make(field, mode="residual-mlp")._field.branch, MLP)


def test_the_mlp_begins_at_the_pretrained_behaviour_and_the_gav_near_it(field):
    direct, mlp, gav = (make(field, mode=m).run().history[0] for m in ("direct", *MODES[::-1]))
    assert mlp["heldout"] == direct["heldout"] and mlp["delta_size"] == 0.0
    assert 0 < gav["delta_size"] < 0.05
    assert gav["heldout"] == pytest.approx(direct["heldout"], rel=0.02)


@pytest.mark.parametrize(("mode", "joint"), [("residual-mlp", False), ("residual", True)])
def test_few_step_samples_improve(field, mode, joint):
    settings = {"steps": 300, "eval_every": 50, "lr": 5e-3, "batch_size": 128}
    pairs = {"coupling_options": {"size": 512}}
    result = make(field, toys.two_modes(), mode=mode, joint=joint, **pairs, **settings).run()
    first, last = result.history[0]["heldout"], result.metrics["heldout"]
    assert last < 0.75 * first and result.findings == ()


def test_the_same_seed_gives_the_same_branch_and_the_global_stream_is_left_alone(field):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = make(field, mode="residual")._field
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert same(first, make(field, mode="residual")._field)
    assert not same(first, make(field, mode="residual", seed=1)._field)


SETTINGS = [
    {"mode": "residual"},
    {"mode": "residual", "joint": True, "anchor_weight": 0.1, "ema_decay": 0.9},
    {"mode": "residual", "dtype": "float64", "residual_options": {"construction": "lmi"}},
    {"mode": "residual-mlp", "ema_decay": 0.9, "weight_decay": 0.1},
    {"mode": "residual-mlp", "residual_options": {"hidden": 8, "velocity": False}},
    {"mode": "direct", "anchor_weight": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_every_mode_resumes_bit_for_bit_and_is_loaded_again(field, tmp_path, settings):
    class Stop(Exception):
        pass

    calls = itertools.count()

    def stop(model):
        if next(calls) == 1:
            raise Stop
        return {}

    def measure(model):
        return {}

    whole = make(field, out=tmp_path / "whole", evaluate=measure, **settings).run()
    with pytest.raises(Stop):
        make(field, out=tmp_path / "cut", evaluate=stop, **settings).run()
    resumed = make(field, out=tmp_path / "cut", evaluate=measure, **settings).run(resume=True)
    assert same(whole.model, resumed.model)
    dtype = getattr(torch, settings.get("dtype", "float32"))
    untrained = MLP(1, hidden=(32, 32), activation="silu").to(dtype)
    loaded = load_model(untrained, tmp_path / "cut")
    assert type(loaded) is type(whole.model) and same(loaded, whole.model)
    for a, b in zip(loaded.parameters(), whole.model.parameters(), strict=True):
        assert (a.requires_grad, a.dtype) == (b.requires_grad, b.dtype)
    load_weights(make(field, **settings)._field, tmp_path / "cut")


def test_a_resume_in_another_mode_is_refused_by_name(field, tmp_path):
    make(field, mode="residual", out=tmp_path).run()
    with pytest.raises(CheckpointError, match="mode was 'residual', now 'direct'"):
        make(field, mode="direct", out=tmp_path).run(resume=True)
    options = {"residual_options": {"width": 4}}
    with pytest.raises(CheckpointError, match=r"residual_options was {}, now {'width': 4}"):
        make(field, mode="residual", out=tmp_path, **options).run(resume=True)


def test_a_residual_can_be_tuned_further_or_have_another_beside_it(field, tmp_path):
    make(field, mode="residual", out=tmp_path / "one").run()
    first = load_model(MLP(1, hidden=(32, 32), activation="silu"), tmp_path / "one")
    further = make(first, mode="direct", select="last", out=tmp_path / "two").run().model
    assert isinstance(further, Residual) and same(further.base, field)
    assert not same(further.branch, first.branch), "direct trains what is free in a residual"
    make(first, mode="residual-mlp", out=tmp_path / "three").run()
    twice = load_model(MLP(1, hidden=(32, 32), activation="silu"), tmp_path / "three")
    assert isinstance(twice, Residual) and isinstance(twice.branch, MLP)
    assert same(twice.base, first)
    again = load_model(first, tmp_path / "three")
    assert same(again, twice), "a field that has the inner branch already gets the outer one"
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_model(twice, tmp_path / "one")


def test_loading_into_the_wrong_thing_says_what_to_do(field, tmp_path):
    make(field, mode="residual", out=tmp_path).run()
    with pytest.raises(CheckpointError, match="got float32.*give its field to load_model"):
        load_weights(copy.deepcopy(field), tmp_path)
    with pytest.raises(CheckpointError, match="base.linears.0.weight: expected float32"):
        load_model(MLP(1, hidden=(8,)), tmp_path)
    file = tmp_path / "checkpoints" / "final" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="model.safetensors is corrupt.*take another"):
        load_model(copy.deepcopy(field), tmp_path)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (None, "built by hand.*load_weights"),
        ({"mode": "best"}, "expected the recipe of a branch, got {'mode': 'best'}"),
        ({"mode": "residual", "state": [1], "cond_dim": 0, "options": {"wide": 3}}, "got 'wide'"),
        ("text", "expected the recipe of a branch, got 'text'"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(field, tmp_path, recipe, message):
    make(field, mode="residual", out=tmp_path / "run").run()
    good = load_checkpoint(tmp_path / "run")
    bad = dataclasses.replace(good, architecture={**good.architecture, "residuals": [recipe]})
    save_checkpoint(tmp_path / "bad", bad)
    with pytest.raises(CheckpointError, match=message):
        load_model(copy.deepcopy(field), tmp_path / "bad")


def test_checkpoints_tell_how_the_branch_was_built(field, tmp_path):
    make(field, mode="residual", out=tmp_path, residual_options={"activation": ["tanh"] * 2}).run()
    state = json.loads((tmp_path / "checkpoints/final/state.json").read_text())
    (recipe,) = state["architecture"]["residuals"]
    assert recipe == {
        "mode": "residual",
        "joint": False,
        "state": [1],
        "cond_dim": 0,
        "options": {"activation": ["tanh", "tanh"]},
    }


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({}, torch.tensor([3.0])),
        ({"center": "data"}, torch.tensor([3.0])),
        ({"center": 1.5}, torch.tensor([1.5])),
        ({"center": [2.5]}, torch.tensor([2.5])),
        ({"center": "origin"}, None),
    ],
)
def test_a_gav_vanishes_at_the_mean_of_the_data_unless_told_otherwise(field, option, expected):
    data = 3.0 + toys.two_modes(4000) - toys.two_modes(4000).mean()
    settings = {"holdout": 0.0, "select": "last", "residual_options": option}
    branch = make(field, data, mode="residual", **settings)._field.branch
    where = torch.zeros(1) if expected is None else expected
    around = where + torch.tensor([[0.0], [1.0], [-1.0]])
    delta = branch(torch.tensor(0.5), around).detach()
    assert float(delta[0].abs()) < 1e-6 and float(delta[1]) < 0 < float(delta[2])


class Shaped(nn.Module):
    """v(t, x, cond) of a user, on states [batch, 2, 3]."""

    def __init__(self, size):
        super().__init__()
        self.net = nn.Linear(6 + size, 6)

    def forward(self, t, x, cond):
        cond = cond if cond.is_floating_point() else nn.functional.one_hot(cond, 4).to(x)
        return self.net(torch.cat([x.flatten(1), cond], 1)).reshape(x.shape)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("labels", [False, True], ids=["numbers", "labels"])
def test_shaped_and_conditional_states(mode, labels, tmp_path):
    cond = torch.randint(4, (200,)) if labels else torch.randn(200, 4)
    data = (torch.randn(200, 2, 3), cond)
    options = {"center": "condition"} if mode == "residual" and not labels else {}
    settings = {"coupling": "inversion", "coupling_options": {"steps": 2}}
    field = Shaped(4)
    tuner = make(field, data, mode=mode, out=tmp_path, residual_options=options, **settings)
    model = tuner.run().model
    assert isinstance(model, Residual)
    told = not labels and (mode == "residual-mlp" or bool(options))
    x, t = torch.randn(5, 2, 3), torch.tensor(0.5)
    velocity = 6 if mode == "residual-mlp" else 0
    assert model.branch.cond_dim == velocity + (4 if told else 0)
    assert model(t, x, cond[:5]).shape == x.shape
    assert same(load_model(Shaped(4), tmp_path), model)


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("residual", {"hidden": [8]}, "a residual option of mode residual, got 'hidden'"),
        ("residual-mlp", {"widht": 8}, "a residual option of mode residual-mlp, got 'widht'"),
        ("residual", {"dim": 8}, "got 'dim'"),
        ("residual", {"center": "nowhere"}, "center = \"data\".* got 'nowhere'"),
        ("residual", {"center": [1.0, 2.0]}, r"numbers of the shape \[1\], got \[1.0, 2.0\]"),
        ("residual", {"center": "condition"}, "needs conditions"),
        ("residual-mlp", {"velocity": 3}, "expected velocity = true or false, got 3"),
        ("residual-mlp", {"hidden": ["wide"]}, "expected values that the branch takes"),
    ],
)
def test_options_that_do_not_fit_are_refused(field, mode, options, message):
    with pytest.raises(ConfigError, match=message):
        make(field, mode=mode, residual_options=options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"joint": True}, "joint: expected nothing in mode direct"),
        ({"residual_options": {"width": 4}}, "residual_options: expected nothing in mode direct"),
        ({"mode": "residul"}, "mode: expected one of direct, residual.*did you mean 'residual'"),
        ({"anchor_weight": -1.0}, "anchor_weight: expected at least 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(field, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(field, **settings)
    for option, refused in (("activation", "unknown activation"), ("width", "width must be")):
        with pytest.raises(InputError, match=refused):
            make(field, mode="residual", residual_options={option: "sine"})


BRANCHES = [
    ("residual-mlp", {}),
    ("residual-mlp", {"velocity": False, "activation": "silu"}),
    ("residual", {}),
    ("residual", {"activation": ["tanh", "asinh"], "center": "origin"}),
    ("residual", {"construction": "lmi", "activation": "softsign"}),
    ("residual", {"construction": "schur-cayley", "metric": "learned"}),
    ("residual", {"rank": 1, "activation": "clipped_cube", "offsets": False}),
]


@pytest.mark.parametrize(("mode", "options"), BRANCHES, ids=lambda p: str(p))
def test_the_solve_of_a_residual_runs_in_one_call(field, mode, options):
    settings = {"mode": mode, "residual_options": options, "solver_steps": (2, 5)}
    with fused("require"):
        result = make(field, **settings).run()
    with fused("off"):
        plain = make(field, **settings).run()
    for name, value in weights(result.model).items():
        torch.testing.assert_close(value, weights(plain.model)[name], rtol=2e-3, atol=2e-4)


def test_interplay_measures_angle_size_and_loss():
    v = torch.randn(50, 3, dtype=torch.float64)
    turned = torch.stack([v[:, 1], -v[:, 0], 0 * v[:, 0]], 1)
    assert interplay(v, torch.zeros_like(v)) == {"cosine": 0, "delta_size": 0, "cancelled": 0}
    assert interplay(v, -v) == pytest.approx({"cosine": -1, "delta_size": 1, "cancelled": 1})
    assert interplay(v, v) == pytest.approx({"cosine": 1, "delta_size": 1, "cancelled": -1})
    right = interplay(v, turned)
    assert (right["cosine"], right["cancelled"]) == pytest.approx((0, 0), abs=1e-12)
    delta = torch.randn(50, 3, dtype=torch.float64)
    kept = (v + delta).square().sum() / (v.square().sum() + delta.square().sum())
    assert interplay(v, delta)["cancelled"] == pytest.approx(1 - float(kept))


@pytest.mark.parametrize(("share", "speaks"), [(-0.6, True), (-0.1, False), (0.6, False)])
def test_a_branch_that_undoes_its_base_is_named_from_the_first_evaluation(field, share, speaks):
    """The branch is `share` times the field: what it cancels is known, -2 s / (1 + s^2)."""
    branch = copy.deepcopy(field)
    with torch.no_grad():
        for p in branch.linears[-1].parameters():
            p.mul_(share)
    model = Residual(copy.deepcopy(field), branch)
    result = make(model, mode="direct", steps=1, lr=1e-9).run()
    first = result.history[0]
    assert first["cosine"] == pytest.approx(1 if share > 0 else -1, abs=1e-4)
    assert first["delta_size"] == pytest.approx(abs(share), rel=1e-4)
    assert first["cancelled"] == pytest.approx(-2 * share / (1 + share**2), rel=1e-4)
    said = [finding for finding in result.findings if finding.name == "cancellation"]
    assert bool(said) is speaks
    if speaks:
        assert "88% of their energy" in str(said[0]) and "joint = false" in str(said[0])


def test_joint_training_against_a_strong_pull_cancels_and_the_run_says_so(field):
    """The samples are good all the same: nothing else would show what the two parts waste."""
    settings = {"steps": 100, "eval_every": 25, "batch_size": 128, "select": "last"}
    options = {"mode": "residual", "joint": True, "residual_options": {"rate": 2.0}}
    result = make(field, toys.two_modes(), **options, **settings).run()
    assert "cancellation" in [finding.name for finding in result.findings]
    last = result.history[-1]
    assert last["cancelled"] > 0.7 and last["cosine"] < -0.8 and 0.9 < last["spread"] < 1.1


def test_the_cancellation_monitor_speaks_once_per_failure_and_knows_its_limit():
    rows = [{"cancelled": c, "cosine": -0.9, "delta_size": 0.5} for c in (0.1, 0.6, 0.7, 0.2, 0.9)]
    found = [Cancellation().update(step, {}) for step in range(2)]
    assert found == [None, None]
    monitor = Cancellation(limit=0.5)
    assert [bool(monitor.update(k, row)) for k, row in enumerate(rows)] == [0, 1, 0, 0, 1]
    strict = Cancellation(limit=0.05)
    assert strict.update(0, rows[0]) is not None


def drift(field, **settings):
    """Train for long enough to move; give how far the trained weights got."""
    tuner = make(field, steps=60, select="last", **settings)
    trained = [p for p in tuner._field.parameters() if p.requires_grad]
    start = nn.utils.parameters_to_vector(trained).detach()
    last = tuner.run().history[-1]
    distance = float((nn.utils.parameters_to_vector(trained).detach() - start).norm())
    if settings["anchor_weight"] > 0:
        assert last["drift"] == pytest.approx(distance, rel=1e-4)
    return distance


ANCHORED = [
    {"mode": "direct"},
    {"mode": "residual"},
    {"mode": "residual-mlp"},
    {"mode": "residual", "joint": True},
]


@pytest.mark.parametrize("mode", ANCHORED, ids=lambda s: "-".join(map(str, s.values())))
def test_an_anchor_holds_the_trained_weights_near_their_start(field, mode):
    free, held, fixed = (drift(field, anchor_weight=w, **mode) for w in (0.0, 1.0, 100.0))
    assert fixed < 0.2 * free and fixed < held < 0.8 * free


def test_an_anchor_adds_half_its_weight_times_the_squared_distance(field):
    tuners = [make(field, anchor_weight=weight) for weight in (0.0, 3.0)]
    batch = tuners[0]._batches.next()
    for tuner in tuners:
        with torch.no_grad():
            tuner._field.linears[0].bias.add_(0.5)
    random = torch.Generator()
    plain, anchored = (float(t._loss(t._field, batch, random, 2).detach()) for t in tuners)
    assert anchored - plain == pytest.approx(0.5 * 3.0 * 32 * 0.25, rel=1e-4)
