"""Polygons of a GeoJSON file from any source, checked before anything relies on them."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio import Affine
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.features import rasterize
from rasterio.warp import transform as reproject

from common.cli import UserError
from common.io.files import read_json
from common.io.raster import Scene, pixels_to_crs
from preprocessing.own_data import class_name

WEB_MERCATOR_RADIUS = 6_378_137.0  # metres (EPSG:3857)
EMPTY = "without a geometry"
OTHER = "that are no Polygon or MultiPolygon"
INVALID = "with an invalid outline"
NO_CLASS = "without a class of up to 100 letters (regions to ignore)"

Polygon = list[np.ndarray]
"""An outer ring and its holes, float [N,2] each."""


@dataclass(frozen=True)
class Shape:
    """One object: its class and its polygons, several for a MultiPolygon."""

    name: str
    """Of the class in the file; empty if the feature has none."""
    polygons: list[Polygon]
    number: int = 0
    """Of the feature in the file."""
    properties: dict[str, Any] = field(default_factory=dict, repr=False)
    """Of the feature."""
    ignored: str = NO_CLASS
    """Why it is ignored, if it has no name."""
    points: tuple[tuple[float, float], ...] = ()
    """As those of `tiles.Thing`."""

    @cached_property
    def box(self) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2."""
        corners = np.concatenate([polygon[0] for polygon in self.polygons])
        return (*corners.min(0).tolist(), *corners.max(0).tolist())

    @cached_property
    def area(self) -> float:
        """In square pixels."""
        return sum(
            abs(_area(ring)) * (-1 if i else 1)
            for polygon in self.polygons
            for i, ring in enumerate(polygon)
        )


@dataclass(frozen=True)
class Drawn:
    """The polygons of a GeoJSON file in its own coordinates, and their reference system.

    `left_out` names the features that have no polygon or an invalid one, by the reason.
    """

    path: Path
    shapes: list[Shape]
    crs: CRS
    left_out: dict[str, list[str]]


def read_labels(path: Path, class_property: str | None) -> Drawn:
    """The polygons of a GeoJSON file, in the order of its features.

    Raises:
        UserError: It is not GeoJSON, or of all its features none has a valid polygon or none a
            class.
    """
    if path.suffix.lower() in (".gpkg", ".shp", ".kml"):
        raise UserError(f"{str(path)!r} is not GeoJSON; export the layer as GeoJSON in QGIS.")
    content = read_json(path)
    features = content.get("features") if isinstance(content, dict) else None
    if not isinstance(features, list):
        raise UserError(f"{str(path)!r} is not a GeoJSON file with features.")
    shapes = []
    left_out: dict[str, list[str]] = defaultdict(list)
    properties: set[str] = set()
    for number, feature in enumerate(features, start=1):
        feature = feature if isinstance(feature, dict) else {}
        polygons = _polygons(feature.get("geometry"))
        if isinstance(polygons, str):
            left_out[polygons].append(f"feature {number} of {path.name!r}")
            continue
        values = feature.get("properties")
        values = values if isinstance(values, dict) else {}
        properties.update(values)
        name = class_name(values.get(class_property)) if class_property else "aircraft"
        shapes.append(Shape(name or "", polygons, number, values))
    if features and not shapes:
        reasons = ", ".join(f"{n} {reason}" for reason, n in counted(left_out).items())
        raise UserError(f"{str(path)!r} has no valid polygon: of its features are {reasons}.")
    if shapes and not any(shape.name for shape in shapes):
        raise UserError(
            f"no feature of {str(path)!r} has a class of up to 100 letters as its "
            f"{class_property!r}; the properties are {sorted(properties)[:20]}, see "
            "--class-property."
        )
    return Drawn(path, shapes, _crs(path, content), left_out)


def counted(left_out: Mapping[str, list[str]]) -> Counter[str]:
    """The numbers of what is left out, by the reason and the first three names."""
    return Counter(
        {
            f"{reason} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})": len(names)
            for reason, names in left_out.items()
        }
    )


