"""The objects that the XML lists, each with its own colour and the extent of its pixels."""

from dataclasses import dataclass, field

import numpy as np

from rareplanes.render.aircraft import Drawing
from rareplanes.render.plan import Block
from rareplanes.render.view import Canvas


@dataclass
class Thing:
    """An object of the XML; its pixels are those of `colour` in the mask."""

    categories: tuple[str, ...]
    name: str
    colour: tuple[int, int, int]  # RGB
    low: np.ndarray  # its pixels lie between this corner (x, y) …
    high: np.ndarray  # … and this one, exclusive
    sockets: np.ndarray | None = None  # [4,2] pixels
    drawing: Drawing | None = None
    bridge: Block | None = None
    extent: tuple[int, int, int, int] = (0, 0, 0, 0)
    area: int = 0


@dataclass
class Palette:
    """Gives each object a mask colour that nothing else in the scene has."""

    rng: np.random.Generator
    used: set[tuple[int, int, int]] = field(default_factory=set)

    def take(self) -> tuple[int, int, int]:
        while True:
            r, g, b = (int(v) for v in self.rng.integers(5, 251, 3))
            # Nearly grey colours belong to the ground's texture.
            if max(r, g, b) - min(r, g, b) > 12 and (r, g, b) not in self.used:
                self.used.add((r, g, b))
                return r, g, b


def overlap(low: np.ndarray, high: np.ndarray, size: np.ndarray) -> tuple[tuple, tuple]:
    """Slices of the scene and of the patch where a patch covers the scene."""
    a = np.clip(low, 0, size).astype(int)
    b = np.clip(high, 0, size).astype(int)
    b = np.maximum(a, b)
    scene = (slice(a[1], b[1]), slice(a[0], b[0]))
    x, y = (a - low).astype(int), (b - low).astype(int)
    return scene, (slice(x[1], y[1]), slice(x[0], y[0]))


def measure(canvas: Canvas, things: list[Thing]) -> None:
    """Set area and inclusive extent of each object's pixels; the extent of no pixels is a point."""
    size = np.array(canvas.mask.shape[1::-1])
    for thing in things:
        inside, _ = overlap(thing.low, thing.high, size)
        ys, xs = np.nonzero((canvas.mask[inside] == thing.colour[::-1]).all(-1))
        thing.area = len(xs)
        if thing.area:
            left, top = inside[1].start, inside[0].start
            corners = (xs.min() + left, ys.min() + top, xs.max() + left, ys.max() + top)
        else:
            middle = np.clip((thing.low + thing.high) / 2, 0, size - 1).astype(int)
            corners = (*middle, *middle)
        thing.extent = tuple(int(v) for v in corners)  # type: ignore[assignment]
