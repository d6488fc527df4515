"""Figures: written as PNG with the size asked for, true to their data, clear without matplotlib."""

from __future__ import annotations

import struct
import sys

import pytest
import torch

from fmft_fast.analysis import plots
from fmft_fast.errors import InputError, MissingDependencyError

RESULTS = {
    name: {n: {"off": scale / n, "gap": scale * 1e-3 / n - 5e-4} for n in (1, 2, 10)}
    for name, scale in (("before", 0.5), ("after", 0.3))
}


def png_size(file) -> tuple[int, int]:
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def draw_all(out) -> list:
    states = torch.randn(3, 20, 2)
    grid = torch.rand(31, 31) * 6
    halves = (torch.arange(31) > 15).long().expand(31, 31)
    return [
        plots.trajectories(
            {"before": {2: states}, "after": {2: states}}, torch.zeros(1, 2), 1.0, out / "a.png"
        ),
        plots.error_map(
            {"before": {2: grid, 10: grid}}, {"before": {2: halves, 10: halves}}, 3.0, out / "b.png"
        ),
        plots.quality(
            RESULTS, {"off": 0.01, "gap": 1e-4}, out / "c.png", titles={"off": "Off", "gap": "Gap"}
        ),
        plots.training_curves(
            {
                "run": [
                    {"kind": "train", "step": 1, "loss": 2.0},
                    {"kind": "train", "step": 2, "loss": None},
                    {"kind": "eval", "step": 2, "heldout": 1.0},
                ]
            },
            out / "d.png",
        ),
        plots.image_grid({"x": torch.rand(5, 8, 8), "y": torch.rand(3, 8, 8)}, out / "e.png"),
    ]


def test_every_figure_is_a_png_in_a_folder_that_is_made(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    files = draw_all(tmp_path / "deep" / "down")
    assert [f.name for f in files] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    for file in files:
        width, height = png_size(file)
        assert width > 300 and height > 100


def test_figures_do_not_touch_the_global_state_of_pyplot(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    before = "matplotlib.pyplot" in sys.modules
    draw_all(tmp_path)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_training_loss_and_heldout_measure_do_not_share_an_axis(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, file: figures.append(figure) or file)
    records = [
        {"kind": "train", "step": 1, "loss": 2.0},
        {"kind": "eval", "step": 2, "loss": 2.0, "heldout": 0.5},
    ]
    plots.training_curves({"fine-tuning": records}, tmp_path / "a.png")
    above, below = figures[0].axes
    assert [list(axis.lines[0].get_ydata()) for axis in (above, below)] == [[2.0], [0.5]]
    assert above.get_ylabel() == "training loss" and "mean distance" in below.get_ylabel()


def test_share_of_noise_is_weighted_by_the_normal_density():
    line = torch.linspace(-4, 4, 401)
    inside = (line[:, None].square() + line.square()).sqrt() < 1
    assert plots._gaussian_share(inside, 4.0) == pytest.approx(0.3935, abs=0.005)


def test_other_formats_and_missing_matplotlib_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    with pytest.raises(InputError, match="a.jpg"):
        plots.image_grid({"x": torch.rand(1, 8, 8)}, tmp_path / "a.jpg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"fmft-fast\[train\]"):
        plots.image_grid({"x": torch.rand(1, 8, 8)}, tmp_path / "a.png")


def test_medians_are_drawn_with_a_legend_that_fits_and_numbers_that_read(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, file: drawn.append(figure) or file)
    points = [(10.0**k, 0.01 * 5**k, 0.02 * 5**k, 0.03 * 5**k) for k in range(8)]
    lines = {f"a rather long name of line {k}": points for k in range(6)}
    plots.medians({"one": lines, "two": lines}, tmp_path / "m.png", xlabel="x")
    (figure,) = drawn
    figure.draw_without_rendering()
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    labels = [label.get_text() for axis in figure.axes for label in axis.get_yticklabels()]
    assert "0.1" in labels and not any("10^" in label for label in labels)
    with pytest.raises(InputError, match="at most 14 lines, got 15; draw fewer"):
        many = dict.fromkeys("abcdefghijklmno", points)
        plots.medians({"": many}, tmp_path / "m.png", xlabel="x")


def test_a_long_legend_takes_no_room_from_the_panels(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, file: drawn.append(figure) or file)
    points = [(1, 0.1, 0.2, 0.3), (4, 0.2, 0.3, 0.4)]
    for count in (2, 14):
        lines = {f"a name too long for two of them side by side, {k}": points for k in range(count)}
        plots.medians({"one": lines}, tmp_path / "m.png", xlabel="x")
    for figure in drawn:
        figure.draw_without_rendering()
    short, long = (figure.axes[0].get_window_extent().height for figure in drawn)
    assert abs(long - short) < 0.25 * short


def test_scores_have_a_linear_axis_from_zero(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, file: drawn.append(figure) or file)
    panels = {"success": {"a": [(1, 0.01, 0.02, 0.04), (16, 0.5, 0.6, 0.7)]}}
    for log_y in (True, False):
        plots.medians(panels, tmp_path / "m.png", xlabel="N", log_y=log_y)
    logarithmic, linear = (figure.axes[0] for figure in drawn)
    assert logarithmic.get_yscale() == "log" and linear.get_yscale() == "linear"
    assert linear.get_ylim()[0] == 0


def test_no_two_of_fourteen_lines_look_alike_and_zeros_are_drawn(tmp_path, monkeypatch, recwarn):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, file: drawn.append(figure) or file)
    names = "abcdefghijklmn"
    panels = {"": dict.fromkeys(names, [(1, 0.0, 0.0, 0.0), (4, 0.0, 0.0, 0.0)])}
    plots.medians(panels, tmp_path / "m.png", xlabel="N")
    lines = drawn[0].axes[0].get_lines()
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
    assert [line.get_label() for line in lines] == list(names) and len(looks) == len(names)
    assert not recwarn.list
