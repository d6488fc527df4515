"""A policy takes and gives the units of data, draws by the seed, and is the same from disk."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import safetensors.torch
import torch
from torch import nn

from fmft_fast.data import Normalizer
from fmft_fast.errors import CheckpointError, ConfigError, InputError
from fmft_fast.fields import MLP, Residual
from fmft_fast.policies import FlowPolicy, PolicyConfig
from fmft_fast.policies.saved import CONFIG, DIGEST, WEIGHTS
from fmft_fast.train import FinetuneConfig, FlowMatchingTrainer, MLEFineTuner, PretrainConfig

NETWORKS = {
    "mlp": {"width": 16, "blocks": 1},
    "unet": {"channels": (8, 16), "groups": 4},
    "transformer": {"width": 16, "layers": 1, "heads": 2},
}
SIZES = {"obs_dim": 5, "action_dim": 2, "n_obs": 2, "n_action": 3, "horizon": 6}


def make(network="mlp", **sizes):
    """Give a policy with weights far from zero and normalisers that matter."""
    torch.manual_seed(1)
    config = PolicyConfig(
        **{**SIZES, "network": network, "network_options": NETWORKS[network], **sizes}
    )
    policy = FlowPolicy(
        config,
        Normalizer(torch.tensor([2.0, 3.0, 1.0, 0.5, 9.0]), torch.arange(5.0)),
        Normalizer(torch.tensor([100.0, 0.01]), torch.tensor([250.0, -3.0])),
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy.eval()


def observations(n=4, dtype=torch.float32):
    return 3 * torch.randn(n, 2, 5, generator=torch.Generator().manual_seed(8)).to(dtype)


class Towards(nn.Module):
    """Carries every sequence straight to one that the newest observation tells."""

    def forward(self, t, x, cond):
        return (cond[:, 5:7].repeat(1, 6) - x) / (1 - t)


@pytest.fixture(params=list(NETWORKS))
def policy(request):
    return make(request.param)


@pytest.fixture
def warned_always():
    """Warnings that torch gives once per process, in every test."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.filterwarnings("error")
def test_observations_with_a_graph_are_looked_at_without_a_warning(warned_always):
    policy, obs = make(), observations()
    noise = torch.zeros(len(obs), SIZES["horizon"], SIZES["action_dim"])
    plain = policy.predict_action({"obs": obs}, noise=noise)["action"]
    graph = policy.predict_action({"obs": obs.requires_grad_()}, noise=noise)["action"]
    assert torch.equal(graph, plain)


@pytest.mark.parametrize("steps", [1, 3])
def test_actions_have_the_units_of_the_data_and_begin_with_the_present_one(steps):
    policy = FlowPolicy(
        PolicyConfig(**SIZES), make().obs_normalizer, make().action_normalizer, network=Towards()
    )
    obs = observations()
    found = policy.predict_action({"obs": obs}, steps=steps)
    newest = (obs[:, -1, :2] - torch.tensor([0.0, 1.0])) / torch.tensor([2.0, 3.0])
    wanted = newest * torch.tensor([100.0, 0.01]) + torch.tensor([250.0, -3.0])
    assert found["action_pred"].shape == (4, 6, 2) and found["action"].shape == (4, 3, 2)
    torch.testing.assert_close(
        found["action_pred"], wanted[:, None].expand(4, 6, 2), rtol=1e-5, atol=1e-3
    )
    assert torch.equal(found["action"], found["action_pred"][:, 1:4])


def test_encode_normalises_and_lays_out_what_the_network_takes(policy):
    obs, action = observations(), 50 * torch.randn(4, 6, 2)
    x1, cond = policy.encode(obs, action)
    assert x1.shape == (4, *policy.config.state) and cond.shape == (4, policy.config.cond_dim)
    restored = policy.action_normalizer.restore(x1.reshape(4, 6, 2))
    torch.testing.assert_close(restored, action, rtol=1e-5, atol=1e-4)
    assert torch.equal(cond[:, 5:], policy.obs_normalizer.normalise(obs[:, 1]))


