"""Episodes keep what they are given and refuse what contradicts itself."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from fmft_fast.data import Episodes
from fmft_fast.errors import InputError


def some(steps=11, ends=(4, 5, 11)):
    return Episodes(
        {"x": np.arange(steps * 2.0).reshape(steps, 2), "flag": np.arange(steps) % 2 == 0},
        np.array(ends),
    )


def test_counts_and_views():
    episodes = some()
    assert (episodes.count, episodes.steps) == (3, 11)
    assert episodes.lengths.tolist() == [4, 1, 6]
    parts = list(episodes)
    assert [len(part["x"]) for part in parts] == [4, 1, 6]
    np.testing.assert_array_equal(np.concatenate([part["x"] for part in parts]), episodes["x"])
    assert np.shares_memory(parts[1]["x"], episodes["x"])


def test_select_takes_episodes_in_the_given_order():
    chosen = some().select([2, 0, 2])
    assert chosen.lengths.tolist() == [6, 4, 6]
    x = some()["x"]
    np.testing.assert_array_equal(chosen["x"], np.concatenate([x[5:], x[:4], x[5:]]))


@pytest.mark.parametrize("wrong", [[], [3], [-1], [0.0], [[0]], [True, False, True]])
def test_select_refuses_what_is_no_episode(wrong):
    with pytest.raises(InputError, match="indices: expected whole numbers from 0 to 2"):
        some().select(wrong)


def test_split_is_whole_disjoint_complete_and_repeatable():
    episodes = Episodes({"x": np.arange(60)}, np.arange(3, 61, 3))
    train, heldout = episodes.split(0.3, seed=5)
    assert (train.count, heldout.count) == (14, 6)
    joined = np.concatenate([train["x"], heldout["x"]])
    assert sorted(joined.tolist()) == list(range(60))
    assert all((part["x"] == part["x"][0] + np.arange(3)).all() for part in train)
    again = episodes.split(0.3, seed=5)[1]
    np.testing.assert_array_equal(again["x"], heldout["x"])
    others = [episodes.split(0.3, seed=s)[1]["x"].tolist() for s in range(5)]
    assert others.count(others[0]) < 5


def test_split_leaves_an_episode_on_either_side():
    assert [part.count for part in some().split(0.001)] == [2, 1]
    assert [part.count for part in some().split(0.999)] == [1, 2]
    with pytest.raises(InputError, match="share: expected"):
        some().split(1.0)
    with pytest.raises(InputError, match="at least 2"):
        some(4, [4]).split(0.5)


def test_columns_flatten_and_join():
    episodes = Episodes(
        {"k": np.arange(12).reshape(2, 3, 2), "g": np.array([True, False])}, np.array([2])
    )
    joined = episodes.columns("g", "k")
    assert joined.dtype == np.float32
    np.testing.assert_array_equal(joined[1], [0, 6, 7, 8, 9, 10, 11])
    with pytest.raises(InputError, match="expected one of k, g, got 'h'"):
        episodes.columns("h")


def test_save_and_pickle_keep_everything(tmp_path):
    episodes = Episodes(
        {"obs/x": np.arange(3.0), "file": np.arange(3), "allow_pickle": np.eye(3, dtype=bool)},
        np.array([1, 3], dtype=np.uint8),
    )
    file = episodes.save(tmp_path / "deep" / "e.npz")
    assert [path.name for path in file.parent.iterdir()] == ["e.npz"]
    with np.load(file) as stored:
        assert {n: stored[n].dtype for n in stored} == {
            "obs/x": np.float64,
            "file": np.int64,
            "allow_pickle": np.bool_,
            "episode_ends": np.int64,
        }
    copy = pickle.loads(pickle.dumps(episodes))
    np.testing.assert_array_equal(copy["obs/x"], episodes["obs/x"])
    with pytest.raises(InputError, match="ending in .npz"):
        episodes.save(tmp_path / "e.zip")


def test_foreign_byte_order_is_brought_home():
    episodes = Episodes({"x": np.arange(3, dtype=">f4")}, np.array([3], dtype=">i8"))
    assert episodes["x"].dtype.isnative and episodes.episode_ends.dtype.isnative
    assert episodes["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 2)), "x: expected 3 steps, where episode_ends ends, got 4"),
        (np.zeros((2, 2)), "x: expected 3 steps, where episode_ends ends, got 2"),
        (np.zeros(()), r"x: expected a non-empty array \[steps, ...\], got shape \(\)"),
        (np.zeros((3, 0)), r"x: expected a non-empty array"),
        (np.array([1, None, 2]), "x: expected booleans, integers or floats, got dtype object"),
        (np.array(["a", "b", "c"]), "x: expected booleans, integers or floats, got dtype <U1"),
        (np.zeros(3, complex), "got dtype complex128"),
        (np.zeros(3, "M8[s]"), "x: expected booleans"),
        (np.array([0.0, np.nan, np.inf]), "x: expected finite numbers, .* at step 1"),
        (np.array([0.0, 1.0, -np.inf], np.float16), "x: expected finite numbers, .* at step 2"),
        ([0, 1, 2], "x: expected a numpy array, got list"),
    ],
)
def test_wrong_arrays_are_refused_by_name(array, message):
    with pytest.raises(InputError, match=message):
        Episodes({"good": np.zeros(3), "x": array}, np.array([3]))


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([], "at least one"),
        ([[3]], "shape"),
        (3, "shape"),
        ([3.0], "float64"),
        ([0, 3], "got 0 for episode 0 after 0"),
        ([-1, 3], "got -1 for episode 0"),
        ([2, 2, 3], "got 2 for episode 1 after 2"),
        ([3, 2], "got 2 for episode 1 after 3"),
        ([2], "x: expected 2 steps"),
        ([True], "bool"),
    ],
)
def test_wrong_ends_are_refused(ends, message):
    with pytest.raises(InputError, match=message) as caught:
        Episodes({"x": np.zeros(3)}, np.array(ends))
    assert "episode_ends" in str(caught.value)


def test_nan_is_found_far_inside_a_large_array(monkeypatch):
    monkeypatch.setattr("fmft_fast.data.episodes.BLOCK", 64)
    x = np.zeros((100, 5))
    x[97, 3] = np.nan
    with pytest.raises(InputError, match="at step 97"):
        Episodes({"x": x}, np.array([100]))


@pytest.mark.parametrize("name", ["", 3, "episode_ends"])
def test_wrong_names_are_refused(name):
    with pytest.raises(InputError, match="arrays: expected names"):
        Episodes({name: np.zeros(3)}, np.array([3]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.zeros(1)}, "y: expected in every episode or in none, .* only in episode 1"),
        ({"x": None}, "x: expected in every episode .* missing from episode 1"),
        ({"x": np.zeros((2, 3))}, "x of episode 1: expected float64 of shape \\[2\\]"),
        ({"x": np.zeros((2, 2), int)}, "x of episode 1: expected float64"),
        ({"g": np.zeros(3)}, "g of episode 1: expected 2 steps as in x, got 3"),
        ({"g": np.array([0.0, np.nan])}, "g of episode 1: expected finite numbers, .* at step 1"),
    ],
)
def test_episodes_of_a_list_must_be_alike(change, message):
    good = {"x": np.zeros((2, 2)), "g": np.zeros(2)}
    odd = {k: v for k, v in {**good, **change}.items() if v is not None}
    with pytest.raises(InputError, match=message):
        Episodes.from_list([good, odd])
    with pytest.raises(InputError, match="of clip 7|in clip 7|from clip 7"):
        Episodes.from_list([good, odd], labels=["clip 3", "clip 7"])


def test_an_empty_list_is_refused():
    with pytest.raises(InputError, match="at least one, got none"):
        Episodes.from_list([])
    with pytest.raises(InputError, match="at least one array"):
        Episodes({}, np.array([1]))
