"""What QGIS opens: GeoTIFFs, written in bands of rows from the top down, and GeoJSON."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import rasterio
from rasterio import features
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.shutil import copy as copy_raster
from rasterio.warp import transform as reproject
from rasterio.windows import Window

from common.cli import UserError
from common.io.files import temporary_name, whole_file
from common.io.pictures import colour
from common.io.raster import Scene, pixels_to_crs
from common.io.tiles import IGNORE
from common.predict.regions import Region

Polygon = list[np.ndarray]
TOGETHER = 1000  # features whose corners are projected in one call
BLOCK = 512  # side of a block of a GeoTIFF, pixels
COG = {"compress": "deflate", "blocksize": BLOCK, "bigtiff": "if_safer"}


@contextmanager
def raster_file(
    path: Path, scene: Scene, model: str, classes: list[str] | None = None
) -> Iterator[Callable[[int, np.ndarray], None]]:
    """A raster of the scene's size and georeference, written from the top down.

    `.tif` is a cloud-optimised GeoTIFF, `.png` a PNG. With `classes` the values are uint8, class
    ids, or `IGNORE` where the scene has no data; a GeoTIFF's second band hides the ground. Without,
    they are float32, probabilities, or 0. The file gets its name when the block succeeds.

    Args:
        model: What the tags of a GeoTIFF name as its source.
        classes: Names by class id.

    Yields:
        write(y, band [n,W]).
    """
    tiled = temporary_name(path.with_suffix(".tiled"))
    bands = 2 if classes and path.suffix == ".tif" else 1
    # In blocks like the COG's: copying from blocks of single rows takes 9 times as long.
    profile = {"driver": "GTiff", "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}
    profile |= {"dtype": "uint8" if classes else "float32", "compress": "deflate", "zlevel": 1}
    profile |= {"count": bands, "nodata": IGNORE if classes else 0, "bigtiff": "if_safer"}
    profile |= {"width": scene.width, "height": scene.height}
    profile |= {"crs": scene.crs, "transform": scene.transform}
    profile |= {"photometric": "palette"} if classes else {}
    how = {"driver": "COG", "resampling": "nearest", **COG}
    if path.suffix == ".png":
        how = {"driver": "PNG", "zlevel": 4}
    elif not classes:
        how |= {"resampling": "average", "predictor": "yes"}
    try:
        with whole_file(path) as finished:
            with rasterio.open(tiled, "w", **profile) as file:
                date = datetime.now(UTC).strftime("%Y:%m:%d %H:%M:%S")
                file.update_tags(MODEL=model, TIFFTAG_DATETIME=date)
                if classes:
                    file.write_colormap(1, {i: colour(i) for i in range(256)})
                    file.colorinterp = [ColorInterp.palette, ColorInterp.alpha][:bands]
                    names = ", ".join(f"{i} {name}" for i, name in enumerate(classes))
                    file.set_band_description(1, f"{names}, {IGNORE} no data")

                def write(y: int, band: np.ndarray) -> None:
                    shown = ((band > 0) & (band < IGNORE)) * np.uint8(255)
                    window = Window(0, y, scene.width, len(band))
                    file.write(np.stack([band, shown][:bands]), window=window)

                yield write
            copy_raster(tiled, finished.name, **how)
    except RasterioError as error:
        raise UserError(
            f"{str(path)!r} could not be written ({error}); is the disk full?"
        ) from None
    finally:
        tiled.unlink(missing_ok=True)


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
    cut at 180 degrees, outer rings anticlockwise, the area in square metres, and length and width
    of the smallest rotated rectangle in metres. If not: all in pixels, x to the right and y down.

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
        sizes, placed = self._sizes(shapes), self._placed(shapes)
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
        """Outlines in pixels as longitude and latitude; unchanged if not georeferenced."""
        rings = [ring for shape in shapes for polygon in shape for ring in polygon]
        ends = np.cumsum([len(ring) for ring in rings])[:-1]
        written = iter(np.split(self._lon_lat(np.concatenate(rings)), ends))
        return [[[next(written) for _ in polygon] for polygon in shape] for shape in shapes]

    def _lon_lat(self, points: np.ndarray) -> np.ndarray:
        """Points in pixels [N,2] as longitude, from -180 to 180, and latitude."""
        if self.scene.metres is None:
            return points
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

    def _sizes(self, shapes: list[list[Polygon]]) -> list[dict[str, float]]:
        """Area, length and width of the kept regions, by the size of the pixel at each centre."""
        regions = self._waiting
        unit, to_ground = "px", np.tile(np.eye(2), (len(regions), 1, 1))
        if self.scene.metres is not None:
            unit = "m"
            boxes = np.array([region.box for region in regions], float)
            centres = (boxes[:, :2] + boxes[:, 2:]) / 2
            points = centres + np.array([[[0, 0]], [[1, 0]], [[0, 1]]])  # [3,N,2]
            x, y = pixels_to_crs(self.scene.transform, *points.reshape(-1, 2).T)
            metres = np.array(reproject(self.scene.crs, self.scene.metres, x, y)).reshape(2, 3, -1)
            to_ground = (metres[:, 1:] - metres[:, :1]).transpose(2, 0, 1)  # [N,2,2]
        sizes = []
        for region, shape, matrix in zip(regions, shapes, to_ground, strict=True):
            corners = np.concatenate([polygon[0] for polygon in shape]) - (region.x, region.y)
            _, sides, _ = cv2.minAreaRect((corners @ matrix.T).astype(np.float32))
            area = region.area * abs(float(np.linalg.det(matrix)))
            size = {
                f"area_{unit}2": area,
                f"length_{unit}": max(sides),
                f"width_{unit}": min(sides),
            }
            sizes.append({name: round(value, 2) for name, value in size.items()})
        return sizes


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
    x, y = (ring - ring[0]).T
    anticlockwise = float(x[:-1] @ y[1:] - x[1:] @ y[:-1]) > 0
    return ring if anticlockwise != inner else ring[::-1]
