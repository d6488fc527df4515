"""GIF, mp4 and contact sheets hold the pictures that went in."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from fmft_fast.envs.rollout import Episode
from fmft_fast.envs.video import caption, contact_sheet, write_gif, write_video
from fmft_fast.errors import InputError, MissingDependencyError

pillow = pytest.importorskip("PIL.Image", reason="needs pillow")
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255]], np.uint8)


def frames(n=5, height=20, width=30):
    return np.ascontiguousarray(
        np.broadcast_to(COLOURS[:n, None, None], (n, height, width, 3)), dtype=np.uint8
    )


def test_a_gif_holds_all_pictures_and_shows_the_last_one_longer(tmp_path):
    file = write_video(frames(), tmp_path / "new" / "a.gif", fps=10)
    with pillow.open(file) as gif:
        assert gif.n_frames == 5 and gif.size == (30, 20) and gif.info["loop"] == 0
        for i, colour in enumerate(COLOURS):
            gif.seek(i)
            assert gif.info["duration"] == (1600 if i == 4 else 100)
            assert gif.convert("RGB").getpixel((15, 10)) == tuple(colour)


def test_a_gif_takes_rates_that_are_no_whole_hundredths(tmp_path):
    with pillow.open(write_gif(frames(2), tmp_path / "a.gif", fps=12.5)) as gif:
        assert gif.info["duration"] == 80


def test_an_mp4_holds_all_pictures(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs imageio-ffmpeg")
    film = np.repeat(frames(5, 65, 97), 4, axis=0)
    file = write_video(film, tmp_path / "a.mp4", fps=10)
    reader = ffmpeg.read_frames(str(file))
    about = next(reader)
    shown = [np.frombuffer(data, np.uint8).reshape(64, 96, 3) for data in reader]
    assert about["source_size"] == (96, 64) and about["fps"] == 10 and len(shown) == 20
    # Colours lose a little in compression.
    assert all(abs(shown[4 * i][30, 40].astype(int) - COLOURS[i]).max() < 40 for i in range(5))


def test_an_mp4_without_its_package_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(MissingDependencyError, match=r"imageio-ffmpeg, or write a \.gif"):
        write_video(frames(), tmp_path / "a.mp4", fps=10)


def test_a_contact_sheet_shows_first_middle_and_last_pictures(tmp_path):
    episodes = [Episode(3, {"score": 0.5}, 4, frames()), Episode(8, {"score": 1.0}, 2, frames(3))]
    file = contact_sheet(episodes, tmp_path / "sheets" / "a.png", pictures=3, columns=1, width=60)
    page = np.asarray(pillow.open(file))
    height = 40
    line = page.shape[0] // 2
    for i, colours in enumerate([COLOURS[[0, 2, 4]], COLOURS[:3]]):
        middle = i * line + 4 + 14 + height // 2
        for k, colour in enumerate(colours):
            assert page[middle, 4 + k * 64 + 30].tolist() == colour.tolist()
        text = page[i * line + 4 : i * line + 16, :180]
        assert (text < 128).any()  # its caption


def test_a_long_sheet_has_several_columns(tmp_path):
    episodes = [Episode(i, {"score": 0.5}, 4, frames()) for i in range(40)]
    with pillow.open(contact_sheet(episodes, tmp_path / "a.png")) as page:
        assert 0.4 < page.width / page.height < 2.5


def test_captions_say_start_scores_and_length():
    episode = Episode(7, {"score": 0.8299, "success": 0.0}, 300)
    assert caption(episode) == "start 7: score 0.83, success 0, 300 steps"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda to: write_video(frames(), to / "a.avi", 10), r"ends in \.gif or \.mp4"),
        (lambda to: write_gif(frames().astype(float), to / "a.gif", 10), "expected uint8"),
        (lambda to: write_gif(frames()[0], to / "a.gif", 10), r"\[n, height, width, 3\]"),
        (lambda to: write_gif(frames()[:0], to / "a.gif", 10), "frames: expected"),
        (lambda to: write_gif(frames(), to / "a.gif", 0), "fps: expected a number above 0"),
        (lambda to: contact_sheet([], to / "a.png"), "expected episodes"),
        (lambda to: contact_sheet([Episode(4, {}, 3)], to / "a.png"), "start 4: expected frames"),
    ],
)
def test_what_makes_no_sense_is_refused(call, words, tmp_path):
    with pytest.raises(InputError, match=words):
        call(tmp_path)
