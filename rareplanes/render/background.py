"""Renders aircraft with their shadows on images of real ground that show none.

Each scene is a crop of one image in one of its eight orientations. The aircraft get the image's
light, sharpness and noise. All pixels far from them are those of the image.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from common.cli import UserError
from common.io.folders import rasters_in
from common.io.images import turned
from common.io.look import Look
from common.io.raster import open_scene
from rareplanes.render import scenery, traffic, weather
from rareplanes.render.plan import Material, Plan, Slot, airports
from rareplanes.render.scene import camera, describe
from rareplanes.render.view import Canvas, View

EMPTY = 0.2  # share of the scenes that stay without aircraft
METRES = (0.1, 5.0)  # per pixel of an image
SHORTEST = 56  # metres, the side of an image: 128 pixels of a scene
OWN_BLUR = 0.88  # pixels, what is measured of drawn aircraft


class Ground(NamedTuple):
    """An image; its name is a hash of its bytes, so a copy is the same ground."""

    name: str
    path: Path
    gsd: float  # metres per pixel
    look: Look


class GroundScene(NamedTuple):
    """One scene to render; its bytes depend on nothing else and on the image's."""

    number: int
    seed: int
    size: tuple[int, int]  # at most
    stem: str
    ground: Ground
    split: str


def find_grounds(folder: Path, gsd: float | None, look: Look) -> list[Ground]:
    """The different images of a folder, sorted by name; `gsd` is for those not georeferenced.

    Raises:
        UserError: The folder has no image. An image cannot be read or is too small. Its ground
            resolution is unknown or not supported.
    """
    grounds = {}
    for path in rasters_in(folder):
        with open_scene(path, look) as image, path.open("rb") as file:
            metres = image.record().get("gsd", gsd)
            if metres is None:
                raise UserError(
                    f"image {str(path)!r} is not georeferenced; give --gsd, the metres of ground "
                    "per pixel."
                )
            shortest = min(image.width, image.height) * metres
            if not METRES[0] <= metres <= METRES[1] or shortest < SHORTEST:
                raise UserError(
                    f"image {str(path)!r} has {metres:g} metres of ground per pixel and a side of "
                    f"{shortest:.0f} metres; {METRES[0]:g} to {METRES[1]:g} metres per pixel and "
                    f"sides from {SHORTEST} metres are supported, so leave it out of the folder."
                )
            name = f"Ground-{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"
        grounds[name] = Ground(name, path, metres, look)
    return [grounds[name] for name in sorted(grounds)]


def schedule(
    grounds: list[Ground], count: int, seed: int, size: tuple[int, int], test_fraction: float
) -> list[GroundScene]:
    """Give scenes to the images in turn; all scenes of an image are in one split."""
    order = np.random.default_rng(seed).permutation(len(grounds))[:count]
    tests = min(max(1, round(len(order) * test_fraction)), len(order) - 1) if test_fraction else 0
    scenes = []
    for i in range(count):
        turn, row = divmod(i, len(order))
        ground, split = grounds[order[row]], "test" if row < tests else "train"
        stem = f"{ground.name}_Airport_{turn // 4}_{turn % 4}_{i + 1}"
        scenes.append(GroundScene(i, seed, size, stem, ground, split))
    return scenes


def render(scene: GroundScene) -> tuple[np.ndarray, np.ndarray, str]:
    """Draw one scene; everything random is derived from (seed, number).

    Returns:
        Image and mask as [H,W,3] uint8 BGR, and the XML.
    """
    rng = np.random.default_rng((scene.seed, scene.number))
    view = camera((0, 0), (0.0, 0.0), rng)
    image, valid = _crop(scene.ground, scene.size, view.ppm, rng)
    view = replace(view, width=image.shape[1], height=image.shape[0], yaw=0.0)
    labels, plan = scenery.label_colours(airports()[0]), Plan(airports()[0])
    material, shadow, dirt = np.zeros((3, view.height, view.width), np.uint8)
    canvas = Canvas(image, np.full_like(image, labels[0]), material, shadow, dirt)
    things: list[traffic.Thing] = []
    if valid.any() and rng.random() >= EMPTY:
        canvas.material[_smooth(image, valid, view)] = Material.APRON
        canvas.material[~valid] = Material.ROOF  # nothing is drawn there
        plan.slots = _stands(view, canvas.material == Material.APRON, rng)
        colours = traffic.free_colours(rng, {label[::-1] for label in labels})
        things = _draw(view, plan, canvas, colours, valid, rng)
    return canvas.image, canvas.mask, describe(scene.stem, (view.width, view.height), things)


