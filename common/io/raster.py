"""Reads rasters of any size by windows, as RGB of 8 bits: GeoTIFF, PNG, JPEG, JPEG 2000.

GDAL may open these formats only, and no file beside the named one: a hostile raster can name
neither a URL nor another file.
"""

import argparse
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError  # some of GDAL's errors come bare
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform as reproject
from rasterio.windows import Window

from common.cli import UserError, number, positive
from common.io.files import open_file
from common.io.images import read_header, turned

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".jp2")
# The first bytes of a file → GDAL's driver. No other driver is ever used.
DRIVERS = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",
    b"MM\0+": "GTiff",
    b"\0\0\0\x0cjP": "JP2OpenJPEG",
    b"\xffO\xffQ": "JP2OpenJPEG",
}
RGB = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
GDAL = {
    "GDAL_CACHEMAX": 256,  # MB; the default is a share of the machine's memory
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
}
MAX_WIDTH = 1 << 20  # a row of windows is held in memory
MAX_BLOCK = 1 << 31  # bytes that GDAL decodes at once
# A blank tile of a TIFF takes 16 bytes for 262,144 pixels; a header that promises more is damaged.
MAX_PIXELS_PER_BYTE, ALWAYS_READ = 100_000, 100_000_000
SAMPLE = 1024  # longest side of the overview whose percentiles are taken, pixels

logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # what it logs, it also raises
warnings.simplefilter("ignore", NotGeoreferencedWarning)


@dataclass(frozen=True)
class Look:
    """How a raster becomes RGB of 8 bits.

    Args:
        bands: Three bands or one, from 1. None: red, green and blue by their colour interpretation,
            otherwise the first three, or the only one.
        stretch: Percentiles of the whole scene that become 0 and 255, for each band. None: 2 and 98
            for bands of more than 8 bits; 8 bits stay as they are.
        limits: Values that become 0 and 255, instead of `stretch`.
        gsd: Metres of ground per pixel of the result; None leaves the pixels as they are.
    """

    bands: Sequence[int] | None = None
    stretch: Sequence[float] | None = None
    limits: Sequence[float] | None = None
    gsd: float | None = None


AS_IT_IS = Look()


