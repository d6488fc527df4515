"""Robot tasks: what is trained on, in whose units, and how policies are measured."""

from __future__ import annotations

import pytest
import torch
from real_data import data_folder
from robot_data import pusht_file, robomimic_file

from fmft_fast.data import Episodes
from fmft_fast.envs.pusht import PushT, observe
from fmft_fast.errors import ConfigError, ConfigWarning, InputError, MissingDependencyError
from fmft_fast.tasks import TASKS, find_task, robot
from fmft_fast.tasks.robot import FIRST_WATCHED, RobotOptions, data_variable
from fmft_fast.train import FinetuneConfig, PretrainConfig

SMALL = {"network_options": {"width": 16, "blocks": 1}, "workers": 0, "starts": 2}


def pusht(path=None, **options):
    data = {} if path is None else {"data": str(path)}
    return find_task("pusht").configured({**SMALL, **data, **options})


@pytest.fixture
def file(tmp_path):
    return pusht_file(tmp_path / "demo.npz")


@pytest.fixture
def short(monkeypatch):
    """End episodes of the real simulator after nine steps."""
    pytest.importorskip("gym_pusht", reason="needs the simulator gym-pusht")
    monkeypatch.setattr(PushT, "max_steps", 9)


def episodes_of(rows, field):
    """Give the numbers of the episodes from which rows of training data come."""
    action = field.action_normalizer.restore(rows.reshape(len(rows), -1, 2))
    return {round(float(value) / 10) for value in action[..., 1].flatten()}


def test_windows_of_held_out_episodes_are_never_trained_on(file):
    task = pusht(file, heldout_share=0.4)
    field = task.make_field()
    data = task.make_data(0, field)
    train, heldout = episodes_of(data.train, field), episodes_of(data.heldout, field)
    assert len(train) == 4 and len(heldout) == 2 and train | heldout == set(range(6))
    other = task.make_data(5, field)
    assert torch.equal(data.heldout, other.heldout) and torch.equal(data.train, other.train)
    fewer = pusht(file, heldout_share=0.4, episodes=2)
    data = fewer.make_data(0, field)
    assert episodes_of(data.heldout, field) == heldout and episodes_of(data.train, field) < train
    assert len(episodes_of(data.train, field)) == 2


def test_data_are_in_the_units_of_the_policy_and_not_refitted(file, tmp_path):
    field = pusht(file).make_field()
    moved = pusht(pusht_file(tmp_path / "moved.npz", shift=40.0))
    own, theirs = pusht(file).make_data(0, field), moved.make_data(0, field)
    shift = 40 / field.action_normalizer.scale.repeat(field.config.horizon)
    torch.testing.assert_close(theirs.train, own.train + shift, rtol=1e-4, atol=1e-4)
    assert torch.equal(theirs.train_cond, own.train_cond)
    refitted = moved.make_field().action_normalizer.offset
    torch.testing.assert_close(refitted, field.action_normalizer.offset + 40)


def test_normalisers_are_fitted_to_training_episodes_alone(file):
    task = pusht(file, heldout_share=0.4)
    normalizer = task.make_field().action_normalizer
    train = torch.as_tensor(task.split()[0].columns("action"))
    assert torch.equal(normalizer.normalise(train).amax(0), torch.ones(2))
    spread = pusht(file, normalizer="mean-std").make_field().action_normalizer
    rows = spread.normalise(torch.as_tensor(pusht(file).split()[0].columns("action")))
    torch.testing.assert_close(rows.std(0, correction=0), torch.ones(2))


def test_sizes_of_the_data_are_those_of_the_policy_not_of_the_options(file):
    field = pusht(file, n_obs=1, n_action=3, horizon=4).make_field()
    data = pusht(file).make_data(0, field)
    assert data.train.shape[1:] == (8,) and data.train_cond.shape[1:] == (20,)
    assert field(torch.tensor(0.5), data.train[:3], data.train_cond[:3]).shape == (3, 8)
    unet = pusht(file, network="unet", network_options={"channels": [8], "groups": 2})
    assert unet.make_data(0).train.shape[1:] == (16, 2)


def test_what_push_t_sees_is_what_its_simulator_shows():
    """On the real demonstrations, the readings of training and simulator agree within a pixel."""
    folder = data_folder("pusht")
    task = pusht(folder / "pusht_cchi_v7_replay.zarr")
    episodes = task.demonstrations().select([0, 100])
    assert task.demonstrations().count == 206
    seen, action = task.columns(episodes)
    assert abs(seen - observe(episodes.columns("state"))).max() < 1
    assert action.shape == (episodes.steps, 2) and 0 <= action.min() and action.max() <= 512


