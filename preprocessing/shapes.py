"""Polygons of a GeoJSON file from any source, checked before anything relies on them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError

from common.cli import UserError
from common.io.files import read_json
from common.io.raster import Scene, crs_to_pixels

Polygon = list[np.ndarray]
"""An outer ring and its holes, float [N,2] each."""


@dataclass(frozen=True)
class Shape:
    """One object: its class and its polygons, several for a MultiPolygon."""

    name: str
    polygons: list[Polygon]

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


def read_labels(path: Path, class_property: str | None) -> tuple[list[Shape], CRS]:
    """The polygons of a GeoJSON file in its own coordinates, and their reference system.

    Raises:
        UserError: It is not GeoJSON, or a feature has no valid polygon or no class.
    """
    content = read_json(path)
    features = content.get("features") if isinstance(content, dict) else None
    if not isinstance(features, list) or not features:
        raise UserError(f"{str(path)!r} is not a GeoJSON file with features.")
    shapes = []
    for number, feature in enumerate(features, start=1):
        try:
            geometry, properties = feature["geometry"], feature.get("properties") or {}
            name = properties.get(class_property) if class_property else "aircraft"
            parts = geometry["coordinates"]
            kinds = {"Polygon": [parts], "MultiPolygon": parts}
            polygons = [[_ring(ring) for ring in polygon] for polygon in kinds[geometry["type"]]]
            if not polygons or not all(polygons):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise UserError(
                f"{str(path)!r}: feature {number} is not a valid Polygon or MultiPolygon; remove "
                "it, or repair it with QGIS's tool `Fix geometries`."
            ) from None
        if not isinstance(name, str | int) or not 0 < len(str(name)) <= 100:
            raise UserError(
                f"{str(path)!r}: feature {number} has {_short(name)} as its {class_property!r}; "
                "give every feature a class of up to 100 letters."
            )
        shapes.append(Shape(str(name), polygons))
    return shapes, _crs(path, content)


def in_pixels(shapes: list[Shape], crs: CRS, scene: Scene) -> list[Shape]:
    """The shapes in pixels of a scene, without those outside the area of its reference system.

    Raises:
        UserError: One reference system cannot be converted to the other.
    """
    rings = [ring for shape in shapes for polygon in shape.polygons for ring in polygon]
    try:
        points = crs_to_pixels(np.concatenate(rings), crs, scene.crs, scene.transform)
    except (RasterioError, CPLE_BaseError):
        raise UserError(
            f"cannot convert the labels' reference system to that of {str(scene.path)!r}; save the "
            "labels in WGS 84 (EPSG:4326)."
        ) from None
    converted = iter(np.split(points, np.cumsum([len(ring) for ring in rings])[:-1]))
    moved = [
        Shape(shape.name, [[next(converted) for _ in polygon] for polygon in shape.polygons])
        for shape in shapes
    ]
    return [shape for shape in moved if np.isfinite((*shape.box, shape.area)).all()]


def _short(value: Any) -> str:
    return ascii(value)[:40] if isinstance(value, int | float | None) else ascii(str(value)[:40])


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
