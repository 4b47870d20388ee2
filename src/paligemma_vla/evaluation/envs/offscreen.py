"""Pictures of a MuJoCo scene on a machine without a screen: a graphics backend that works, and a fast fixed camera."""

from __future__ import annotations

import atexit
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.errors import SimulatorError

BACKEND_VARIABLE = "MUJOCO_GL"
BACKENDS = ("egl", "osmesa")
PROBE_SECONDS = 60
PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
with mujoco.Renderer(model, 16, 16) as renderer:
    renderer.update_scene(mujoco.MjData(model))
    renderer.render()
"""
REMEDY = "install one: on Debian or Ubuntu `sudo apt-get install libosmesa6` (where that is gone: libegl1 libgl1-mesa-dri)"


def ensure_backend() -> str:
    """Make `MUJOCO_GL` name a backend that can draw here, before mujoco is imported; returns its name.

    A value set by the user is respected. Otherwise, on Linux, EGL and OSMesa are tried by drawing a picture in a child
    process (a failed attempt leaves PyOpenGL bound to the wrong library, so it cannot be tried in this one). The choice
    is left in the environment, so worker processes inherit it and try nothing. Other systems need no choice.
    """
    chosen = os.environ.get(BACKEND_VARIABLE, "")
    if chosen or platform.system() != "Linux":
        return chosen
    failures = []
    for backend in BACKENDS:
        failure = _try_backend(backend)
        if failure is None:
            os.environ[BACKEND_VARIABLE] = backend
            return backend
        failures.append(f"{backend}: {failure}")
    raise SimulatorError("no graphics library can draw off screen; " + REMEDY + "\n  " + "\n  ".join(failures))


def _try_backend(backend: str) -> str | None:
    """Draw a picture with `backend` in a child process; returns None, or the last line of what went wrong."""
    command, environment = [sys.executable, "-c", PROBE], {**os.environ, BACKEND_VARIABLE: backend}
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no picture within {PROBE_SECONDS} s"
    if child.returncode == 0:
        return None
    lines = child.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {child.returncode}"


@dataclass(frozen=True)
class View:
    """A free camera: where it looks (x, y, z in metres), from how far (metres), and the two angles (degrees)."""

    lookat: tuple[float, float, float]
    distance: float
    azimuth: float
    elevation: float


class OffscreenCamera:
    """Draws one model from one view, upright, at one size.

    Shadows, reflections and multisampling are off: without a GPU they are 15/16 of the time. Sites are not drawn, because
    MuJoCo scenes mark the goal with one, and a policy must not see where the goal is.
    """

    def __init__(self, model: Any, size: int, view: View) -> None:
        import mujoco

        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        self._camera.lookat[:] = view.lookat
        self._camera.distance, self._camera.azimuth, self._camera.elevation = (
            view.distance,
            view.azimuth,
            view.elevation,
        )
        self._option = mujoco.MjvOption()
        self._option.sitegroup[:] = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(size, model.vis.global_.offwidth)
        model.vis.global_.offheight = max(size, model.vis.global_.offheight)
        try:
            self._renderer = mujoco.Renderer(model, size, size)
        except Exception as error:  # each backend raises an exception of its own, from ImportError to EGLError
            backend = os.environ.get(BACKEND_VARIABLE, "the default")
            raise SimulatorError(
                f"{BACKEND_VARIABLE}={backend} cannot draw here ({error}); unset it to let a backend be found, or {REMEDY}"
            ) from error
        # The backend ends itself at exit, before any destructor; a context freed after that is an error.
        atexit.register(self.close)
        flags = self._renderer.scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0

    def render(self, data: Any) -> NDArray[np.uint8]:
        """Picture (size, size, 3) uint8 RGB of the bodies in `data`, where the last forward pass has put them."""
        self._renderer.update_scene(data, self._camera, self._option)
        return np.array(self._renderer.render(), dtype=np.uint8)

    def close(self) -> None:
        """Free the graphics context; nothing can be drawn afterwards."""
        atexit.unregister(self.close)
        self._renderer.close()
