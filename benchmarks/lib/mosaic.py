"""Scenes of any size out of rendered ones, and the memory that predicting them takes."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.windows import Window
from torch import Tensor, nn

from common.augment import normalise
from common.cli import keep_freed_memory
from common.io.raster import open_scene
from common.predict.folder import semantic_parser
from common.predict.semantic import predict_scene
from rareplanes.scene import scene_files, scene_stems


def one_layer(folder: Path) -> tuple[float, float]:
    """Predict `scene.tif`: CPU seconds, and peak MB over those before.

    The time is the median of three predictions after the first, as in a folder of scenes: the first
    one also pays for imports and for memory that the kernel hands out page by page.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    layer = nn.Conv2d(3, 2, 3, padding=1).requires_grad_(False)
    layer.weight.zero_()
    layer.weight[1, :, 1, 1] = 4  # bright pixels are aircraft
    layer.bias = nn.Parameter(torch.tensor([0.0, -16]), requires_grad=False)

    def network(crops: Tensor) -> Tensor:
        return layer(normalise(crops)).softmax(1)

    network(torch.zeros(4, 512, 512, 3, dtype=torch.uint8))
    words = [__file__, str(folder / "scene.tif"), str(folder), "--window", "512"]
    args = semantic_parser("").parse(words)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident memory
    seconds, before = [], _resident("VmRSS")
    for turn in range(4):
        since = time.process_time()
        with open_scene(folder / "scene.tif") as scene:
            predict_scene(scene, "out", network, ["ground", "aircraft"], args)
        seconds.append(time.process_time() - since)
        if turn == 0:
            peak = _resident("VmHWM") - before
    return float(np.median(seconds[1:])), peak


def _resident(name: str) -> float:
    """A line of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def mosaic(data: Path, path: Path, side: int) -> None:
    """A GeoTIFF of `side` x `side` pixels out of sample scenes."""
    stems = scene_stems(data / "train")[:8]
    files = [scene_files(data / "train", stem)[0] for stem in stems]
    images = []
    for file in files:
        with open_scene(file) as scene:
            images.append(scene.read(0, 0, scene.width, scene.height)[0])
    part = min(1024, *images[0].shape[:2])
    images = [image[:part, :part] for image in images]
    profile: dict[str, Any] = {"driver": "GTiff", "count": 3, "dtype": "uint8", "tiled": True}
    profile |= {"compress": "jpeg", "photometric": "ycbcr", "crs": "EPSG:32631"}
    profile |= {"transform": rasterio.Affine(0.3, 0, 448_000, 0, -0.3, 5_411_000)}
    with rasterio.open(path, "w", width=side, height=side, **profile) as file:
        for number, (y, x) in enumerate(np.ndindex(-(-side // part), -(-side // part))):
            height, width = (min(part, side - k * part) for k in (y, x))
            pixels = np.moveaxis(images[number * 5 % len(images)][:height, :width], 2, 0)
            file.write(pixels, window=Window(x * part, y * part, width, height))
