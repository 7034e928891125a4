"""What QGIS opens: rasters that are written in bands of rows, and GeoJSON."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import cv2
import numpy as np
import rasterio
from rasterio import features
from rasterio.errors import RasterioError
from rasterio.shutil import copy as copy_raster
from rasterio.warp import transform as reproject
from rasterio.windows import Window

from common.cli import UserError
from common.io.files import whole_file
from common.io.pictures import colour
from common.io.raster import Scene, pixels_to_crs
from common.predict.regions import Find

Polygon = list[np.ndarray]
TOGETHER = 1000  # features whose corners are projected in one call
BLOCK = 512  # side of a block of a GeoTIFF, pixels
COG = {"compress": "deflate", "blocksize": BLOCK, "bigtiff": "if_safer"}


@contextmanager
def raster_file(
    path: Path, scene: Scene, dtype: str
) -> Iterator[Callable[[int, np.ndarray], None]]:
    """A raster of the scene's size and place, written from the top down.

    `.tif` is a cloud-optimised GeoTIFF, `.png` a PNG. uint8 are class ids and get the palette;
    float32 are probabilities. The file gets its name when the block succeeds.

    Yields:
        write(y, rows [n,W]).
    """
    with TemporaryDirectory(prefix=".", suffix=".tmp", dir=path.parent) as folder:
        rows, whole = Path(folder, "rows"), Path(folder, "whole")
        # In the blocks of the COG: from strips of single rows the copy takes 9 times as long.
        profile = {"driver": "GTiff", "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}
        profile |= {"dtype": dtype, "count": 1, "compress": "deflate", "zlevel": 1}
        profile |= {"width": scene.width, "height": scene.height, "bigtiff": "if_safer"}
        profile |= {"crs": scene.crs, "transform": scene.transform}
        try:
            with rasterio.open(rows, "w", **profile) as file:
                if dtype == "uint8":
                    file.write_colormap(1, {i: colour(i) for i in range(256)})

                def write(y: int, band: np.ndarray) -> None:
                    file.write(band, 1, window=Window(0, y, scene.width, len(band)))

                yield write
            if path.suffix == ".png":
                copy_raster(rows, whole, driver="PNG", zlevel=4)
            else:
                smooth = "average" if dtype == "float32" else "nearest"
                predictor = "yes" if dtype == "float32" else "no"
                copy_raster(
                    rows, whole, driver="COG", resampling=smooth, predictor=predictor, **COG
                )
        except RasterioError as error:
            raise UserError(
                f"{str(path)!r} could not be written ({error}); is the disk full?"
            ) from None
        whole.replace(path)


@contextmanager
def feature_file(path: Path, scene: Scene, classes: list[str]) -> Iterator["Features"]:
    """A GeoJSON file of finds, which gets its name when the block succeeds."""
    with whole_file(path) as file:
        file.write(b'{"type": "FeatureCollection", "features": [')
        found = Features(file, scene, classes)
        yield found
        found.flush()
        file.write(b"\n]}\n")


class Features:
    """Writes finds as GeoJSON features (RFC 7946), one a line.

    With a place on earth: longitude and latitude in WGS 84 to 8 decimals (a millimetre), outer
    rings anticlockwise, the area in square metres, and length and width of the smallest rotated
    rectangle in metres. Without: all in pixels, x to the right and y down.

    Args:
        file: Where they are written.
        classes: Names by class id.
    """

    def __init__(self, file: BinaryIO, scene: Scene, classes: list[str]) -> None:
        self.file, self.scene, self.classes = file, scene, classes
        self._waiting: list[Find] = []
        self._between = b"\n"

    def add(self, find: Find) -> None:
        """Write a find; some are kept until there are `TOGETHER` of them."""
        self._waiting.append(find)
        if len(self._waiting) >= TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Write what was kept."""
        if not self._waiting:
            return
        shapes = polygons(self._waiting)
        rings = [ring for shape in shapes for polygon in shape for ring in polygon]
        ends = np.cumsum([len(ring) for ring in rings])[:-1]
        placed = iter(np.split(self._on_earth(np.concatenate(rings)), ends))
        sizes = self._sizes(shapes)
        for find, shape, size in zip(self._waiting, shapes, sizes, strict=True):
            coordinates = [
                [_turned(next(placed), inner=i > 0).tolist() for i in range(len(polygon))]
                for polygon in shape
            ]
            single = len(coordinates) == 1
            properties = {"class": self.classes[find.label], "score": round(find.score, 4)}
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

    def _on_earth(self, corners: np.ndarray) -> np.ndarray:
        """Corners in pixels [N,2] as longitude and latitude, or as they are without a place."""
        if self.scene.metres is None:
            return corners
        x, y = pixels_to_crs(self.scene.transform, *corners.T)
        lon, lat = (np.array(v) for v in reproject(self.scene.crs, "EPSG:4326", x, y))
        # Across the antimeridian longitudes go on beyond 180 degrees, so that no outline is torn.
        lon = np.where((np.ptp(lon) > 180) & (lon < 0), lon + 360, lon)
        return np.stack([lon, lat], 1).round(8)

    def _sizes(self, shapes: list[list[Polygon]]) -> list[dict[str, float]]:
        """Area, length and width of what is kept, by the size of the pixel at its middle."""
        finds = self._waiting
        unit, to_ground = "px", np.tile(np.eye(2), (len(finds), 1, 1))
        if self.scene.metres is not None:
            unit = "m"
            boxes = np.array([find.box for find in finds], float)
            middle = (boxes[:, :2] + boxes[:, 2:]) / 2
            points = middle + np.array([[[0, 0]], [[1, 0]], [[0, 1]]])  # [3,N,2]
            x, y = pixels_to_crs(self.scene.transform, *points.reshape(-1, 2).T)
            places = np.array(reproject(self.scene.crs, self.scene.metres, x, y)).reshape(2, 3, -1)
            to_ground = (places[:, 1:] - places[:, :1]).transpose(2, 0, 1)  # [N,2,2]
        sizes = []
        for find, shape, matrix in zip(finds, shapes, to_ground, strict=True):
            corners = np.concatenate([polygon[0] for polygon in shape]) - (find.x, find.y)
            _, sides, _ = cv2.minAreaRect((corners @ matrix.T).astype(np.float32))
            area = find.area * abs(float(np.linalg.det(matrix)))
            size = {
                f"area_{unit}2": area,
                f"length_{unit}": max(sides),
                f"width_{unit}": min(sides),
            }
            sizes.append({name: round(value, 2) for name, value in size.items()})
        return sizes