@pytest.mark.parametrize(
    ("steps", "method"), [(1, "euler"), (4, "euler"), (2, "midpoint")], ids=str
)
def test_predictions_are_solves_of_the_velocity(policy, steps, method):
    obs, noise = observations(), torch.randn(4, 6, 2)
    found = policy.predict_action({"obs": obs}, steps=steps, method=method, noise=noise)
    x, cond = noise.reshape(4, *policy.config.state), policy.encode(obs, noise)[1]
    with torch.no_grad():
        for k in range(steps):
            t, h = torch.tensor(k / steps), 1 / steps
            v = policy(t, x, cond)
            if method == "midpoint":
                v = policy(t + h / 2, x + h / 2 * v, cond)
            x = x + h * v
    wanted = policy.action_normalizer.restore(x.reshape(4, 6, 2))
    torch.testing.assert_close(found["action_pred"], wanted, rtol=1e-4, atol=1e-3)
    assert not found["action"].requires_grad


def test_tolerances_instead_of_steps_come_near_to_many_steps():
    policy, obs, noise = make().double(), observations(), torch.randn(4, 6, 2)
    near = policy.predict_action(
        {"obs": obs}, steps=None, method="dopri5", rtol=1e-8, atol=1e-8, noise=noise
    )
    many = policy.predict_action({"obs": obs}, steps=64, method="rk4", noise=noise)
    torch.testing.assert_close(near["action"], many["action"], rtol=1e-6, atol=1e-5)


def test_noise_is_drawn_by_the_generator_alone_and_may_be_given():
    policy, batch = make(), {"obs": observations()}

    def draw(seed):
        return policy.predict_action(batch, generator=torch.Generator().manual_seed(seed))

    first = draw(3)["action_pred"]
    torch.manual_seed(99)
    assert torch.equal(first, draw(3)["action_pred"])
    assert (first != draw(4)["action_pred"]).all()
    noise = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, policy.predict_action(batch, noise=noise)["action_pred"])


def test_the_loss_is_flow_matching_in_normalised_units(policy):
    batch = {"obs": observations(64), "action": 50 * torch.randn(64, 6, 2)}
    loss = policy.compute_loss(batch, generator=torch.Generator().manual_seed(2))
    random = torch.Generator().manual_seed(2)
    x1, cond = policy.encode(batch["obs"], batch["action"])
    x0, t = torch.randn(x1.shape, generator=random), torch.rand(64, generator=random)
    time = t.reshape(-1, *[1] * (x1.ndim - 1))
    velocity = policy(t, (1 - time) * x0 + time * x1, cond)
    torch.testing.assert_close(loss, (velocity - (x1 - x0)).square().mean())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())
    assert not list(policy.obs_normalizer.parameters()), "normalisers are not trained"


def tuned(model, mode, out=None, **settings):
    """Fine-tune for two steps; gives the policy of the result."""
    options = {"hidden": (8,)} if mode == "residual-mlp" else {}
    config = FinetuneConfig(
        **{"steps": 2, "batch_size": 8, "device": "cpu", "coupling": "inversion", "lr": 0.05},
        **{"coupling_options": {"steps": 2}, "solver_steps": (1,), "mode": mode},
        **{"residual_options": options, "select": "last", **settings},
    )
    rows = FlowPolicy.of(model).encode(observations(40), 50 * torch.randn(40, 6, 2))
    tuner = MLEFineTuner(model, rows, config=config, out=out, progress=False)
    return FlowPolicy.of(tuner.run().model)


def actions(policy):
    noise = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(0))
    return policy.predict_action({"obs": observations()}, steps=3, noise=noise)["action"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_saved_policy_comes_back_with_the_same_bits(policy, dtype, tmp_path):
    policy = policy.to(dtype)
    again = FlowPolicy.from_pretrained(policy.save_pretrained(tmp_path / "a" / "policy"))
    assert actions(again).dtype == dtype and torch.equal(actions(again), actions(policy))
    assert not again.training
    # A policy may be saved over an earlier one.
    other = make(n_action=2).save_pretrained(tmp_path / "a" / "policy")
    assert FlowPolicy.from_pretrained(other).config.n_action == 2


@pytest.mark.parametrize("before", ["now", "by an earlier version"])
def test_a_save_killed_half_way_is_noticed(before, tmp_path, monkeypatch):
    policy, folder = make(), make(n_action=2).save_pretrained(tmp_path / "policy")
    if before != "now":
        content = json.loads((folder / CONFIG).read_text())
        del content[DIGEST]
        (folder / CONFIG).write_text(json.dumps(content))
    assert FlowPolicy.from_pretrained(folder).config.n_action == 2
    moved = []

    def killed(source, target, replace=os.replace):
        moved.append(target)
        if len(moved) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    with torch.no_grad():
        policy.action_normalizer.offset.add_(1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        policy.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="is not of the same save as config.json"):
        FlowPolicy.from_pretrained(folder)
    again = FlowPolicy.from_pretrained(policy.save_pretrained(folder))
    assert torch.equal(actions(again), actions(policy))
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]


