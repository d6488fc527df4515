"""Readers of npz files, zarr replay buffers and relay arrays."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import sample_files as sample
from real_data import data_folder

from fmft_fast.data import Episodes, read_episodes
from fmft_fast.errors import InputError


def refused(path, *patterns, **options):
    """Assert that a path is refused with its name, and give the message."""
    with pytest.raises(InputError) as caught:
        read_episodes(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for pattern in patterns:
        assert pattern in message, message
    return message


# --- the real demonstrations


def test_npz_and_zarr_of_the_real_demonstrations_are_equal(monkeypatch):
    zarr = pytest.importorskip("zarr", reason="reads a zarr replay buffer")
    folder = data_folder("pusht")
    flat = read_episodes(folder / "pusht_lowdim.npz")
    read = []
    plain = zarr.Group.__getitem__
    monkeypatch.setattr(
        zarr.Group, "__getitem__", lambda self, name: (read.append(name), plain(self, name))[1]
    )
    chunked = read_episodes(folder / "pusht_cchi_v7_replay.zarr")
    assert (flat.count, flat.steps) == (206, 25_650)
    assert set(chunked.arrays) == set(flat.arrays) == {"state", "action", "keypoint", "n_contacts"}
    for name, array in flat.arrays.items():
        assert chunked[name].dtype == array.dtype == np.float32
        np.testing.assert_array_equal(chunked[name], array)
    np.testing.assert_array_equal(chunked.episode_ends, flat.episode_ends)
    # The images, 2.8 GB, were not touched.
    assert set(read) == {"meta/episode_ends", *(f"data/{name}" for name in flat.arrays)}


# --- npz


def test_npz_reads_named_arrays_and_leaves_images(tmp_path):
    steps = np.arange(5)
    episodes = Episodes({"x": steps, "img": np.zeros((5, 2, 2, 3), np.uint8)}, np.array([2, 5]))
    file = episodes.save(tmp_path / "a.npz")
    assert list(read_episodes(file).arrays) == ["x"]
    assert list(read_episodes(file, arrays=["img", "x", "img"]).arrays) == ["img", "x"]
    only = Episodes({"img": episodes["img"]}, episodes.episode_ends).save(tmp_path / "b.npz")
    assert read_episodes(only)["img"].shape == (5, 2, 2, 3)


def test_npz_written_by_numpy_is_read(tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", action=np.eye(3), episode_ends=np.array([1, 3]))
        assert read_episodes(tmp_path / "a.npz", "npz")["action"].shape == (3, 3)


@pytest.mark.parametrize(
    ("arrays", "patterns"),
    [
        ({"x": np.zeros(3)}, ["episode_ends: expected", "among x"]),
        ({"episode_ends": np.array([3])}, ["arrays: expected at least one"]),
        ({"x": np.zeros(3), "episode_ends": np.array([2])}, ["x: expected 2 steps"]),
        ({"x": np.zeros(3), "episode_ends": np.array([2, 2, 3])}, ["episode_ends", "increase"]),
        ({"x": np.zeros(3), "episode_ends": np.array([3.0])}, ["episode_ends", "float64"]),
        ({"x": np.full(3, np.nan), "episode_ends": np.array([3])}, ["x: expected finite"]),
        ({"x": np.array(1.0), "episode_ends": np.array([1])}, ["x: expected a non-empty array"]),
        ({"x": np.array([{}]), "episode_ends": np.array([1])}, ["x: expected an undamaged array"]),
        ({"x": np.array(["a"]), "episode_ends": np.array([1])}, ["x: expected booleans"]),
    ],
)
def test_npz_with_wrong_content_is_refused(tmp_path, arrays, patterns):
    np.savez(tmp_path / "a.npz", **arrays)
    refused(tmp_path / "a.npz", *patterns)


def test_npz_that_is_damaged_is_refused(tmp_path):
    file = sample.write_npz(tmp_path)
    whole = file.read_bytes()
    for content in (b"", b"garbage", whole[: len(whole) // 2], whole[: len(whole) - 10]):
        file.write_bytes(content)
        refused(file, "the file: expected a complete .npz archive")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("episode_ends.npy", b"\x93NUMPY\x01\x00")
    refused(file, "episode_ends: expected an undamaged array")


def test_unknown_names_are_refused_with_those_that_exist(tmp_path):
    file = sample.write_npz(tmp_path)
    refused(file, "colour: expected an array of the file, which has obs, action", arrays=["colour"])
    refused(file, "write ['obs']", arrays="obs")
    refused(file, "at least one", arrays=[])


# --- zarr


@pytest.fixture
def zarr():
    return pytest.importorskip("zarr", "3", reason="writes zarr replay buffers")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", ["buffer.zarr", "buffer.zarr.zip"])
def test_zarr_of_either_version_as_folder_and_archive(tmp_path, zarr, version, name):
    images = np.random.default_rng(0).integers(0, 255, (11, 4, 5, 3)).astype(np.uint8)
    path = sample.write_zarr(tmp_path / name, version, images=images)
    sample.assert_same(read_episodes(path), "obs", "action")
    assert list(read_episodes(path).arrays) == ["action", "obs"]
    np.testing.assert_array_equal(read_episodes(path, "zarr", ["img"])["img"], images)


def test_zarr_archive_that_holds_a_folder(tmp_path, zarr):
    path = sample.write_zarr(tmp_path / "deep.zarr", 2)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in path.rglob("*"):
            archive.write(file, f"data/deep.zarr/{file.relative_to(path)}")
    sample.assert_same(read_episodes(tmp_path / "a.zip"), "obs", "action")


def test_zarr_keeps_nested_names(tmp_path, zarr):
    root = zarr.open_group(str(tmp_path / "a"), mode="w", zarr_format=2)
    root.create_array("data/obs/object", shape=(2, 1), dtype="f4")[:] = 1
    root.create_array("meta/episode_ends", shape=(1,), dtype="i8")[:] = 2
    assert list(read_episodes(tmp_path / "a").arrays) == ["obs/object"]


def chunk_files(path, name):
    names = (".zarray", ".zattrs", "zarr.json")
    found = (path / "data" / name).rglob("*")
    return sorted(file for file in found if file.is_file() and file.name not in names)


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_with_a_missing_chunk_is_refused(tmp_path, zarr, version):
    path = sample.write_zarr(tmp_path / "a.zarr", version)
    chunk_files(path, "action")[1].unlink()
    refused(path, "data/action: expected 4 chunks, got 3")
    assert list(read_episodes(path, arrays=["obs"]).arrays) == ["obs"]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_zarr_with_a_damaged_chunk_is_refused(tmp_path, zarr, version, content):
    path = sample.write_zarr(tmp_path / "a.zarr", version)
    chunk_files(path, "action")[2].write_bytes(content)
    refused(path, "data/action")


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_with_a_truncated_chunk_is_refused(tmp_path, zarr, version):
    path = sample.write_zarr(tmp_path / "a.zarr", version)
    file = chunk_files(path, "obs")[1]
    whole = file.read_bytes()
    for length in range(0, len(whole), 3):
        file.write_bytes(whole[:length])
        refused(path, "data/obs", "in the chunk 1.0" if version == 2 else "steps 3 to 5: expected")


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_without_ends_or_with_a_damaged_description_is_refused(tmp_path, zarr, version):
    path = sample.write_zarr(tmp_path / "a.zarr", version)
    described = ".zarray" if version == 2 else "zarr.json"
    for content in ("", "{", "[]", '{"shape": "x"}', '{"node_type": "array"}'):
        file = path / "data" / "action" / described
        whole = file.read_text()
        file.write_text(content)
        refused(path, "data/action: expected")
        file.write_text(whole)
    (path / "meta" / "episode_ends" / described).unlink()
    refused(path, "meta/episode_ends: expected whole numbers")


def test_zarr_with_an_unknown_codec_is_refused_only_when_that_array_is_read(tmp_path, zarr):
    path = sample.write_zarr(tmp_path / "a.zarr", 2, images=np.ones((11, 4, 5, 3), np.uint8))
    file = path / "data" / "img" / ".zarray"
    file.write_text(json.dumps({**json.loads(file.read_text()), "compressor": {"id": "jpeg2k"}}))
    sample.assert_same(read_episodes(path), "obs", "action")
    refused(path, "data/img: expected it complete", "jpeg2k", "codec", arrays=["img"])


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_archive_that_is_damaged_is_refused(tmp_path, zarr, version):
    path = sample.write_zarr(tmp_path / "a.zarr.zip", version)
    whole = path.read_bytes()
    for content in (b"", b"garbage", whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused(path, "the archive: expected it complete")
    with zipfile.ZipFile(path, "w"):
        pass
    refused(path)


def test_zarr_with_wrong_numbers_is_refused(tmp_path, zarr):
    path = sample.write_zarr(tmp_path / "a.zarr", 2)
    group = zarr.open_group(str(path), mode="r+")
    group["data/obs"][3, 1] = np.nan
    refused(path, "obs: expected finite numbers, got NaN or infinity at step 3")
    group["meta/episode_ends"][:] = [4, 4, 11]
    refused(path, "episode_ends: expected numbers that increase", arrays=["action"])
    group["meta/episode_ends"][:] = [4, 5, 10]
    refused(path, "action: expected 10 steps", arrays=["action"])


# --- relay


@pytest.mark.parametrize("time_first", [True, False])
def test_relay_drops_the_padding_of_either_order(tmp_path, time_first):
    folder = sample.write_relay(tmp_path / "kitchen", time_first)
    episodes = read_episodes(folder)
    sample.assert_same(episodes, "observations_seq", "actions_seq")
    named = read_episodes(folder, "relay", ["actions_seq"])
    assert list(named.arrays) == ["actions_seq"]


def test_relay_takes_time_first_where_the_mask_allows_both(tmp_path):
    folder = tmp_path / "kitchen"
    folder.mkdir()
    x = np.arange(6.0).reshape(3, 2, 1)
    for name in ("observations_seq", "actions_seq"):
        np.save(folder / f"{name}.npy", x)
    np.save(folder / "existence_mask.npy", np.array([[1, 1], [1, 0], [1, 0]]))
    episodes = read_episodes(folder)
    assert episodes.lengths.tolist() == [3, 1]
    assert episodes["actions_seq"].ravel().tolist() == [0, 2, 4, 1]


@pytest.mark.parametrize("name", ["observations_seq", "actions_seq", "existence_mask"])
def test_relay_with_a_missing_or_damaged_file_is_refused(tmp_path, name):
    folder = sample.write_relay(tmp_path / "kitchen")
    file = folder / f"{name}.npy"
    whole = file.read_bytes()
    for content in (b"", b"garbage", whole[:-8], whole[:40]):
        file.write_bytes(content)
        refused(folder, f"{name}: expected an undamaged array")
    np.save(file, np.array([{}]), allow_pickle=True)
    refused(folder, f"{name}: expected an undamaged array")
    file.unlink()
    refused(folder, f"{name}: expected a file {name}.npy, got none")


@pytest.mark.parametrize(
    ("name", "array", "pattern"),
    [
        ("existence_mask", np.ones((6, 3, 1)), "existence_mask: expected numbers of shape"),
        ("existence_mask", np.ones((0, 3)), "existence_mask: expected numbers of shape"),
        ("existence_mask", np.array([["1"] * 3] * 6), "existence_mask: expected numbers"),
        ("existence_mask", np.full((6, 3), 0.5), "existence_mask: expected 0 or 1"),
        ("existence_mask", np.full((6, 3), np.nan), "existence_mask: expected 0 or 1"),
        ("existence_mask", np.zeros((6, 3)), "existence_mask: expected ones, then zeros"),
        ("existence_mask", np.eye(6)[:, :3], "existence_mask: expected ones, then zeros"),
        ("existence_mask", np.ones((5, 3)), "observations_seq: expected shape [5, 3, dim]"),
        ("actions_seq", np.ones((6, 4, 2)), "actions_seq: expected shape [6, 3, dim]"),
        ("actions_seq", np.ones((6, 3)), "actions_seq: expected shape [6, 3, dim]"),
        ("observations_seq", np.full((6, 3, 2), np.nan), "observations_seq: expected finite"),
        ("observations_seq", np.full((6, 3, 2), "a"), "observations_seq: expected booleans"),
    ],
)
def test_relay_with_wrong_content_is_refused(tmp_path, name, array, pattern):
    folder = sample.write_relay(tmp_path / "kitchen")
    np.save(folder / f"{name}.npy", array)
    refused(folder, pattern)


# --- any format


def test_what_is_no_known_format_is_refused(tmp_path):
    refused(tmp_path, "format: expected one of the known layouts", "robomimic: HDF5 with")
    (tmp_path / "a.txt").write_text("x")
    refused(tmp_path / "a.txt", "format: expected one of the known layouts")
    refused(tmp_path / "missing", "expected a file or folder, got none")
    refused(tmp_path, "expected auto or one of npz, zarr", format="hdf9")
    refused(sample.write_npz(tmp_path), "filter_key: expected with", filter_key="train")


@pytest.mark.parametrize(
    "format", ["npz", "zarr", "robomimic", "minari", "d4rl", "relay", "lerobot"]
)
def test_every_reader_refuses_a_wrong_kind_of_path(tmp_path, format):
    if format == "zarr":
        pytest.importorskip("zarr", reason="reads zarr replay buffers")
    if format in ("robomimic", "minari", "d4rl"):
        pytest.importorskip("h5py", reason="reads HDF5")
    (tmp_path / "file").write_bytes(b"garbage")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "file", format=format)
    refused(tmp_path / "folder", format=format)
