"""Pictures of what mujoco simulates, with no screen."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from fmft_fast.errors import MissingDependencyError


class Canvas:
    """Draws one simulation into arrays. On Linux OSMesa draws, unless $MUJOCO_GL names another.

    Args:
        model, data: mujoco's.
        size: of the square pictures, pixels.
        camera: name of one of the model's cameras, or attributes of a free one: "distance" in
            metres, "azimuth" and "elevation" in degrees, "lookat" in metres [3].

    Raises:
        MissingDependencyError: the backend does not work here.
    """

    def __init__(self, model: Any, data: Any, size: int, camera: str | Mapping[str, Any]) -> None:
        if sys.platform.startswith("linux"):
            os.environ.setdefault("MUJOCO_GL", "osmesa")
        # Smoothed edges, shadows and reflections take 95 % of the time of a picture on a CPU.
        model.vis.quality.offsamples = 0
        try:
            drawing = importlib.import_module("gymnasium.envs.mujoco.mujoco_rendering")
            self._viewer: Any = drawing.OffScreenViewer(model, data, size, size)
        except Exception as error:  # each backend fails in its own way, some with AttributeError
            raise MissingDependencyError(
                f"drawing with MUJOCO_GL={os.environ.get('MUJOCO_GL')} failed "
                f"({type(error).__name__}: {error}); install OSMesa and its binding (apt install "
                f"libosmesa6; pip install 'gymnasium[mujoco]' pyopengl), or set MUJOCO_GL to egl "
                f"(GPU) or glfw (screen)"
            ) from error
        flags: Any = importlib.import_module("mujoco").mjtRndFlag
        for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION):
            self._viewer.scn.flags[flag] = 0
        self._camera = model.camera(camera).id if isinstance(camera, str) else None
        if not isinstance(camera, str):
            for name, value in camera.items():
                setattr(self._viewer.cam, name, value)

    def draw(self) -> np.ndarray:
        """Draw the present state, uint8 [size, size, 3]."""
        self._viewer.make_context_current()  # several may draw in turn
        return np.ascontiguousarray(self._viewer.render("rgb_array", camera_id=self._camera))

    def close(self) -> None:
        """Free what the backend holds; it is not used again."""
        self._viewer.make_context_current()
        self._viewer.close()