class Scene:
    """An open raster. Use `open_scene`."""

    def __init__(self, path: Path, dataset: Any, look: Look, is_picture: bool) -> None:
        self.path, self.dataset, self.is_picture = path, dataset, is_picture
        self.width, self.height = dataset.width, dataset.height
        self.transform, self.crs = dataset.transform, dataset.crs
        self.bands = _bands(path, dataset, look.bands)
        flags = [dataset.mask_flag_enums[band - 1] for band in self.bands]
        self._all_valid = all(MaskFlags.all_valid in flag for flag in flags)
        alphas = [i for i, c in enumerate(dataset.colorinterp, start=1) if c == ColorInterp.alpha]
        self._alpha = alphas[0] if alphas else None
        self._palette = _palette(dataset, self.bands)
        self._limits = self._stretch(look)

    @cached_property
    def metres(self) -> CRS | None:
        """An equal-area projection around the scene's centre; None if it is not georeferenced."""
        return _metric(self)

    def read(self, x: int, y: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray | None]:
        """RGB of a part of the scene, uint8 [height,width,3], and which pixels are valid.

        The second is bool [height,width], or None if all are. Invalid pixels are black.

        Raises:
            UserError: The file is damaged or cut short.
        """
        values, valid = self._values(Window(x, y, width, height), (height, width))
        if self._palette is not None:
            values = np.moveaxis(self._palette[values[0]], 2, 0)
            values, opaque = values[:3], values[3] > 0
            valid = valid & opaque if valid is not None else opaque
        elif self._limits is not None:
            low, high = (limit[:, None, None] for limit in self._limits)
            with np.errstate(over="ignore"):
                scaled = (np.nan_to_num(values).astype(np.float32) - low) * (255 / (high - low))
            values = (scaled.clip(0, 255) + 0.5).astype(np.uint8)
        pixels = np.empty((height, width, 3), np.uint8)
        pixels[...] = np.moveaxis(values, 0, 2)  # one band is repeated
        if valid is not None and valid.all():
            valid = None
        if valid is not None:
            pixels[~valid] = 0
        return pixels, valid

    def _values(
        self, window: Window, shape: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The values of the bands [B,*shape] as stored, and where they are valid."""
        bands, valid = list(self.bands), None
        how = {"window": window, "out_shape": (len(bands), *shape)}
        with _damage_of(self.path):
            values = self.dataset.read(bands, **how)
            if self._alpha:  # GDAL's own mask knows the alpha of two and of four bands only
                valid = self.dataset.read(self._alpha, window=window, out_shape=shape) > 0
            elif not self._all_valid:
                valid = self.dataset.read_masks(bands, **how).any(0)
        if values.dtype.kind == "f":
            finite = np.isfinite(values).all(0)
            valid = finite if valid is None else valid & finite
        return values, valid

    def _stretch(self, look: Look) -> tuple[np.ndarray, np.ndarray] | None:
        """The values of each band that become 0 and 255; None: no change."""
        is_8_bit = all(self.dataset.dtypes[band - 1] == "uint8" for band in self.bands)
        if self._palette is not None or (is_8_bit and not look.limits and not look.stretch):
            return None
        if look.limits:
            return _limits(np.repeat(np.array([look.limits]).T, len(self.bands), 1))
        factor = max(1.0, max(self.width, self.height) / SAMPLE)
        shape = max(1, round(self.height / factor)), max(1, round(self.width / factor))
        values, valid = self._values(Window(0, 0, self.width, self.height), shape)
        valid_values = values.reshape(len(values), -1) if valid is None else values[:, valid]
        if valid_values.shape[1] == 0:
            raise no_valid_pixel(self.path)
        return _limits(np.percentile(valid_values.astype(float), look.stretch or (2, 98), axis=1))


def _limits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Limits [2,B] as float32, so far apart that 255 divided by the difference is finite."""
    low, high = values.clip(-1e30, 1e30).astype(np.float32)
    return low, np.maximum(high, low + np.maximum(1e-30, np.abs(low) * 1e-6, dtype=np.float32))


@contextmanager
def open_scene(path: Path, look: Look = AS_IT_IS) -> Iterator[Scene]:
    """Open a raster for reading by windows.

    Raises:
        UserError: It is missing or not a raster, or `look` asks for what it does not have.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open_file(path, "image", limit=1 << 50))
        start, size = file.read(6), file.seek(0, 2)
        drivers = [driver for head, driver in DRIVERS.items() if start.startswith(head)]
        if not drivers:
            raise UserError(f"image {str(path)!r} is not a PNG, JPEG, GeoTIFF or JPEG 2000 file.")
        # GDAL takes names in UTF-8 only, and there is no other file in this folder.
        source = Path(stack.enter_context(TemporaryDirectory()), "scene")
        source.symlink_to(path.absolute())
        stack.enter_context(rasterio.Env(**GDAL))
        with _damage_of(path):
            dataset = stack.enter_context(rasterio.open(source, driver=drivers[0]))
            _check(path, dataset, size)
            picture = drivers[0] in ("PNG", "JPEG")
            if picture and dataset.width * dataset.height <= ALWAYS_READ:
                dataset = _upright(dataset, read_header(path).orientation, stack)
            if look.gsd is not None:
                dataset = stack.enter_context(_resampled(path, dataset, look.gsd))
            scene = Scene(path, dataset, look, picture)
        yield scene


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """Turn GDAL's errors into one sentence."""
    try:
        yield
    except (RasterioError, CPLE_BaseError, ValueError):
        raise UserError(f"image {str(path)!r} is damaged or truncated; fetch it again.") from None


def no_valid_pixel(path: Path) -> UserError:
    """The error for a scene that is nodata or transparent everywhere."""
    return UserError(f"image {str(path)!r} has no valid pixel: all are nodata or transparent.")


def _check(path: Path, dataset: Any, size: int) -> None:
    """Refuse what cannot be read, or not in bounded memory and time."""
    if any("complex" in dtype for dtype in dataset.dtypes):
        raise UserError(f"image {str(path)!r} holds complex numbers; convert them to magnitudes.")
    pixels = dataset.width * dataset.height
    rows, columns = dataset.block_shapes[0]
    block = rows * columns * np.dtype(dataset.dtypes[0]).itemsize * dataset.count
    if dataset.width > MAX_WIDTH:
        raise UserError(f"image {str(path)!r} is wider than {MAX_WIDTH:,} pixels.")
    if pixels > max(ALWAYS_READ, MAX_PIXELS_PER_BYTE * size):
        raise UserError(
            f"image {str(path)!r} states {dataset.width}x{dataset.height} pixels, but has only "
            f"{size} bytes; fetch it again."
        )
    if block > MAX_BLOCK and rows > 1:
        raise UserError(
            f"image {str(path)!r} is stored in blocks of {columns}x{rows} pixels; convert it with "
            "`gdal_translate -of COG`."
        )


def _bands(path: Path, dataset: Any, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The three bands that are read, or the one that is repeated."""
    if wanted is None:
        colours = list(dataset.colorinterp)
        others = [i for i, c in enumerate(colours, start=1) if c != ColorInterp.alpha] or [1]
        wanted = others[:3] if len(others) > 2 else others[:1]
        if all(colour in colours for colour in RGB):
            wanted = [1 + colours.index(colour) for colour in RGB]
    for band in wanted:
        if band > dataset.count:
            raise UserError(
                f"image {str(path)!r} has no band {band}; it has {dataset.count}, see --bands."
            )
    return tuple(wanted)


def _palette(dataset: Any, bands: tuple[int, ...]) -> np.ndarray | None:
    """RGBA of each value of a palette, uint8 [values,4]."""
    if len(bands) > 1 or dataset.colorinterp[bands[0] - 1] != ColorInterp.palette:
        return None
    colours = np.zeros((np.iinfo(dataset.dtypes[bands[0] - 1]).max + 1, 4), np.uint8)
    for value, colour in dataset.colormap(bands[0]).items():
        colours[value] = colour
    return colours


def _upright(dataset: Any, orientation: int, stack: ExitStack) -> Any:
    """The dataset as every viewer shows it: a copy in memory if it must be turned."""
    if orientation == 1:
        return dataset
    pixels = np.moveaxis(turned(np.moveaxis(dataset.read(), 0, -1), orientation), -1, 0)
    count, height, width = pixels.shape
    memory = stack.enter_context(rasterio.MemoryFile())
    kind = {"driver": "GTiff", "dtype": pixels.dtype, "compress": "lzw"}
    with memory.open(**kind, count=count, height=height, width=width) as copy:
        copy.write(pixels)
        copy.colorinterp = dataset.colorinterp
    return stack.enter_context(memory.open())


def pixels_to_crs(transform: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """Convert points of an image, in pixels from its top left corner, to its reference system."""
    return (
        transform.a * x + transform.b * y + transform.c,
        transform.d * x + transform.e * y + transform.f,
    )


def _metric(raster: Any) -> CRS | None:
    """An equal-area projection around the centre of a dataset or a scene, in metres.

    Returns:
        None if the raster is not georeferenced: no reference system, or a meaningless one.
    """
    crs, transform, width, height = raster.crs, raster.transform, raster.width, raster.height
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


def _resampled(path: Path, dataset: Any, gsd: float) -> Any:
    """A view of the dataset with `gsd` metres of ground per pixel."""
    width, height, transform = dataset.width, dataset.height, dataset.transform
    metres = _metric(dataset)
    if metres is None:
        raise UserError(
            f"image {str(path)!r} is not georeferenced, so --gsd cannot apply; leave it out."
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
    """Convert points [N,2] in `source` to pixels of an image whose reference system is `target`."""
    x, y = (np.array(v) for v in reproject(source, target, *points.T))
    scale = transform.a * transform.e - transform.b * transform.d
    x, y = x - transform.c, y - transform.f
    across = (transform.e * x - transform.b * y) / scale
    return np.stack([across, (transform.a * y - transform.d * x) / scale], 1)


def add_look_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `look_from` reads."""
    group = parser.add_argument_group("how a raster becomes a picture")
    add = group.add_argument
    add(
        "--bands",
        type=positive,
        nargs="+",
        metavar="BAND",
        help="three bands or one, from 1; default: red, green and blue, or the first three",
    )
    add(
        "--stretch",
        type=number(float, 0, 100),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="percentiles that become black and white; default: 2 98, and none for 8 bits",
    )
    add(
        "--range",
        type=number(float, -1e30, 1e30),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values that become black and white, instead of --stretch",
    )
    add(
        "--gsd",
        type=number(float, 0.001, 1000),
        metavar="METRES",
        help="resample to this ground resolution, that of the training",
    )


def look_from(args: argparse.Namespace) -> Look:
    """How rasters are read.

    Raises:
        UserError: The options contradict each other.
    """
    if args.bands and len(args.bands) not in (1, 3):
        raise UserError(f"--bands takes three bands or one, not {len(args.bands)}.")
    for flag, limits in (("--stretch", args.stretch), ("--range", args.range)):
        if limits and not limits[0] < limits[1]:
            raise UserError(f"{flag} {limits[0]:g} {limits[1]:g}: the first must be smaller.")
    if args.stretch and args.range:
        raise UserError("--stretch and --range exclude each other; leave one of them out.")
    return Look(args.bands, args.stretch, args.range, args.gsd)