def polygons(finds: list[Find]) -> list[list[Polygon]]:
    """The outline of each mask along the edges of its pixels, in the scene's pixels.

    Returns:
        For each find a polygon for each 4-connected part: its outer ring and its holes, int [N,2],
        x and y; the last corner is the first.
    """
    outlines: list[list[Polygon]] = [[] for _ in finds]
    # A call takes 0.3 ms whatever it holds, so masks of like heights are traced side by side.
    for group in _side_by_side(finds):
        height = max(finds[i].mask.shape[0] for i in group)
        row = np.zeros((height, sum(finds[i].mask.shape[1] + 1 for i in group)), np.int32)
        starts, x = {}, 0
        for i in group:
            h, w = finds[i].mask.shape
            row[:h, x : x + w] = finds[i].mask * np.int32(i + 1)
            starts[i] = (finds[i].x - x, finds[i].y)
            x += w + 1
        for shape, value in features.shapes(row, mask=row > 0, connectivity=4):
            i = int(value) - 1
            rings = [np.array(ring, int) + starts[i] for ring in shape["coordinates"]]
            outlines[i].append(rings)
    return outlines


def _side_by_side(finds: list[Find]) -> Iterator[list[int]]:
    """Groups of masks, of 32 or a million pixels at most, except for a larger mask alone."""
    group: list[int] = []
    width = 0
    for i in sorted(range(len(finds)), key=lambda i: finds[i].mask.shape[0]):
        h, w = finds[i].mask.shape
        if group and (len(group) == 32 or h * (width + w) > 1 << 20):
            yield group
            group, width = [], 0
        group.append(i)
        width += w
    if group:
        yield group


def _turned(ring: np.ndarray, inner: bool) -> np.ndarray:
    """The ring anticlockwise if it is an outer one, else clockwise, as RFC 7946 asks."""
    x, y = (ring - ring[0]).T
    anticlockwise = float(x[:-1] @ y[1:] - x[1:] @ y[:-1]) > 0
    return ring if anticlockwise != inner else ring[::-1]