def test_a_disk_that_refuses_leaves_the_saved_policy(tmp_path, monkeypatch):
    policy, folder = make(), make().save_pretrained(tmp_path / "policy")

    def full(handle):
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        policy.action_normalizer.offset.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device; what it held is unt"):
            policy.save_pretrained(folder)
    assert torch.equal(actions(FlowPolicy.from_pretrained(folder)), actions(make()))
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize(("mode", "dtype"), [("residual", "float64"), ("residual-mlp", "float32")])
def test_branches_around_a_policy_are_saved_with_it(mode, dtype, tmp_path):
    base = make()
    policy = tuned(base, mode, out=tmp_path / "run", dtype=dtype)
    assert isinstance(policy.network, Residual)
    assert not torch.equal(actions(policy), actions(base)), "the branch does something"
    saved = policy.save_pretrained(tmp_path / "policy")
    for source in (saved, tmp_path / "run", tmp_path / "run/checkpoints/last"):
        again = FlowPolicy.from_pretrained(source)
        assert torch.equal(actions(again), actions(policy))
        assert torch.equal(again.obs_normalizer.scale, policy.obs_normalizer.scale)
    twice = tuned(FlowPolicy.from_pretrained(saved).model, "residual-mlp", dtype=dtype)
    again = FlowPolicy.from_pretrained(twice.save_pretrained(tmp_path / "twice"))
    assert torch.equal(actions(again), actions(twice))


def test_a_training_run_gives_its_averaged_policy(policy, tmp_path):
    rows = policy.encode(observations(40), 50 * torch.randn(40, 6, 2))
    config = PretrainConfig(
        steps=3, batch_size=8, device="cpu", coupling="independent", lr=0.1, ema_decay=0.5
    )
    trainer = FlowMatchingTrainer(policy, rows, config=config, out=tmp_path, progress=False)
    trained = trainer.run().model
    assert torch.equal(actions(FlowPolicy.from_pretrained(tmp_path)), actions(trained))


def edit(folder, **changes):
    """Change entries of config.json; those of `policy` if they are its keys."""
    file = folder / CONFIG
    content = json.loads(file.read_text())
    for name, value in changes.items():
        (content["policy"] if name in content["policy"] else content)[name] = value
    file.write_text(json.dumps(content))


