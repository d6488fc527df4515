"""The reader of LeRobot data sets, versions 2 and 3."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sample_files as sample
from test_read_arrays import refused

from fmft_fast.data import read_episodes

pa = pytest.importorskip("pyarrow", reason="reads parquet files")
parquet = pytest.importorskip("pyarrow.parquet", reason="reads parquet files")
VERSIONS = ("v2.0", "v2.1", "v3.0")


@pytest.fixture(params=["v2.1", "v3.0"])
def folder(request, tmp_path):
    return sample.write_lerobot(tmp_path / "set", request.param)


def files(folder):
    return sorted((folder / "data" / "chunk-000").glob("*.parquet"))


def edit_info(folder, **changes):
    file = folder / "meta" / "info.json"
    info = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in info.items() if v is not None}))


def edit_column(file, name, column):
    table = parquet.read_table(file)
    place = table.schema.names.index(name)
    table = table.remove_column(place)
    if column is not None:
        table = table.append_column(name, column)
    parquet.write_table(table, file)


@pytest.mark.parametrize("version", VERSIONS)
def test_versions(tmp_path, version):
    folder = sample.write_lerobot(tmp_path / "set", version)
    episodes = read_episodes(folder)
    sample.assert_same(episodes, "observation.state", "action")
    assert episodes["observation.state"].dtype == np.float32
    assert episodes["observation.grid"].shape == (11, 2, 4)
    assert episodes["timestamp"].shape == (11, 1)
    assert not {"observation.image", "observation.video"} & set(episodes.arrays)
    named = read_episodes(folder, "lerobot", ["action"])
    assert list(named.arrays) == ["action"]


def test_many_files_are_read_in_the_order_of_their_numbers(tmp_path):
    folder = sample.write_lerobot(tmp_path / "set", "v2.1")
    table = parquet.read_table(files(folder)[0])
    other = folder / "data" / "chunk-001"
    other.mkdir()
    for k in range(3, 15):
        new = table.set_column(
            table.schema.names.index("episode_index"), "episode_index", [[k] * 4]
        )
        parquet.write_table(new, other / f"episode_{k:06d}.parquet")
    edit_info(folder, total_episodes=15, total_frames=11 + 12 * 4)
    assert read_episodes(folder).lengths.tolist() == [4, 1, 6] + [4] * 12


def test_images_are_refused_when_named(folder):
    message = "observation.image: expected an array of the file, which has observation.state"
    refused(folder, message, arrays=["observation.image"])


def test_a_missing_file_is_refused(folder):
    files(folder)[0].unlink()
    refused(folder, "episode_index: expected episode 0, got")


def test_a_missing_last_file_is_refused(folder):
    files(folder)[-1].unlink()
    refused(folder, "meta/info.json, total_episodes: expected 3", "got 2")


def test_missing_files_in_the_middle_are_refused(tmp_path):
    folder = sample.write_lerobot(tmp_path / "set", "v2.1")
    files(folder)[1].unlink()
    refused(folder, "episode_index: expected episode 1, got 2")


def test_no_files_are_refused(folder):
    for file in files(folder):
        file.unlink()
    refused(folder, "data: expected files chunk-*/*.parquet, got none")


def test_damaged_files_are_refused(folder):
    file = files(folder)[-1]
    whole = file.read_bytes()
    for content in (b"", b"garbage", whole[: len(whole) // 2], whole[:-3], b"PAR1" + whole[4:-9]):
        file.write_bytes(content)
        refused(folder, f"data/chunk-000/{file.name}: expected a complete parquet file")


def test_missing_frames_are_refused(folder):
    file = files(folder)[-1]
    table = parquet.read_table(file)
    parquet.write_table(pa.concat_tables([table[:2], table[3:]]), file)
    refused(folder, "frame_index: expected 2 at step 7, in episode 2, got 3")
    parquet.write_table(table[:-1], file)
    refused(folder, "total_frames: expected 11", "got 10")


@pytest.mark.parametrize(
    ("name", "column", "pattern"),
    [
        ("action", None, "column action: expected numbers, got no such column"),
        ("frame_index", None, "column frame_index: expected numbers, got no such column"),
        ("action", pa.array([[1.0, None]] * 6), "column action: expected a number in every frame"),
        ("action", pa.array([[1.0, 2.0]] * 5 + [None]), "got 1 empty entries"),
        ("action", pa.array([[1.0]] * 3 + [[1.0] * 3] * 3), "column action: expected shape [2]"),
        ("action", pa.array([[1.0] * 3] * 6), "column action: expected shape [2]"),
        ("action", pa.array([1.0] * 6), "column action: expected shape [2]"),
        ("action", pa.array([["a", "b"]] * 6), "column action: expected numbers, got string"),
        ("action", pa.array([{"x": 1.0}] * 6), "column action: expected shape"),
        ("action", pa.array([[1.0, float("nan")]] * 6), "action: expected finite numbers"),
        ("observation.grid", pa.array([[[0.0] * 2] * 4] * 6), "grid: expected shape [2, 4]"),
        ("episode_index", pa.array([2.5] * 6), "episode_index: expected episode 2, got 2.5"),
    ],
)
def test_wrong_columns_are_refused(folder, name, column, pattern):
    edit_column(files(folder)[-1], name, column)
    message = refused(folder, pattern)
    assert "finite" in message or "episode 2," in message or files(folder)[-1].name in message


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"codebase_version": "v2.1"}', "KeyError ('features')"),
        ('{"features": {}}', "KeyError ('codebase_version')"),
        ('{"codebase_version": "v2.1", "features": []}', "AttributeError"),
        ('{"codebase_version": "v2.1", "features": {"a": {"dtype": "float32"}}}', "'shape'"),
        ('{"codebase_version": "v2.1", "features": {"a": {"shape": [1]}}}', "'dtype'"),
        (
            '{"codebase_version": "v2.1", "features": {"a": {"dtype": "f", "shape": ["x"]}}}',
            "shape ['x'] of a",
        ),
        ('{"codebase_version": "v1.6", "features": {}}', "codebase_version: expected v2.x or v3.x"),
        ('{"codebase_version": "v2.1", "features": {}}', "arrays: expected at least one"),
    ],
)
def test_a_wrong_description_is_refused(folder, content, pattern):
    (folder / "meta" / "info.json").write_text(content)
    refused(folder, pattern)


def test_a_feature_without_column_is_refused(folder):
    info = json.loads((folder / "meta" / "info.json").read_text())
    new = {"dtype": "float32", "shape": [2]}
    edit_info(folder, features={**info["features"], "gripper": new})
    refused(
        folder, f"{files(folder)[0].name}, column gripper: expected numbers, got no such column"
    )