def _crop(
    ground: Ground, size: tuple[int, int], ppm: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random part of an image at `ppm` pixels per metre, in a random orientation.

    Of twelve parts it is the first that is all valid, otherwise the one with most valid pixels.

    Returns:
        [H,W,3] uint8 BGR, at most of `size` (width, height) and no larger than the image; and
        which pixels are valid, [H,W] bool. The others are black.
    """
    orientation, scale = int(rng.integers(1, 9)), ground.gsd * ppm
    with open_scene(ground.path, ground.look) as image:
        whole = image.width, image.height
        wanted = size if orientation < 5 else size[::-1]
        shown = [min(w, int(n * scale)) for w, n in zip(wanted, whole, strict=True)]
        part = [min(n, round(s / scale)) for s, n in zip(shown, whole, strict=True)]
        best = -1.0
        for _ in range(12):
            x, y = (int(rng.integers(n - p + 1)) for n, p in zip(whole, part, strict=True))
            read, known = image.read(x, y, *part)
            share = 1.0 if known is None else known.mean()
            if share > best:
                best, pixels, weight = share, read, np.ones(read.shape[:2], np.float32)
                weight = weight if known is None else known.astype(np.float32)
            if best == 1:
                break
    # Pillow's arithmetic is the same on every machine; where aircraft stand depends on the pixels.
    pixels = np.array(Image.fromarray(pixels).resize(shown, Image.Resampling.BICUBIC))
    valid = cv2.resize(weight, shown, interpolation=cv2.INTER_AREA) > 0.999
    pixels[~valid] = 0
    upright = np.moveaxis(turned(np.moveaxis(pixels, 2, 0), orientation), 0, 2)[..., ::-1]
    return np.ascontiguousarray(upright), turned(valid, orientation)


def _smooth(image: np.ndarray, valid: np.ndarray, view: View) -> np.ndarray:
    """The third of the valid pixels, [H,W] bool, that is smoothest and greyest, like pavement."""
    blue, green, red = cv2.split(image)
    rough = cv2.morphologyEx(green, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    colourful = cv2.max(cv2.max(blue, green), red) - cv2.min(cv2.min(blue, green), red)
    rough = cv2.add(rough, colourful // 2)
    rough[~valid | (green == 0)] = 255  # black is often a margin without data
    side = round(24 * view.ppm)
    total = cv2.boxFilter(rough, cv2.CV_32S, (side, side), normalize=False)
    return total <= np.percentile(total[valid], 34, method="lower")


def _stands(view: View, paved: np.ndarray, rng: np.random.Generator) -> list[Slot]:
    """Rows of stands that start on pavement."""
    starts, slots = np.argwhere(paved)[:, ::-1], []
    main = rng.uniform(0, 2 * np.pi)
    for _ in range(int(rng.integers(2, 7)) if len(starts) else 0):
        pixel = starts[rng.integers(len(starts))]
        spot = (pixel - (view.width / 2, view.height / 2)) / view.ppm
        heading = main + rng.integers(4) * np.pi / 2 if rng.random() < 0.7 else rng.uniform(0, 6.28)
        along = heading + rng.choice((np.pi / 2, np.pi / 2, np.pi / 3, 0))
        span = float(rng.choice((16, 30, 36, 40, 44, 52, 66)))
        step = span * rng.uniform(0.85, 1.6) * np.array((np.cos(along), np.sin(along)))
        for k in range(int(rng.integers(1, 9))):
            x, y = (spot + k * step).tolist()
            slots.append(Slot(x, y, heading, span))
    return slots


def _draw(
    view: View,
    plan: Plan,
    canvas: Canvas,
    colours: Iterator[traffic.Colour],
    valid: np.ndarray,
    rng: np.random.Generator,
) -> list[traffic.Thing]:
    """Park aircraft and vehicles on the canvas; returns what the XML lists."""
    black, white = _light(canvas.image[valid][::8].astype(np.float32), rng)
    grey = cv2.cvtColor(canvas.image, cv2.COLOR_BGR2GRAY)
    blur, noise = _blur(grey), _noise(grey)
    # The renderer's colours: 0 is the darkest of the image, 255 a white surface in its light.
    gain = (white - black) / 255
    bare = (canvas.image - black) / gain
    canvas.image = bare.copy()
    labels = scenery.label_colours(plan.airport)
    blocks, named = traffic.park_vehicles(view, plan, colours, rng) if plan.slots else ([], [])
    scenery.raise_blocks(view, canvas, blocks, labels)
    for block, thing in named:
        scenery.raise_blocks(view, canvas, [block], [thing.colour[::-1]])
    built = _differ(canvas.image, bare)
    aircraft = traffic.park_aircraft(view, plan, canvas, colours, rng)
    traffic.shade_ground(canvas, aircraft)
    ground = bare.copy()
    light = weather.cast_light(canvas, ground, np.zeros_like(canvas.shadow), rng)
    drawn = np.where(built[..., None], canvas.image, ground)
    traffic.lay_aircraft(canvas, drawn, light, aircraft)

    changed = _differ(drawn, ground).astype(np.float32)
    alpha = cv2.GaussianBlur(changed, (0, 0), blur)[..., None]
    grain = cv2.GaussianBlur(rng.standard_normal(changed.shape, np.float32), (0, 0), blur)
    grain *= noise / grain.std()
    soft = cv2.GaussianBlur(drawn * changed[..., None], (0, 0), blur)
    image = ((1 - alpha) * ground + soft) * gain + black + alpha * grain[..., None]
    canvas.image = np.rint(image * valid[..., None]).clip(0, 255).astype(np.uint8)
    canvas.mask[~valid] = labels[0]
    return traffic.measure(canvas, aircraft + [thing for _, thing in named])


def _differ(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where two float pictures [H,W,3] differ: [H,W] bool, in a tenth of numpy's time."""
    return cv2.transform(cv2.absdiff(image, other), np.ones((1, 3))) > 0


def _light(pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """BGR of black and of white surfaces among pixels [N,3], from the darkest and brightest."""
    luma = pixels.mean(1)
    bright = pixels[luma >= np.percentile(luma, 99)].mean(0)
    level = max(bright.mean(), 1.0)
    cast = np.clip(bright / level, 0.75, 1.25) ** 0.5  # what is bright may be sand
    white = max(level, 150.0)
    white = (white + rng.uniform(0, 0.6) * (255 - white)) * cast
    black = np.minimum(np.percentile(pixels, 0.5, axis=0), 0.4 * white)
    return black.astype(np.float32), white.astype(np.float32)


def _blur(grey: np.ndarray) -> float:
    """The blur of a picture's sharpest edges beyond that of drawn aircraft: a deviation in pixels.

    A further blur by one pixel lowers the slope of an edge the more, the sharper it is (Zhuo and
    Sim, Defocus map estimation from a single image, 2011).
    """
    first = grey.astype(np.float32)
    slopes = []
    for picture in (first, cv2.GaussianBlur(first, (0, 0), 1.0)):
        slopes.append(np.hypot(*(cv2.Sobel(picture, -1, *d) for d in ((1, 0), (0, 1)))))
    edges = slopes[1] > max(16.0, np.percentile(slopes[1], 98))
    ratio = np.median(slopes[0][edges] / slopes[1][edges]) if edges.any() else 2.0
    blur = 1 / np.sqrt(max(ratio**2 - 1, 0.05))
    return float(np.sqrt(max(blur**2 - OWN_BLUR**2, 0.01)))


def _noise(grey: np.ndarray) -> float:
    """The sensor's noise, a deviation: what is fine where the picture is smoothest."""
    fine = grey - cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 1.5)
    power = np.percentile(cv2.blur(fine**2, (15, 15)), 5)
    return float(np.sqrt(np.clip(power, 0, 4)))  # more is texture
