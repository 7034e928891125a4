"""Where on earth the pixels of a raster are (no torch here)."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform as reproject

from common.cli import UserError


def pixels_to_crs(transform: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """Where points of the image, in pixels from its top left corner, are in its own system."""
    return (
        transform.a * x + transform.b * y + transform.c,
        transform.d * x + transform.e * y + transform.f,
    )


def metric(crs: CRS | None, transform: Any, width: int, height: int) -> CRS | None:
    """An equal-area projection around the centre of a raster, in metres.

    Returns:
        None if the raster has no place on earth: no reference system, or a meaningless one.
    """
    if not crs or transform.is_identity:
        return None
    try:
        points = np.array([(width / 2, height / 2), (0, 0), (width, height)]).T
        lon, lat = reproject(crs, "EPSG:4326", *pixels_to_crs(transform, *points))
        if not all(map(math.isfinite, lon + lat)):
            return None
        return CRS.from_proj4(
            f"+proj=laea +lat_0={lat[0]} +lon_0={lon[0]} +datum=WGS84 +units=m +no_defs"
        )
    except (RasterioError, CPLE_BaseError):
        return None


def resampled(path: Path, dataset: Any, gsd: float) -> Any:
    """A view of the dataset in which a pixel shows `gsd` metres of ground."""
    width, height, transform = dataset.width, dataset.height, dataset.transform
    metres = metric(dataset.crs, transform, width, height)
    if metres is None:
        raise UserError(
            f"image {str(path)!r} has no place on earth, so --gsd cannot apply; leave it out."
        )
    points = np.array([(0, 0), (1, 0), (0, 1)]).T + [[width / 2], [height / 2]]
    x, y = reproject(dataset.crs, metres, *pixels_to_crs(transform, *points))
    across = gsd / math.hypot(x[1] - x[0], y[1] - y[0])
    down = gsd / math.hypot(x[2] - x[0], y[2] - y[0])
    is_palette = ColorInterp.palette in dataset.colorinterp
    smooth = Resampling.average if max(across, down) > 1 else Resampling.bilinear
    return WarpedVRT(
        dataset,
        crs=dataset.crs,
        transform=rasterio.Affine(
            *(transform.a * across, transform.b * down, transform.c),
            *(transform.d * across, transform.e * down, transform.f),
        ),
        width=max(1, round(width / across)),
        height=max(1, round(height / down)),
        resampling=Resampling.nearest if is_palette else smooth,
    )


def crs_to_pixels(points: np.ndarray, source: CRS, target: CRS, transform: Any) -> np.ndarray:
    """Points [N,2] in the system `source` as pixels of an image that lies in `target`."""
    x, y = (np.array(v) for v in reproject(source, target, *points.T))
    scale = transform.a * transform.e - transform.b * transform.d
    x, y = x - transform.c, y - transform.f
    across = (transform.e * x - transform.b * y) / scale
    return np.stack([across, (transform.a * y - transform.d * x) / scale], 1)
