"""Pictures of roll-outs: GIF with pillow, mp4 with imageio-ffmpeg, and contact sheets."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmft_fast.envs.rollout import Episode
from fmft_fast.errors import InputError, MissingDependencyError

HOLD_S = 1.5  # for which a GIF shows its last picture
GAP, LINE = 4, 14  # pixels between pictures, and of a line of text


def write_video(frames: np.ndarray, file: str | Path, fps: float) -> Path:
    """Write a GIF or an mp4, as the file's suffix says.

    Args:
        frames: uint8, [n, height, width, 3].
        file: ends in .gif or .mp4; its folder is made.
        fps: pictures per second. A GIF counts in hundredths of a second.

    Raises:
        InputError: the suffix is another, or frames or fps make no sense.
        MissingDependencyError: pillow or imageio-ffmpeg is not installed.

    Example:
        [episode] = roll_out(policy, "pusht", [0], steps=4, record=[0])
        write_video(episode.frames, "start-0.gif", fps=10)
    """
    file = Path(file)
    writers = {".gif": write_gif, ".mp4": write_mp4}
    if file.suffix not in writers:
        raise InputError(f"{file}: expected a name that ends in .gif or .mp4")
    return writers[file.suffix](frames, file, fps)


def write_gif(frames: np.ndarray, file: str | Path, fps: float) -> Path:
    """Write a GIF that shows its last picture a little longer; see `write_video`."""
    image = _pillow("Image")
    file = _prepare(frames, file, fps)
    pictures = [image.fromarray(frame) for frame in frames]
    durations_ms = [max(20, round(100 / fps) * 10)] * len(pictures)
    durations_ms[-1] += int(1000 * HOLD_S)
    first, *others = pictures
    first.save(file, save_all=True, append_images=others, duration=durations_ms, loop=0)
    return file


def write_mp4(frames: np.ndarray, file: str | Path, fps: float) -> Path:
    """Write H.264, which takes even sizes only: an odd row or column at the end is cut off."""
    remedy = "pip install imageio-ffmpeg, or write a .gif"
    ffmpeg = _optional("imageio_ffmpeg", "imageio-ffmpeg", remedy)
    file = _prepare(frames, file, fps)
    height, width = (size - size % 2 for size in frames.shape[1:3])
    if not (height and width):
        raise InputError(f"frames: expected at least 2 x 2 pixels, got {list(frames.shape)}")
    writer = ffmpeg.write_frames(str(file), (width, height), fps=fps, macro_block_size=2)
    writer.send(None)
    try:
        for frame in frames:
            writer.send(np.ascontiguousarray(frame[:height, :width]))
    finally:
        writer.close()
    return file


def contact_sheet(
    episodes: Sequence[Episode],
    file: str | Path,
    *,
    pictures: int = 5,
    columns: int | None = None,
    width: int = 96,
) -> Path:
    """Draw one strip for each roll-out: its first, some middle and its last picture, and scores.

    Args:
        episodes: with frames, in the order of the page.
        file: a PNG; its folder is made.
        pictures: in a strip, at even times.
        columns: of strips; by default so many that the page is about square.
        width: of a picture, pixels; its height follows.

    Raises:
        InputError: there are no episodes, one has no frames, or a size is below 1.
        MissingDependencyError: pillow is not installed.

    Example:
        episodes = roll_out(policy, "pusht", range(8), steps=4, record=range(8))
        contact_sheet(episodes, "sheet.png")
    """
    image, draw, font = _pillow("Image"), _pillow("ImageDraw"), _pillow("ImageFont")
    if not episodes or min(pictures, width, columns or 1) < 1:
        raise InputError(
            f"expected episodes, and pictures, columns and width from 1 on, got {len(episodes)} "
            f"episodes, {pictures}, {columns} and {width}"
        )
    strips = [_strip(episode, pictures, width) for episode in episodes]
    tall = max(strip.shape[0] for strip in strips) + LINE + GAP
    wide = pictures * (width + GAP) + 2 * GAP
    if columns is None:
        columns = max(1, round(math.sqrt(len(strips) * tall / wide)))
    columns = min(columns, len(strips))
    lines = math.ceil(len(strips) / columns)
    page = image.new("RGB", (columns * wide, lines * (tall + GAP)), "white")
    pen, letters = draw.Draw(page), font.load_default()
    for i, (episode, strip) in enumerate(zip(episodes, strips, strict=True)):
        x, y = GAP + i % columns * wide, GAP + i // columns * (tall + GAP)
        pen.text((x, y), caption(episode), fill="black", font=letters)
        page.paste(image.fromarray(strip), (x, y + LINE))
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    page.save(file)
    return file


def caption(episode: Episode) -> str:
    """Say which start it was, what came of it, and after how many steps.

    Example:
        >>> caption(Episode(7, {"score": 0.83, "success": 0.0}, 300))
        'start 7: score 0.83, success 0, 300 steps'
    """
    scores = ", ".join(f"{name} {round(value, 2):g}" for name, value in episode.scores.items())
    return f"start {episode.start}: {scores}, {episode.length} steps"


def _strip(episode: Episode, pictures: int, width: int) -> np.ndarray:
    """Put pictures of an episode side by side, [height, about pictures * width, 3]."""
    if episode.frames is None:
        raise InputError(f"start {episode.start}: expected frames, got none; record it")
    image = _pillow("Image")
    frames = episode.frames
    height = max(1, round(frames.shape[1] * width / frames.shape[2]))
    strip = np.full((height, pictures * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for i, k in enumerate(np.linspace(0, len(frames) - 1, pictures).round().astype(int)):
        small = image.fromarray(frames[k]).resize((width, height), image.Resampling.LANCZOS)
        strip[:, i * (width + GAP) : i * (width + GAP) + width] = np.asarray(small)
    return strip


def _prepare(frames: np.ndarray, file: str | Path, fps: float) -> Path:
    """Check frames and rate, and make the folder."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size or frames.dtype != np.uint8:
        raise InputError(
            f"frames: expected uint8 [n, height, width, 3], got {frames.dtype} {list(frames.shape)}"
        )
    if not (fps > 0 and math.isfinite(fps)):
        raise InputError(f"fps: expected a number above 0, got {fps}")
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def require_pillow() -> None:
    """See that GIFs and contact sheets can be written, before anything is filmed for them.

    Raises:
        MissingDependencyError: pillow is not installed.
    """
    _pillow("Image")


def _pillow(module: str) -> Any:
    return _optional(f"PIL.{module}", "pillow", "pip install 'fmft-fast[pusht]'")


def _optional(module: str, package: str, remedy: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"pictures of this kind need the package {package}, which is not installed; {remedy}"
        ) from error
