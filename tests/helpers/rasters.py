"""Scenes for the tests: in memory, and files of many kinds."""

import warnings
from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import ColorInterp

from common.io.look import Look
from common.io.raster import open_scene


class Memory:
    """What `common.predict.windows` reads of a scene; counts the pixels that are read."""

    def __init__(self, pixels, valid=None):
        self.path = Path("memory")
        self.pixels, self.valid, self.reads = pixels, valid, 0
        self.height, self.width = pixels.shape[:2]

    def read(self, x, y, width, height):
        part = (slice(y, y + height), slice(x, x + width))
        assert self.pixels[part].shape[:2] == (height, width)
        self.reads += height * width
        valid = None if self.valid is None else self.valid[part]
        return self.pixels[part].copy(), None if valid is None or valid.all() else valid


def raster(path, values, driver="GTiff", **profile):
    """Write values [B,H,W] as a raster; `colours` names the bands, `palette` maps values."""
    colours, palette = profile.pop("colours", None), profile.pop("palette", None)
    count, height, width = values.shape
    size = {"count": count, "height": height, "width": width, "dtype": values.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver=driver, **size, **profile) as file:
            if colours:
                file.colorinterp = [ColorInterp[colour] for colour in colours]
            if palette:
                file.write_colormap(1, palette)
            file.write(values)
    return path


def pixels_of(path, **look):
    """A whole scene as uint8 [H,W,3], RGB."""
    with open_scene(path, Look(**look)) as scene:
        return scene.read(0, 0, scene.width, scene.height)[0]


def read_all(path, **look):
    """The whole scene as `Scene.read` gives it, in two parts, and the scene's valid pixels."""
    with open_scene(path, Look(**look)) as scene:
        half = scene.height // 2
        parts = [
            scene.read(0, y, scene.width, h) for y, h in ((0, half), (half, scene.height - half))
        ]
    valid = [np.ones(p.shape[:2], bool) if v is None else v for p, v in parts]
    return np.concatenate([p for p, _ in parts]), np.concatenate(valid)
