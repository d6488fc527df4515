"""Tasks: deterministic data, settings that the trainers take, measures that tell good from bad."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fmft_fast.errors import InputError
from fmft_fast.tasks import TASKS, Task, find_task, register, toy_gmm
from fmft_fast.train import FinetuneConfig, PretrainConfig


@pytest.fixture(autouse=True)
def small_samples(monkeypatch):
    """Keep the sizes of an evaluation small; the settings themselves stay."""
    monkeypatch.setattr(toy_gmm, "ROWS", 3000)
    monkeypatch.setattr(toy_gmm, "ENERGY_ROWS", 1500)
    monkeypatch.setattr(toy_gmm, "TRANSPORT_STEPS", 200)
    monkeypatch.setattr(toy_gmm, "MAP_POINTS", 41)
    for cached in (toy_gmm._fresh, toy_gmm._floor):
        cached.cache_clear()
    yield
    for cached in (toy_gmm._fresh, toy_gmm._floor):
        cached.cache_clear()


@pytest.fixture(params=sorted(name for name in TASKS if TASKS[name].options is None))
def task(request) -> Task:
    if request.param == "digits":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    return find_task(request.param)


class Perfect(nn.Module):
    """Carries every x0 straight to a point of the mixture, chosen by its angle and radius."""

    def forward(self, t, x):
        centres = toy_gmm.TASK.centres
        if float(t) == 0:
            near = centres[torch.cdist(x, centres).argmin(1)]
            self.shift = near + toy_gmm.SIGMA * torch.randn_like(x) - x
        return self.shift


def test_registry_refuses_duplicates_and_lists_what_it_knows():
    with pytest.raises(InputError, match="'toy-gmm' is registered already"):
        register(toy_gmm.ToyGMM())
    with pytest.raises(InputError, match="'toy'.*digits, .*toy-gmm"):
        find_task("toy")


def test_data_repeat_by_seed_and_the_field_fits_them(task):
    first, again = task.make_data(3), task.make_data(3)
    assert torch.equal(first.train, again.train) and torch.equal(first.heldout, again.heldout)
    field = task.make_field()
    assert field(torch.tensor(0.5), first.train[:4]).shape == first.train[:4].shape


def test_held_out_data_are_not_among_the_training_data(task):
    data = task.make_data(0)
    kept, train = data.heldout[:200], data.train[:5000]
    assert not (kept[:, None] == train).all(2).any()


def test_settings_are_keys_that_the_trainers_know(task):
    assert PretrainConfig.from_dict(task.pretrain).coupling == "ot-minibatch"
    assert FinetuneConfig.from_dict(task.finetune).coupling in ("ot-semidiscrete", "inversion")


def test_mixture_has_the_moments_it_claims():
    x = toy_gmm.TASK.draw(100_000, 0)
    assert x.std(0).tolist() == pytest.approx([1.418, 1.418], abs=0.01)
    shares = torch.bincount(torch.cdist(x, toy_gmm.TASK.centres).argmin(1)) / len(x)
    assert shares.tolist() == pytest.approx([0.2] * 5, abs=0.006)
    exact = toy_gmm.TASK.draw(500, 1, balanced=True)
    counts = torch.bincount(torch.cdist(exact, toy_gmm.TASK.centres).argmin(1))
    assert counts.tolist() == [100] * 5


def test_toy_measures_put_true_samples_at_the_floor_and_noise_far_above():
    toy = toy_gmm.TASK
    floor = toy.noise_floor(seed=1)
    torch.manual_seed(0)
    good = toy.evaluate(Perfect(), (1, 2), seed=1)[2]
    bad = toy.evaluate(lambda t, x: torch.zeros_like(x), (1,), seed=1)[1]
    assert good.keys() == bad.keys() == floor.keys()
    assert good["off_mode_share"] == pytest.approx(0.0111, abs=0.006)
    assert good["sliced_w2"] < 2 * floor["sliced_w2"]
    for key in ("off_mode_share", "energy_distance", "sliced_w2", "reconstruction_error"):
        assert bad[key] > 2 * max(good[key], floor[key])


def test_reconstruction_floor_is_far_below_the_distance_of_modes():
    assert toy_gmm.TASK.noise_floor(seed=0)["reconstruction_error"] < 0.5


def test_evaluation_repeats_and_depends_on_its_seed(task):
    torch.manual_seed(0)
    field = task.make_field()
    first, again, other = (task.evaluate(field, (2,), seed=s) for s in (0, 0, 1))
    assert first == again and list(first) == [2]
    assert first != other


def test_digits_measures_tell_real_images_noise_and_copies_apart():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    digits = find_task("digits")
    data = digits.make_data(0)
    assert data.train.shape == (1297, 64) and data.heldout.shape == (500, 64)
    assert data.train.min() == -1 and data.train.max() == 1
    floor = digits.noise_floor(seed=0)

    class Copies(nn.Module):
        def forward(self, t, x):
            return data.train[: len(x)] - x if float(t) == 0 else torch.zeros_like(x)

    copies = digits.evaluate(Copies(), (1,), seed=0)[1]
    noise = digits.evaluate(lambda t, x: torch.zeros_like(x), (1,), seed=0)[1]
    assert copies["nearest_neighbour_ratio"] < 1e-3 < 1.5 < noise["nearest_neighbour_ratio"]
    assert copies["classifier_doubt"] < 0.1 < noise["classifier_doubt"]
    for key in ("kernel_distance", "frechet_distance", "energy_distance", "sliced_w2"):
        # The classifier has seen the copied images, so its features of them lie off the floor.
        assert max(copies[key], floor[key]) < 0.1 * noise[key]


def test_figures_are_drawn_for_every_task(task, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    torch.manual_seed(0)
    before, after = task.make_field(), task.make_field()
    results = {"before": task.evaluate(before, (1, 2)), "after": task.evaluate(after, (1, 2))}
    history = {"pre-training": [{"kind": "train", "step": 1, "loss": 1.0}]}
    files = task.figures(before, after, tmp_path, results=results, history=history)
    assert {"quality.png", "training.png"} < {file.name for file in files}
    assert all(file.stat().st_size > 5000 for file in files)