DAMAGE = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} cannot be read"),
    "cut weights": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-40]),
        f"{WEIGHTS} cannot be read",
    ),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), "expected fmft-policy 1"),
    "a list": (lambda f: (f / CONFIG).write_text("[1]"), "expected fmft-policy 1"),
    "other format": (lambda f: (f / CONFIG).write_text('{"model_type": "bert"}'), "expected fmft"),
    "later format": (lambda f: edit(f, format_version=2), "it is 'fmft-policy' 2"),
    "dtype": (lambda f: edit(f, dtype="float31"), "float31"),
    "a dtype that is none": (lambda f: edit(f, dtype="nn"), "nn"),
    "residuals": (lambda f: edit(f, residuals=None), "expected fmft-policy 1"),
    "a branch": (lambda f: edit(f, residuals=[{"mode": "huh"}]), "expected the recipe of a branch"),
    "sizes": (lambda f: edit(f, horizon=7), "belongs to another model"),
    "network": (lambda f: edit(f, network="cnn"), "cannot build the policy"),
    "options": (lambda f: edit(f, network_options={"widht": 3}), "did you mean 'width'"),
    "no options": (lambda f: edit(f, network_options=None), "cannot build the policy"),
    "policy": (lambda f: edit(f, policy=7), "cannot build the policy 7"),
    "nothing": (shutil.rmtree, "does not exist"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damaged_and_foreign_folders_are_refused(name, tmp_path):
    break_it, message = DAMAGE[name]
    folder = make().save_pretrained(tmp_path / "policy")
    break_it(folder)
    with pytest.raises(CheckpointError) as caught:
        FlowPolicy.from_pretrained(folder)
    assert message in str(caught.value) and str(folder) in str(caught.value)


def test_a_model_without_a_policy_is_refused_with_what_reads_it(tmp_path):
    config = PretrainConfig(steps=1, batch_size=8, device="cpu", coupling="independent")
    trainer = FlowMatchingTrainer(
        MLP(2, hidden=(4,)), torch.randn(40, 2), config=config, out=tmp_path, progress=False
    )
    model = trainer.run().model
    with pytest.raises(CheckpointError, match="holds no policy.*load_model"):
        FlowPolicy.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected a FlowPolicy or a Residual around one, got MLP"):
        FlowPolicy.of(model)


def test_what_could_not_be_built_again_is_not_saved(tmp_path):
    with pytest.raises(InputError, match="got one of its own, Towards"):
        FlowPolicy(PolicyConfig(**SIZES), network=Towards()).save_pretrained(tmp_path / "a")
    by_hand = FlowPolicy.of(Residual(make(), MLP(12, hidden=(4,), cond_dim=10)))
    with pytest.raises(InputError, match="residual that was built by hand"):
        by_hand.save_pretrained(tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_observations_that_do_not_fit_are_refused_by_name():
    policy, obs = make(), observations()
    broken = obs.clone()
    broken[0, 1, 2] = torch.nan
    for batch, message in (
        ({"state": obs}, "expected an entry 'obs', got state"),
        ({"obs": obs[:, :1]}, r"obs: expected a tensor \[n, 2, 5\], got \[4, 1, 5\]"),
        ({"obs": obs[0]}, r"obs: expected a tensor \[n, 2, 5\], got \[2, 5\]"),
        ({"obs": obs.numpy()}, "got ndarray"),
        ({"obs": broken}, "obs: holds NaN or infinite values"),
    ):
        with pytest.raises(InputError, match=message):
            policy.predict_action(batch)
    with pytest.raises(InputError, match=r"noise: expected \[4, 6, 2\], got \[4, 3, 2\]"):
        policy.predict_action({"obs": obs}, noise=torch.zeros(4, 3, 2))
    with pytest.raises(InputError, match="expected an entry 'action', got obs"):
        policy.compute_loss({"obs": obs})
    with pytest.raises(InputError, match="obs_normalizer: expected one of 5 numbers, got 4"):
        FlowPolicy(PolicyConfig(**SIZES), Normalizer.identity(4))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_obs": 0}, "n_obs: expected a whole number from 1 on, got 0"),
        ({"horizon": 3}, "horizon: expected at least n_obs - 1 \\+ n_action = 4, got 3"),
        ({"network": "nlp"}, "'nlp'; did you mean 'mlp'"),
        ({"network_options": {"hiden": 3}}, "got 'hiden'"),
        ({"network_options": {"width": "8"}}, "network_options: expected values"),
        ({"network_options": {"width": 0}}, "width = 0"),
        ({"network_options": {"dim": 3}}, "got 'dim'"),
        ({"network_options": [1]}, "network_options: expected a table"),
    ],
    ids=str,
)
def test_sizes_and_options_that_do_not_fit_are_refused(changed, message):
    with pytest.raises((ConfigError, InputError), match=message):
        FlowPolicy(PolicyConfig(**{**SIZES, **changed}))


def test_a_configuration_survives_json_and_refuses_what_it_does_not_know():
    config = make("unet").config
    again = PolicyConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert json.dumps(again.to_dict()) == json.dumps(config.to_dict())
    with pytest.raises(ConfigError, match="got 'n_actions'; did you mean 'n_action'"):
        PolicyConfig.from_dict({**SIZES, "n_actions": 3})
    with pytest.raises(ConfigError, match="obs_dim: expected a whole number, got nothing"):
        PolicyConfig.from_dict({"action_dim": 2})


def test_weights_are_what_safetensors_readers_expect(tmp_path):
    folder = make().save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    assert weights["action_normalizer.offset"].tolist() == [250.0, -3.0]
    assert set(weights) == set(make().state_dict())
