"""What QGIS opens: GeoTIFFs, written in bands of rows from the top down, and GeoJSON."""

import argparse
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from xml.sax.saxutils import escape

import cv2
import numpy as np
import rasterio
from rasterio import features
from rasterio.errors import RasterioError
from rasterio.shutil import copy as copy_raster
from rasterio.warp import transform as reproject
from rasterio.windows import Window

from common.cli import UserError
from common.io.files import temporary_name, whole_file, write_atomic
from common.io.pictures import colour
from common.io.raster import Scene, pixels_to_crs
from common.io.tiles import IGNORE
from common.predict.regions import Region

R = TypeVar("R", bound=Region)
Polygon = list[np.ndarray]
TOGETHER = 1000  # features whose corners are projected in one call
LEAST_PIXELS = 16  # of a region, unless --min-area says another area
REACHES = 0.49, 0.3  # of a simplified outline to either side of an edge, pixels; below 0.5
BLOCK = 512  # side of a block of a GeoTIFF, pixels
COG = {"compress": "deflate", "blocksize": BLOCK, "bigtiff": "if_safer"}


@contextmanager
def raster_file(
    path: Path, scene: Scene, model: str, classes: list[str] | None = None
) -> Iterator[Callable[[int, np.ndarray], None]]:
    """A raster of the scene's size and georeference, written from the top down.

    `.tif` is a cloud-optimised GeoTIFF, `.png` a PNG. With `classes` the values are uint8, class
    ids, or `IGNORE` where the scene has no data; beside a GeoTIFF lies its legend. Without, they
    are float32, probabilities, or 0. The file gets its name when the block succeeds.

    Args:
        model: What the tags of a GeoTIFF name as its source.
        classes: Names by class id.

    Yields:
        write(y, band [n,W]).
    """
    # GDAL takes only names in UTF-8, which that of a scene need not be.
    hashed = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    tiled, finished = (temporary_name(path.with_name(hashed + end)) for end in ("", ".finished"))
    # In blocks like the COG's: copying from blocks of single rows takes 9 times as long.
    profile = {"driver": "GTiff", "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}
    profile |= {"dtype": "uint8" if classes else "float32", "compress": "deflate", "zlevel": 1}
    profile |= {"count": 1, "nodata": IGNORE if classes else 0, "bigtiff": "if_safer"}
    profile |= {"width": scene.width, "height": scene.height}
    profile |= {"crs": scene.crs, "transform": scene.transform}
    how = {"driver": "COG", "resampling": "nearest", **COG}
    if path.suffix == ".png":
        how = {"driver": "PNG", "zlevel": 4}
    elif not classes:
        how |= {"resampling": "average", "predictor": "yes"}
    try:
        with rasterio.open(tiled, "w", **profile) as file:
            date = datetime.now(UTC).strftime("%Y:%m:%d %H:%M:%S")
            file.update_tags(MODEL=model, TIFFTAG_DATETIME=date)
            if classes:
                file.write_colormap(1, {i: colour(i) for i in range(256)})
                names = ", ".join(f"{i} {name}" for i, name in enumerate(classes))
                file.set_band_description(1, f"{names}, {IGNORE} no data")

            def write(y: int, band: np.ndarray) -> None:
                file.write(band, 1, window=Window(0, y, scene.width, len(band)))

            yield write
        copy_raster(tiled, finished, **how)
        finished.replace(path)
        if classes and path.suffix == ".tif":
            write_atomic(path.with_name(f"{path.name}.aux.xml"), _legend(classes))
    except RasterioError as error:
        raise UserError(
            f"{str(path)!r} could not be written ({error}); is the disk full?"
        ) from None
    finally:
        tiled.unlink(missing_ok=True)
        finished.unlink(missing_ok=True)


def _legend(classes: list[str]) -> bytes:
    """The names and colours of classes as GDAL and QGIS read them; the ground is transparent.

    A GeoTIFF's own palette has no transparency, and of two bands QGIS takes neither as a palette.
    """
    names = "".join(f"<Category>{escape(name)}</Category>" for name in classes)
    colours = "".join(
        '<Entry c1="{}" c2="{}" c3="{}" c4="{}"/>'.format(*colour(i), 255 if i else 0)
        for i in range(len(classes))
    )
    band = f"<CategoryNames>{names}</CategoryNames><ColorTable>{colours}</ColorTable>"
    return f'<PAMDataset><PAMRasterBand band="1">{band}</PAMRasterBand></PAMDataset>\n'.encode()


@contextmanager
def feature_file(path: Path, scene: Scene, classes: list[str]) -> Iterator["Features"]:
    """A GeoJSON file of regions, which gets its name when the block succeeds."""
    with whole_file(path) as file:
        file.write(b'{"type": "FeatureCollection", "features": [')
        written = Features(file, scene, classes)
        yield written
        written.flush()
        file.write(b"\n]}\n")


class Features:
    """Writes regions as GeoJSON features (RFC 7946), one a line.

    If the scene is georeferenced: longitude and latitude in WGS 84 to 8 decimals (a millimetre),
    cut at 180 degrees, the area in square metres, and length and width of the smallest rotated
    rectangle in metres. If not: all in pixels, x to the right and y up from the scene's first row,
    where QGIS draws such a picture. Outer rings are anticlockwise. The rectangle's longer side is
    turned clockwise from north, or from up, by `angle_deg`.

    Args:
        file: Where they are written.
        classes: Names by class id.
    """

    def __init__(self, file: BinaryIO, scene: Scene, classes: list[str]) -> None:
        self.file, self.scene, self.classes = file, scene, classes
        self._waiting: list[Region] = []
        self._between = b"\n"

    def add(self, region: Region) -> None:
        """Write a region; some are kept until there are `TOGETHER` of them."""
        self._waiting.append(region)
        if len(self._waiting) >= TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Write what was kept."""
        if not self._waiting:
            return
        shapes = polygons(self._waiting)
        sizes = self._sizes(shapes)
        placed = self._placed([simplified(shape) for shape in shapes])
        for region, size, shape in zip(self._waiting, sizes, placed, strict=True):
            if self.scene.metres and any(_jumps(polygon[0]) for polygon in shape):
                shape = self._halves(region)
            coordinates = [
                [_turned(ring, inner=i > 0).tolist() for i, ring in enumerate(polygon)]
                for polygon in shape
            ]
            single = len(coordinates) == 1
            properties = {"class": self.classes[region.label], "score": round(region.score, 4)}
            feature = {
                "type": "Feature",
                "properties": properties | size | {"source": self.scene.path.name},
                "geometry": {
                    "type": "Polygon" if single else "MultiPolygon",
                    "coordinates": coordinates[0] if single else coordinates,
                },
            }
            self.file.write(self._between + json.dumps(feature).encode())
            self._between = b",\n"
        self._waiting.clear()

    def _placed(self, shapes: list[list[Polygon]]) -> list[list[Polygon]]:
        """Outlines in pixels as in `_lon_lat`."""
        rings = [ring for shape in shapes for polygon in shape for ring in polygon]
        ends = np.cumsum([len(ring) for ring in rings])[:-1]
        written = iter(np.split(self._lon_lat(np.concatenate(rings)), ends))
        return [[[next(written) for _ in polygon] for polygon in shape] for shape in shapes]

    def _lon_lat(self, points: np.ndarray) -> np.ndarray:
        """Points in pixels [N,2] as longitude, from -180 to 180, and latitude; or as x and -y."""
        if self.scene.metres is None:
            return (points * (1.0, -1.0) + 0.0).round(2)
        x, y = pixels_to_crs(self.scene.transform, *points.T)
        lon, lat = (np.array(v) for v in reproject(self.scene.crs, "EPSG:4326", x, y))
        lon = np.where(np.abs(lon) > 180, (lon + 180) % 360 - 180, lon)
        return np.stack([lon, lat], 1).round(8)

    def _halves(self, region: Region) -> list[Polygon]:
        """The outline of a region that crosses 180 degrees, cut there (RFC 7946, 3.1.9)."""
        height, width = region.mask.shape
        columns = np.arange(width) + region.x + 0.5
        rows = (np.full(width, region.y + y + 0.5) for y in range(height))
        east = np.stack([self._lon_lat(np.stack([columns, row], 1))[:, 0] > 0 for row in rows])
        halves: list[Polygon] = []
        for side, edge in ((east, 180.0), (~east, -180.0)):
            half = replace(region, mask=region.mask & side)
            outline = self._placed(polygons([half]))[0] if half.mask.any() else []
            for lon in (ring[:, 0] for polygon in outline for ring in polygon):
                lon[lon * np.sign(edge) < -90] = edge  # the rest of a pixel that lies across
            halves += outline
        return halves

    def _sizes(self, shapes: list[list[Polygon]]) -> list[dict[str, Any]]:
        """Area of the kept regions, and their smallest rotated rectangles."""
        unit = "px" if self.scene.metres is None else "m"
        sizes, rectangles = [], []
        steps = ground_steps(self.scene, self._waiting)
        for region, shape, step in zip(self._waiting, shapes, steps, strict=True):
            corners = np.concatenate([polygon[0] for polygon in shape]) - (region.x, region.y)
            rectangle = cv2.minAreaRect((corners @ step.T).astype(np.float32))
            on_ground = cv2.boxPoints(rectangle).astype(float)
            rectangles.append(on_ground @ np.linalg.inv(step).T + (region.x, region.y))
            sides = np.diff(on_ground[:3], axis=0)
            east, north = max(sides, key=np.linalg.norm)
            size = {
                f"area_{unit}2": region.area * abs(float(np.linalg.det(step))),
                f"length_{unit}": max(rectangle[1]),
                f"width_{unit}": min(rectangle[1]),
                "angle_deg": math.degrees(math.atan2(east, north)) % 180,
            }
            sizes.append({name: round(value, 2) for name, value in size.items()})
        placed = self._lon_lat(np.concatenate(rectangles)).reshape(-1, 4, 2).tolist()
        return [size | {"rectangle": four} for size, four in zip(sizes, placed, strict=True)]


def ground_steps(scene: Scene, regions: Sequence[Region]) -> np.ndarray:
    """What a step of one pixel at the centre of each region is on the ground, [N,2,2].

    A column is the step to the right, and the one down; a row its metres to the east, and to the
    north. Without a georeference they are pixels to the right, and up.
    """
    if scene.metres is None:
        return np.tile(np.diag([1.0, -1.0]), (len(regions), 1, 1))
    boxes = np.array([region.box for region in regions], float)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    points = centres + np.array([[[0, 0]], [[1, 0]], [[0, 1]]])  # [3,N,2]
    x, y = pixels_to_crs(scene.transform, *points.reshape(-1, 2).T)
    metres = np.array(reproject(scene.crs, scene.metres, x, y)).reshape(2, 3, -1)
    return (metres[:, 1:] - metres[:, :1]).transpose(2, 0, 1)


def wanted(regions: Iterable[R], scene: Scene, args: argparse.Namespace) -> list[R]:
    """Those that `--score-threshold`, `--min-area` and `--max-area` leave.

    The areas are those of the map, in square metres, or pixels if it is not georeferenced.
    """
    least, most = args.min_area, math.inf if args.max_area is None else args.max_area
    sure = [region for region in regions if region.score >= args.score_threshold]
    if least is None:
        sure, least = [region for region in sure if region.area >= LEAST_PIXELS], 0
    pixels = np.abs(np.linalg.det(ground_steps(scene, sure))) if sure else ()
    pairs = zip(sure, pixels, strict=True)
    return [region for region, pixel in pairs if least <= region.area * pixel <= most]


def simplified(shape: list[Polygon]) -> list[Polygon]:
    """The outline of a region with fewer corners, or as it is if its area would change by over 1 %.

    The line stays within half a pixel, in x and in y, and between the centres of the pixels inside
    and outside: whoever paints it gets the same mask.
    """
    before = _covered(shape)
    for reach in REACHES:
        fewer = [[_straightened(ring, reach) for ring in polygon] for polygon in shape]
        if abs(_covered(fewer) - before) <= 0.01 * before:
            return fewer
    return shape


def _covered(shape: list[Polygon]) -> float:
    return sum(
        abs(_area(outer)) - sum(abs(_area(hole)) for hole in holes) for outer, *holes in shape
    )


def _straightened(ring: np.ndarray, reach: float) -> np.ndarray:
    """A ring along the edges of pixels with few corners: each is as far from the last as possible.

    The line crosses each edge of a pixel through a gate, which ends `reach` to the left and to the
    right of the edge's middle. The directions through all gates since the last corner are a cone.

    Args:
        ring: int [N,2]; the last corner is the first.

    Returns:
        float [M,2], closed in the same way.
    """
    edges = list(pairwise((ring @ [1, 1j]).tolist()))
    longest = max(range(len(edges)), key=lambda k: abs(edges[k][1] - edges[k][0]))
    stops: list[tuple[complex, complex, bool]] = []  # where, its gate's left half, a corner or not
    for start, end in edges[longest:] + edges[: longest + 1]:
        length = abs(end - start)
        step = (end - start) / length
        gate, middle = 1j * step * reach, (start + end) / 2
        # A line through the first and the last gate of a straight edge passes all between. Where it
        # follows a slope, it crosses each step in its middle.
        first, last = (start + step / 2, gate, False), (end - step / 2, gate, False)
        stops.append((start, 0, True))
        stops += [first, (middle, gate, True), last] if length > 1 else [(middle, gate, True)]
    stops = stops[2:-1] if length > 1 else stops[1:]  # from that middle to itself
    chosen, at = [stops[0][0]], 0
    while at < len(stops) - 1:
        best, cone = at, None
        for k in range(at + 1, len(stops)):
            where, gate, may_be_corner = stops[k]
            way = where - chosen[-1]
            if gate:
                left, right = way + gate, way - gate
                if cone:
                    turns = _turn(cone[0], left), _turn(cone[1], right)
                    if turns[0].real <= 0 or turns[1].real <= 0:
                        break  # it lies behind
                    left = left if turns[0].imag < 0 else cone[0]
                    right = right if turns[1].imag > 0 else cone[1]
                    if _turn(right, left).imag <= 0:
                        break
                cone = left, right
            leads = not cone or _turn(cone[1], way).imag >= 0 <= _turn(way, cone[0]).imag
            best = k if may_be_corner and leads else best
        at = best
        chosen.append(stops[at][0])
    return np.stack([np.real(chosen), np.imag(chosen)], 1)


def _turn(a: complex, b: complex) -> complex:
    """Of two directions: the real part is the dot product, the imaginary one the cross product."""
    return a.conjugate() * b


def _area(ring: np.ndarray) -> float:
    """Positive if the ring is anticlockwise."""
    x, y = (ring - ring[0]).T
    return float(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2


def polygons(regions: list[Region]) -> list[list[Polygon]]:
    """The outline of each mask along the edges of its pixels, in the scene's pixels.

    Returns:
        For each region a polygon for each 4-connected part. A polygon is its outer ring and its
        holes, int [N,2] each, x and y; the last corner is the first.
    """
    outlines: list[list[Polygon]] = [[] for _ in regions]
    # Each call takes at least 0.3 ms, so masks of similar heights are traced side by side.
    for group in _side_by_side(regions):
        height = max(regions[i].mask.shape[0] for i in group)
        row = np.zeros((height, sum(regions[i].mask.shape[1] + 1 for i in group)), np.int32)
        starts, x = {}, 0
        for i in group:
            h, w = regions[i].mask.shape
            row[:h, x : x + w] = regions[i].mask * np.int32(i + 1)
            starts[i] = (regions[i].x - x, regions[i].y)
            x += w + 1
        for shape, value in features.shapes(row, mask=row > 0, connectivity=4):
            i = int(value) - 1
            rings = [np.array(ring, int) + starts[i] for ring in shape["coordinates"]]
            outlines[i].append(rings)
    return outlines


def _side_by_side(regions: list[Region]) -> Iterator[list[int]]:
    """Groups of at most 32 masks and a million pixels; a larger mask is alone in its group."""
    group: list[int] = []
    width = 0
    for i in sorted(range(len(regions)), key=lambda i: regions[i].mask.shape[0]):
        h, w = regions[i].mask.shape
        if group and (len(group) == 32 or h * (width + w) > 1 << 20):
            yield group
            group, width = [], 0
        group.append(i)
        width += w
    if group:
        yield group


def _jumps(ring: np.ndarray) -> bool:
    return bool((np.abs(np.diff(ring[:, 0])) > 180).any())


def _turned(ring: np.ndarray, inner: bool) -> np.ndarray:
    """The ring anticlockwise if it is an outer one, else clockwise, as RFC 7946 asks."""
    return ring if (_area(ring) > 0) != inner else ring[::-1]