@pytest.mark.parametrize(
    ("names", "used"),
    [
        (("obs", "action"), ("obs", "action")),
        (("observations/observation", "actions"), ("observations/observation", "actions")),
        (("observations", "actions"), ("observations", "actions")),
        (("observations_seq", "actions_seq"), ("observations_seq", "actions_seq")),
    ],
)
def test_kitchen_finds_what_each_format_calls_observations_and_actions(names, used):
    arrays = {names[0]: torch.full((6, 3), 1.0).numpy(), names[1]: torch.full((6, 2), 2.0).numpy()}
    obs, action = find_task("kitchen").columns(Episodes(arrays, torch.tensor([3, 6]).numpy()))
    assert obs.shape == (6, 3) and (obs == 1).all() and (action == 2).all()
    with pytest.raises(InputError, match="an array obs or .* or observations_seq, got x; see"):
        find_task("kitchen").columns(Episodes({"x": arrays[names[0]]}, torch.tensor([6]).numpy()))


def test_robomimic_sees_object_hand_and_gripper(tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs h5py to write a file of robomimic")
    file = robomimic_file(tmp_path / "low_dim.hdf5")
    task = find_task("robomimic").configured({**SMALL, "data": str(file)})
    obs, action = task.columns(task.demonstrations())
    assert obs.shape == (48, 19) and action.shape == (48, 7)
    with h5py.File(file) as content:
        first = content["data/demo_0/obs"]
        assert obs[0, :10] == pytest.approx(first["object"][0])
        assert obs[0, 10:13] == pytest.approx(first["robot0_eef_pos"][0])
        assert obs[0, 17:] == pytest.approx(first["robot0_gripper_qpos"][0])


def test_where_demonstrations_lie_is_said_by_option_or_environment(file, tmp_path, monkeypatch):
    monkeypatch.delenv("FMFT_PUSHT_DATA", raising=False)
    with pytest.raises(ConfigError, match="write --data PATH, or set FMFT_PUSHT_DATA"):
        pusht().demonstrations()
    monkeypatch.setenv("FMFT_PUSHT_DATA", str(file))
    assert pusht().demonstrations().count == 6
    other = pusht_file(tmp_path / "other.npz", episodes=3)
    task = pusht(other)
    assert task.demonstrations().count == 3, "the option counts more"
    assert task.configured({"data": str(file)}).demonstrations().count == 6
    with pytest.raises(InputError, match="gone.npz"):
        pusht(tmp_path / "gone.npz").demonstrations()
    with pytest.raises(ConfigError, match="expected the name of a robot task, got 'toy-gmm'"):
        data_variable("toy-gmm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizn": 3}, "got 'horizn'; did you mean 'horizon'"),
        ({"network": "nlp"}, "network: expected one of mlp, unet, transformer, got 'nlp'"),
        ({"starts": 0}, "starts: expected at least 1"),
        ({"noise_seeds": [-1]}, "noise_seeds: expected at least 0"),
        ({"noise_seeds": [1, 1]}, "noise_seeds: expected different numbers"),
        ({"watch_steps": [2, 2]}, "watch_steps: expected different numbers"),
        ({"heldout_share": 0.9}, "heldout_share: expected at most 0.5"),
    ],
    ids=str,
)
def test_options_are_checked_before_anything_is_trained(options, message):
    with pytest.raises(ConfigError, match=message):
        pusht(**options)


def test_a_task_with_options_leaves_the_registered_one_alone(file):
    task = pusht(file, starts=7)
    assert task.options.starts == 7 and TASKS["pusht"].options == RobotOptions()
    assert task.configured({"horizon": 20}).options.starts == 7
    with pytest.raises(ConfigError, match="the task toy-gmm takes no options, got starts"):
        find_task("toy-gmm").configured({"starts": 3})


def test_settings_of_the_tasks_are_keys_that_trainers_know():
    for name in ("pusht", "kitchen", "robomimic"):
        assert PretrainConfig.from_dict(TASKS[name].pretrain).ema_decay
        assert FinetuneConfig.from_dict(TASKS[name].finetune).select == "last"