def in_pixels(shapes: list[Shape], crs: CRS, scene: Scene) -> list[Shape]:
    """The shapes in pixels of a scene, without those outside the area of its reference system.

    Across 180 degrees of longitude, a ring may continue in either way, or be cut there.

    Raises:
        UserError: One reference system cannot be converted to the other.
    """
    rings = [ring for shape in shapes for polygon in shape.polygons for ring in polygon]
    if not rings:
        return []
    sides = np.array([len(ring) for ring in rings])
    try:
        x, y = (np.array(v) for v in reproject(crs, scene.crs, *np.concatenate(rings).T))
        around = _around(scene.crs)
    except (RasterioError, CPLE_BaseError):
        raise UserError(
            f"cannot convert the labels' reference system to that of {str(scene.path)!r}; save the "
            "labels in WGS 84 (EPSG:4326)."
        ) from None
    if around:
        centre, _ = pixels_to_crs(scene.transform, scene.width / 2, scene.height / 2)
        x = _beside(x, sides, centre, around)
    points = np.stack(_crs_to_pixels(scene.transform, x, y), 1)
    converted = iter(np.split(points, np.cumsum(sides)[:-1]))
    moved = [
        replace(shape, polygons=[[next(converted) for _ in polygon] for polygon in shape.polygons])
        for shape in shapes
    ]
    return [shape for shape in moved if np.isfinite((*shape.box, shape.area)).all()]


def painted(shapes: list[Shape], window: tuple[int, int, int, int]) -> np.ndarray:
    """`[height,width]` of a window (x, y, width, height): k where the k-th shape is, 0 elsewhere.

    A pixel belongs to a shape if its centre does; of several, to the last one.
    """
    x, y, width, height = window
    outlines = [
        ({"type": "MultiPolygon", "coordinates": shape.polygons}, i)
        for i, shape in enumerate(shapes, start=1)
    ]
    ids = np.zeros((height, width), np.uint8 if len(outlines) < 256 else np.uint16)
    if outlines:
        rasterize(outlines, out=ids, transform=Affine.translation(x, y))
    return ids


def _crs_to_pixels(transform: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """The inverse of `pixels_to_crs`."""
    scale = transform.a * transform.e - transform.b * transform.d
    x, y = x - transform.c, y - transform.f
    across = (transform.e * x - transform.b * y) / scale
    return across, (transform.a * y - transform.d * x) / scale


def _around(crs: CRS) -> float | None:
    """How far it is around the earth along x; None if x does not go around it."""
    if crs.is_geographic:
        return 360.0
    return 2 * math.pi * WEB_MERCATOR_RADIUS if crs.to_epsg() == 3857 else None


def _beside(x: np.ndarray, sides: np.ndarray, centre: float, around: float) -> np.ndarray:
    """Move points by whole turns around the earth, so that no ring jumps and each is near a centre.

    Args:
        x: Of the points of all rings [N].
        sides: The number of points of each ring [R].
        centre: Where the first point of each ring shall be near.
        around: The length of a turn.
    """
    finite = np.where(np.isfinite(x), x, 0)
    first = np.cumsum(sides) - sides
    jumps = np.cumsum(np.rint(np.diff(finite, prepend=finite[0]) / around))
    turns = jumps[first] - np.rint((finite[first] - centre) / around)
    return x - (jumps - np.repeat(turns, sides)) * around


def _polygons(geometry: Any) -> list[Polygon] | str:
    """The polygons of a feature's geometry, or the reason to leave the feature out."""
    if geometry is None:
        return EMPTY
    if not isinstance(geometry, dict) or geometry.get("type") not in ("Polygon", "MultiPolygon"):
        return OTHER
    parts = geometry.get("coordinates")
    try:
        parts = [parts] if geometry["type"] == "Polygon" else parts
        polygons = [[_ring(ring) for ring in polygon] for polygon in parts or () if polygon]
    except (TypeError, ValueError, OverflowError):
        return INVALID
    return polygons or EMPTY


def _ring(points: Any) -> np.ndarray:
    ring = np.array([(float(x), float(y)) for x, y, *_ in points])
    if len(ring) < 4 or not np.isfinite(ring).all():
        raise ValueError
    return ring


def _area(ring: np.ndarray) -> float:
    x, y = (ring - ring[0]).T
    return float(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2


def _crs(path: Path, content: dict[str, Any]) -> CRS:
    """The reference system that QGIS and GDAL write as `crs`; RFC 7946 allows WGS 84 only."""
    named = content.get("crs")
    try:
        with rasterio.Env():  # GDAL's message goes into the error, not on the screen
            return CRS.from_user_input(named["properties"]["name"] if named else "OGC:CRS84")
    except (CRSError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{str(path)!r} names an unknown reference system; save it in WGS 84 (EPSG:4326)."
        ) from None
