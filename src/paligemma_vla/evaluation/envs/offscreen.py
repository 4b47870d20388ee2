"""Pictures of a MuJoCo scene on a machine without a screen: a graphics backend that works, and a fast fixed camera."""

from __future__ import annotations

import atexit
import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


Vector = NDArray[np.float64]
HIDDEN_GROUP = 5  # a group of geoms that MuJoCo does not draw unless asked to
VIEW_MARGIN = 0.05  # widening of the view within which a mesh still counts as seen


@dataclass(frozen=True)
class View:
    """A free camera: where it looks (x, y, z in metres), from how far (metres), and the two angles (degrees)."""

    lookat: tuple[float, float, float]
    distance: float
    azimuth: float
    elevation: float


@dataclass(frozen=True)
class Disc:
    """A flat mark: its middle (x, y, z) and radius in metres, and colour (red, green, blue, opacity)."""

    middle: tuple[float, float, float]
    radius: float
    colour: tuple[float, float, float, float]


class Meshes:
    """A model's meshes, by which those out of view are found: leaving them out changes no pixel where there are neither
    shadows nor reflections, and MuJoCo would draw them all."""

    def __init__(self, model: Any) -> None:
        import mujoco

        self._model, self._groups = model, model.geom_group.copy()
        self._numbers = np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_MESH)
        centre, half = model.geom_aabb[self._numbers, None, :3], model.geom_aabb[self._numbers, None, 3:]
        self._corners = centre + half * np.array(list(itertools.product((-1, 1), repeat=3)))  # (G, 8, 3), geom frame, metres

    @contextmanager
    def hidden(self, data: Any, eye: Vector, axes: Vector, fovy: float) -> Iterator[None]:
        """Hide what a camera does not see. eye: where it is (3,). axes: right, up and back as columns (3, 3). fovy: degrees."""
        self._model.geom_group[self._numbers[self._out_of_view(data, eye, axes, fovy)]] = HIDDEN_GROUP
        try:
            yield
        finally:
            self._model.geom_group[:] = self._groups

    def _out_of_view(self, data: Any, eye: Vector, axes: Vector, fovy: float) -> NDArray[np.bool_]:
        """Which meshes (G,) have all corners of their bounding box beyond one side of the picture."""
        tangent = (1 + VIEW_MARGIN) * np.tan(np.deg2rad(fovy) / 2)
        rotation = data.geom_xmat[self._numbers].reshape(-1, 3, 3)
        corners = self._corners @ rotation.transpose(0, 2, 1) + data.geom_xpos[self._numbers, None] - eye  # (G, 8, 3), world
        right, up, back = np.moveaxis(corners @ axes, -1, 0)
        out = np.zeros(len(self._numbers), bool)
        for offset in (right, up):
            out |= (offset > -tangent * back).all(-1) | (-offset > -tangent * back).all(-1)
        return out


class OffscreenCamera:
    """Draws one model from one view, at one size.

    Shadows, reflections and multisampling are off: without a GPU they are 15/16 of the time. Meshes out of view are left
    out, which takes two fifths off what is left. view: a free camera, or the name of one of the model's. sites: draw them.
    MuJoCo scenes mark the goal with one, and a policy must not see where the goal is, unless a benchmark shows it.
    """

    def __init__(self, model: Any, size: int, view: View | str, sites: bool = False) -> None:
        import mujoco

        self._camera = mujoco.MjvCamera()
        if isinstance(view, View):
            self._camera.type = mujoco.mjtCamera.mjCAMERA_FREE
            self._camera.lookat[:] = view.lookat
            self._camera.distance = view.distance
            self._camera.azimuth, self._camera.elevation = view.azimuth, view.elevation
        else:
            self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
            self._camera.fixedcamid = model.camera(view).id
        self._option = mujoco.MjvOption()
        if not sites:
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
        self._model, self._meshes = model, Meshes(model)

    def render(self, data: Any, mark: Disc | None = None) -> NDArray[np.uint8]:
        """Picture (size, size, 3) uint8 RGB of the bodies in `data`, where the last forward pass has put them, and a mark."""
        with self._meshes.hidden(data, *self._look(data)):
            self._renderer.update_scene(data, self._camera, self._option)
        if mark is not None:
            self._add(mark)
        return np.array(self._renderer.render(), dtype=np.uint8)

    def _add(self, mark: Disc) -> None:
        import mujoco

        scene, size = self._renderer.scene, (mark.radius, 1e-4, 0.0)
        kind, turn = mujoco.mjtGeom.mjGEOM_CYLINDER, np.eye(3).ravel()
        mujoco.mjv_initGeom(scene.geoms[scene.ngeom], kind, size, mark.middle, turn, np.array(mark.colour, np.float32))
        scene.ngeom += 1

    def _look(self, data: Any) -> tuple[Vector, Vector, float]:
        """Eye, axes and field of view."""
        if (number := self._camera.fixedcamid) >= 0:
            return data.cam_xpos[number], data.cam_xmat[number].reshape(3, 3), float(self._model.cam_fovy[number])
        pitch, yaw = np.deg2rad(self._camera.elevation), np.deg2rad(self._camera.azimuth)
        forward = np.array([np.cos(pitch) * np.cos(yaw), np.cos(pitch) * np.sin(yaw), np.sin(pitch)])
        right = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
        eye = self._camera.lookat - self._camera.distance * forward
        axes = np.stack([right, np.cross(right, forward), -forward], axis=1)
        return eye, axes, float(self._model.vis.global_.fovy)

    def close(self) -> None:
        """Free the graphics context; nothing can be drawn afterwards."""
        atexit.unregister(self.close)
        self._renderer.close()