def test_an_evaluation_gives_means_with_intervals_of_real_roll_outs(file, short):
    task = pusht(file, noise_seeds=[0, 3])
    field = task.make_field()
    found = task.evaluate(field, (1, 2), seed=4)
    rows = task.roll_out(field, (1, 2), seed=4)
    assert {row["noise_seed"] for row in rows} == {4, 7} and len(rows) == 8
    assert {row["start"] for row in rows} == {0, 1} and {row["length"] for row in rows} == {9}
    for n in (1, 2):
        scores = [row["score"] for row in rows if row["steps"] == n]
        assert found[n]["score"] == pytest.approx(sum(scores) / 4)
        assert found[n]["score, low"] <= found[n]["score"] <= found[n]["score, high"]
    assert found == task.evaluate(field, (1, 2), seed=4), "evaluations repeat"


def missing(name):
    raise MissingDependencyError(f"{name} needs a package; pip install it")


def test_without_the_simulator_actions_are_compared_and_a_warning_says_so(file, monkeypatch):
    monkeypatch.setattr(robot, "make_environment", missing)
    task = pusht(file, heldout_share=0.4)
    field = task.make_field()
    with pytest.warns(ConfigWarning, match="no roll-outs: pusht needs a package; pip install it"):
        found = task.evaluate(field, (1,))[1]
    windows = task.windows(task.split()[1], field.config)
    noise = torch.randn(windows.action.shape, generator=torch.Generator().manual_seed(0))
    got = field.predict_action({"obs": windows.obs}, noise=noise)["action"]
    gap = (got - windows.action[:, 1:9]) / field.action_normalizer.scale
    each = [
        float(gap[windows.episode == k].square().mean().sqrt()) for k in windows.episode.unique()
    ]
    assert found["action_error"] == pytest.approx(sum(each) / len(each), rel=1e-4)
    assert found["action_error, low"] <= found["action_error"] <= found["action_error, high"]


def test_a_policy_that_does_not_fit_the_simulator_is_measured_by_its_actions(file, short):
    """After hours of training, other conventions of the data must not cost the measurement."""
    task = pusht(file)
    task.columns = lambda episodes: (episodes.columns("keypoint"), episodes.columns("action"))
    field = task.make_field()
    with pytest.warns(ConfigWarning, match="pusht has 20 .* and 2 in .*, this policy 18 and 2"):
        assert "action_error" in task.evaluate(field, (1,))[1]


def test_robomimic_is_simulated_as_its_file_says(tmp_path, monkeypatch):
    monkeypatch.delenv("FMFT_ROBOMIMIC_DATA", raising=False)
    task = find_task("robomimic")
    assert task.simulator() == "robomimic"
    assert task.configured({"data": "can.hdf5"}).simulator() == "robomimic:can.hdf5"
    monkeypatch.setenv("FMFT_ROBOMIMIC_DATA", "lift.hdf5")
    assert task.simulator() == "robomimic:lift.hdf5"


def test_failure_is_watched_on_starts_that_no_evaluation_uses(file, short, monkeypatch):
    task = pusht(file, watch_starts=2, watch_steps=[1, 3])
    field, asked = task.make_field().double().train(), []
    original = robot.evaluate_policy
    monkeypatch.setattr(
        robot, "evaluate_policy", lambda *a, **k: asked.append(k) or original(*a, **k)
    )
    watch = task.watch(FinetuneConfig())
    assert watch is not None
    found = watch(field)
    (settings,) = asked
    assert list(settings["starts"]) == [FIRST_WATCHED, FIRST_WATCHED + 1]
    assert settings["steps"] == (1, 3) and settings["workers"] == 0
    rows = task.roll_out(field.float().eval(), (1, 3), starts=settings["starts"])
    mean = sum(row["score"] for row in rows) / 4
    assert found == {"failure": pytest.approx(1 - mean)}


def test_watching_leaves_the_trained_model_as_it_was(file, short):
    field = pusht(file).make_field().double().train()
    watch = pusht(file, watch_starts=1).watch(FinetuneConfig())
    assert watch is not None and set(watch(field)) == {"failure"}
    assert field.training and next(field.parameters()).dtype == torch.float64
    assert pusht(file).watch(FinetuneConfig()) is None
    assert pusht(file, watch_starts=1).watch(PretrainConfig()) is not None


def test_figures_show_every_measure_with_its_interval(file, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib to draw")
    row = {f"score{end}": 0.5 + k / 9 for k, end in enumerate(("", ", low", ", high"))}
    results = {"before": {1: row, 4: row}, "after": {1: row, 4: row}}
    history = {"fine-tuning": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}
    field = pusht(file).make_field()
    files = pusht(file).figures(field, field, tmp_path, results=results, history=history)
    assert [file.name for file in files] == ["quality.png", "training.png"]
    assert all(file.stat().st_size > 3000 for file in files)
