"""The camera, the canvas that is drawn on, and the textures of the ground."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np

from rareplanes.render.plan import rotation

SHIFT = 4  # fractional bits of the coordinates handed to OpenCV
TILE = 1024  # texels of a texture, which repeats


@dataclass(frozen=True)
class View:
    """A camera over the plan; directions are those of the screen, x right and y down."""

    width: int
    height: int
    ppm: float  # pixels per metre
    centre: tuple[float, float]
    yaw: float
    lean: np.ndarray  # [2] metres a point moves per metre of height
    sun: np.ndarray  # [3] unit vector towards the sun

    def screen(self, points: np.ndarray, z: float = 0.0) -> np.ndarray:
        """World metres [...,2] at height z to pixels [...,2]."""
        turned = (points - np.array(self.centre)) @ rotation(self.yaw)
        return (turned + z * self.lean) * self.ppm + (self.width / 2, self.height / 2)

    def sees(self, low: np.ndarray, high: np.ndarray, margin: float = 0.0) -> Any:
        """Which boxes [...,2], in pixels, overlap the picture widened by `margin`: [...] bool."""
        size = (self.width + margin, self.height + margin)
        return ((high >= -margin) & (low < size)).all(-1)


@dataclass
class Canvas:
    """The arrays of a scene, drawn together so that they agree: [H,W] or [H,W,3], uint8 BGR."""

    image: np.ndarray
    mask: np.ndarray
    material: np.ndarray
    shadow: np.ndarray
    dirt: np.ndarray


def fixed(pixels: np.ndarray) -> np.ndarray:
    """Pixels as OpenCV's fixed-point numbers."""
    return np.round(pixels * (1 << SHIFT)).astype(np.int32)


def fill(target: np.ndarray, pixels: np.ndarray, colour: Any, line: int = cv2.LINE_8) -> None:
    cv2.fillPoly(target, [fixed(pixels)], colour, line, SHIFT)


def stroke(
    target: np.ndarray, pixels: np.ndarray, colour: Any, width: float, line: int = cv2.LINE_8
) -> None:
    """Draw a polyline, at least one pixel wide."""
    thickness = max(1, round(width))
    cv2.polylines(target, [fixed(pixels)], False, colour, thickness, line, SHIFT)


@cache
def textures() -> dict[str, np.ndarray]:
    """Repeating float32 textures of mean 0 and deviation 1, the same in every process."""
    rng = np.random.default_rng(7)
    f = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None]) * TILE
    f[0, 0] = np.inf

    def noise(power: float, low: float = 1.0) -> np.ndarray:
        spectrum = np.fft.rfft2(rng.standard_normal((TILE, TILE))) * f**-power * (f >= low)
        field = np.fft.irfft2(spectrum)
        return (field / field.std()).astype(np.float32)

    slabs = rng.normal(0, 0.4, (32, 32)) + rng.normal(0, 0.5, 32)  # and lanes of slabs
    slabs = slabs.repeat(32, 0).repeat(32, 1)
    slabs[::32] = slabs[:, ::32] = -2.6
    slabs[1::32] = slabs[:, 1::32] = -1.2
    return {
        "coarse": noise(1.7),
        "middle": noise(1.1, 6),
        "fine": noise(0.35, 30),
        "cloud": noise(1.9),
        "slabs": slabs.astype(np.float32),
        "white": rng.standard_normal((TILE, TILE)).astype(np.float32),
    }


def texture(
    view: View, name: str, texel: float, shift: float | np.ndarray = 0.0, shrink: int = 1
) -> np.ndarray:
    """A texture fixed to the ground: [H,W] float32. A texel is `texel` metres wide.

    Only every `shrink`-th pixel is sampled, which is enough where there is no fine detail.
    """
    turn = rotation(view.yaw) / view.ppm
    start = np.array(view.centre) + shift - turn @ (view.width / 2, view.height / 2)
    matrix = np.column_stack((turn * shrink, start)) / texel
    size = (-(-view.width // shrink), -(-view.height // shrink))
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    field = cv2.warpAffine(textures()[name], matrix, size, flags=flags, borderMode=cv2.BORDER_WRAP)
    return field if shrink == 1 else cv2.resize(field, (view.width, view.height))


def visible(
    view: View, items: Sequence[Any], margin: float = 0.0
) -> Iterator[tuple[Any, np.ndarray]]:
    """The items of a plan that are in the picture at least in part, with their points in pixels."""
    if not items:
        return
    pixels = view.screen(np.concatenate([item.points for item in items]))
    starts = np.cumsum([0] + [len(item.points) for item in items])
    low = np.minimum.reduceat(pixels, starts[:-1])
    high = np.maximum.reduceat(pixels, starts[:-1])
    for i in np.flatnonzero(view.sees(low, high, margin)).tolist():
        yield items[i], pixels[starts[i] : starts[i + 1]]
