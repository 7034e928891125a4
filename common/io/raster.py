"""Reads rasters of any size by windows, as RGB of 8 bits: GeoTIFF, PNG, JPEG, JPEG 2000.

GDAL may open these formats only, and no file beside the named one: a hostile raster can name
neither a URL nor another file.
"""

import logging
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError  # some of GDAL's errors come bare
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform as reproject
from rasterio.windows import Window

from common.cli import UserError, say
from common.io.files import open_file
from common.io.images import orientation, stored_window, turned
from common.io.look import AS_IT_IS, Look, as_limits, sampled_parts

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
# Stands for pixels that are not valid: ImageNet's mean, which every network sees as zeros. A black
# rim has an edge that networks take for aircraft.
NEUTRAL = (124, 116, 104)
GDAL = {
    "GDAL_CACHEMAX": 256 << 20,  # bytes; the default is a share of the machine's memory
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    # This way of reading a whole PNG returns memory that was never written if the PNG is damaged.
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO",
}
MAX_WIDTH = 1 << 20  # a row of windows is held in memory
MAX_BLOCK = 1 << 31  # bytes that GDAL decodes at once
# A blank tile of a TIFF takes 16 bytes for 262,144 pixels; a header that promises more is damaged.
MAX_PIXELS_PER_BYTE, ALWAYS_READ = 100_000, 100_000_000
ENOUGH, MOST_OF_A_PART = 1024, 1 << 14  # values of a sample
# What GDAL says of a file that is not damaged → what to do. Otherwise the file is damaged.
REMEDIES = {
    "codec": "convert it with `gdal_translate -co COMPRESS=DEFLATE` where GDAL has that codec",
    "allocate": "convert it with `gdal_translate -of COG`",
    "scans": "convert it with `gdal_translate -of COG`",
}
# libjpeg holds a whole progressive JPEG in memory, 3 to 6 bytes per pixel, and GDAL allows 500 MB.
os.environ.setdefault("JPEGMEM", "2000M")

_remarks: set[str] = set()
logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # what it logs, it also raises
warnings.simplefilter("ignore", NotGeoreferencedWarning)


class Scene:
    """An open raster. Use `open_scene`.

    `limits` are the values of each band that become 0 and 255, float32 [2,B]; None: no change.
    `chosen` says which bands are read and why.
    """

    def __init__(
        self, path: Path, dataset: Any, look: Look, is_picture: bool, orientation: int
    ) -> None:
        self.path, self.dataset, self.is_picture = path, dataset, is_picture
        self.orientation = orientation
        size = dataset.width, dataset.height
        self.width, self.height = size if orientation < 5 else size[::-1]
        self.transform, self.crs = dataset.transform, dataset.crs
        self.bands, self.chosen = _bands(path, dataset, look)
        flags = [dataset.mask_flag_enums[band - 1] for band in self.bands]
        self._all_valid = all(MaskFlags.all_valid in flag for flag in flags)
        alphas = [i for i, c in enumerate(dataset.colorinterp, start=1) if c == ColorInterp.alpha]
        self._alpha = alphas[0] if alphas else None
        self._palette = _palette(dataset, self.bands)
        self.limits = self._stretch(look)

    @cached_property
    def metres(self) -> CRS | None:
        """An equal-area projection around the scene's centre; None if it is not georeferenced."""
        return _metric(self)

    @cached_property
    def gsd(self) -> float | None:
        """Metres of ground per pixel at the scene's centre; None if it is not georeferenced."""
        step = _ground_step(self, self.metres)
        return None if step is None else round(math.sqrt(step[0] * step[1]), 4)

    @property
    def all_valid(self) -> bool:
        """Whether every pixel is known to be valid without reading it."""
        is_float = any("float" in self.dataset.dtypes[band - 1] for band in self.bands)
        opaque = self._palette is None or bool((self._palette[:, 3] > 0).all())
        return self._all_valid and not self._alpha and not is_float and opaque

    def record(self) -> dict[str, Any]:
        """How the scene became RGB, as plain values.

        Returns:
            `bands`; `limits`, if values were stretched; `gsd` in metres, if it is georeferenced.
        """
        record: dict[str, Any] = {"bands": list(self.bands)}
        if self.limits is not None:
            record["limits"] = self.limits.astype(float).tolist()
        if self.gsd is not None:
            record["gsd"] = self.gsd
        if "see --bands" in self.chosen:
            _remark(self.path, f"is read from bands {self.chosen}")
        return record

    def read(self, x: int, y: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray | None]:
        """RGB of a part of the scene, uint8 [height,width,3], and which pixels are valid.

        The second is bool [height,width], or None if all are. Invalid pixels are `NEUTRAL`.

        Raises:
            UserError: The file is damaged or cut short.
        """
        values, valid = self._values(x, y, width, height)
        if self._palette is not None:
            values = np.moveaxis(self._palette[values[0]], 2, 0)
            values, opaque = values[:3], values[3] > 0
            valid = valid & opaque if valid is not None else opaque
        elif self.limits is not None:
            low, high = (limit[:, None, None] for limit in self.limits)
            with np.errstate(over="ignore"):
                scaled = (np.nan_to_num(values).astype(np.float32) - low) * (255 / (high - low))
            values = (scaled.clip(0, 255) + 0.5).astype(np.uint8)
        pixels = np.empty((height, width, 3), np.uint8)
        pixels[...] = np.moveaxis(values, 0, 2)  # one band is repeated
        if valid is not None and valid.all():
            valid = None
        if valid is not None:
            pixels[~valid] = NEUTRAL
        return pixels, valid

    def _values(
        self, x: int, y: int, width: int, height: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The values of the bands [B,height,width] as stored, and where they are valid."""
        shown = self.width, self.height
        window = Window(*stored_window((x, y, width, height), shown, self.orientation))
        bands, valid = list(self.bands), None
        with _errors_of(self.path):
            values = self.dataset.read(bands, window=window)
            if self._alpha:  # GDAL's own mask knows the alpha of two and of four bands only
                valid = self.dataset.read(self._alpha, window=window) > 0
            elif not self._all_valid:
                valid = self.dataset.read_masks(bands, window=window).any(0)
        if values.dtype.kind == "f":
            finite = np.isfinite(values).all(0)
            valid = finite if valid is None else valid & finite
        values = turned(values, self.orientation)
        return values, None if valid is None else turned(valid, self.orientation)

    def _stretch(self, look: Look) -> np.ndarray | None:
        """`limits`, by the options, the bits of the bands, or the percentiles of the scene."""
        # A JPEG has 8, and GDAL refuses to look if its EXIF block is invalid.
        is_jpeg = self.dataset.driver == "JPEG"
        tags = [{} if is_jpeg else self.dataset.tags(i, "IMAGE_STRUCTURE") for i in self.bands]
        bits = np.array([int(tag.get("NBITS", 8)) for tag in tags])
        is_8_bit = all(self.dataset.dtypes[band - 1] == "uint8" for band in self.bands)
        if self._palette is not None:
            return None
        if look.limits is not None:
            return as_limits(*(np.broadcast_to(limit, len(self.bands)) for limit in look.limits))
        if is_8_bit and not look.stretch:
            # Black and white with a bit each are 0 and 1.
            return as_limits(0.0 * bits, 2.0**bits - 1) if (bits < 8).any() else None
        sample = self._sample()
        if sample.shape[1] == 0:
            raise no_valid_pixel(self.path)
        return as_limits(*np.percentile(sample.astype(float), look.stretch or (2, 98), axis=1))

    def _sample(self) -> np.ndarray:
        """Valid values [B,n] of squares spread evenly over the scene, or if few are, of all of it.

        Not GDAL's reduced reading: it would take the overviews where a file has some, and these are
        averages, whose percentiles differ.
        """
        sample = np.zeros((len(self.bands), 0))
        for whole in (False, True):
            rows, columns = (sampled_parts(n, whole) for n in (self.height, self.width))
            parts = [sample[:, :0]]
            for (y, height), (x, width) in product(rows, columns):
                values, valid = self._values(x, y, width, height)
                seen = slice(None) if valid is None else valid.ravel()
                values = values.reshape(len(values), -1)[:, seen]
                parts.append(values[:, :: 1 + whole * values.shape[1] // MOST_OF_A_PART])
            sample = np.concatenate(parts, 1)
            if sample.shape[1] > ENOUGH:
                break
        return sample


@contextmanager
def open_scene(path: Path, look: Look = AS_IT_IS, most_pixels: float = math.inf) -> Iterator[Scene]:
    """Open a raster for reading by windows.

    Raises:
        UserError: It is missing or not a raster, has more than `most_pixels`, or `look` asks for
            what it does not have.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open_file(path, "image", limit=1 << 50))
        start, size = file.read(6), file.seek(0, 2)
        drivers = [driver for head, driver in DRIVERS.items() if start.startswith(head)]
        if not drivers:
            problem = "is not a PNG, JPEG, GeoTIFF or JPEG 2000 file; `gdal_translate` converts it"
            raise UserError(f"image {str(path)!r} {problem}.")
        # GDAL takes names in UTF-8 only, and there is no other file in this folder.
        source = Path(stack.enter_context(TemporaryDirectory()), "scene")
        source.symlink_to(path.absolute())
        stack.enter_context(rasterio.Env(**GDAL))
        with _errors_of(path):
            dataset = stack.enter_context(rasterio.open(source, driver=drivers[0]))
            _check(path, dataset, size)
            if dataset.width * dataset.height > most_pixels:
                raise UserError(
                    f"image {str(path)!r} has {dataset.width}x{dataset.height} pixels; up to "
                    f"{most_pixels:,} are read here. Cut it into parts first."
                )
            with suppress(RasterioError, CPLE_BaseError):  # an invalid EXIF block: one error
                _ = dataset.tags(), dataset.colorinterp
            if drivers[0] == "GTiff" and dataset.subdatasets:
                _remark(path, f"has {len(dataset.subdatasets)} pages; only the first one is read")
            placed = dataset.crs or not dataset.transform.is_identity
            turn = orientation(file) if look.upright and not placed else 1
            if look.gsd and not (look.gsd_if_placed and _metric(dataset) is None):
                dataset = stack.enter_context(_resampled(path, dataset, look.gsd))
            scene = Scene(path, dataset, look, drivers[0] in ("PNG", "JPEG"), turn)
        yield scene


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turn GDAL's errors into one sentence, with GDAL's own reason."""
    try:
        yield
    except (RasterioError, CPLE_BaseError, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = re.sub(r"\S*/scene\b", path.name, " ".join(str(cause).split()))
        reason = reason.partition(" (this error")[0][:160]
        remedies = [remedy for word, remedy in REMEDIES.items() if word in reason]
        remedy = (remedies or ["it is damaged or truncated; fetch it again"])[0]
        sentence = f"image {str(path)!r} cannot be read (GDAL: {reason!a}): {remedy}."
        raise UserError(sentence) from None


def _remark(path: Path, remark: str) -> None:
    """Print a remark for the first file that it is true of, in this process."""
    if remark not in _remarks:
        _remarks.add(remark)
        say(f"{path.name!r} {remark} (said once for all such files)")


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


def _bands(path: Path, dataset: Any, look: Look) -> tuple[tuple[int, ...], str]:
    """The three bands that are read, or the one that is repeated; and the same with the reason."""
    wanted, reason = look.bands, "as asked for"
    if wanted is None:
        colours = list(dataset.colorinterp)
        others = [i for i, c in enumerate(colours, start=1) if c != ColorInterp.alpha] or [1]
        wanted, reason = others[:3] if len(others) > 2 else others[:1], f"of {len(others)}"
        if all(colour in colours for colour in RGB):
            wanted, reason = [1 + colours.index(colour) for colour in RGB], "by their colours"
        elif len(others) not in (1, 3):
            reason += " without names of colours, see --bands"
    for band in wanted:
        if band > dataset.count:
            raise UserError(
                f"image {str(path)!r} has no band {band}; it has {dataset.count}, see --bands."
            )
    return tuple(wanted), f"{' '.join(map(str, wanted))} ({reason})"


def _palette(dataset: Any, bands: tuple[int, ...]) -> np.ndarray | None:
    """RGBA of each value of a palette, uint8 [values,4]."""
    if len(bands) > 1 or dataset.colorinterp[bands[0] - 1] != ColorInterp.palette:
        return None
    colours = np.zeros((np.iinfo(dataset.dtypes[bands[0] - 1]).max + 1, 4), np.uint8)
    for value, colour in dataset.colormap(bands[0]).items():
        colours[value] = colour
    return colours


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
    except (RasterioError, CPLE_BaseError, CRSError):  # such as a latitude above 90
        return None


def _ground_step(raster: Any, metres: CRS | None) -> tuple[float, float] | None:
    """The metres of ground from one pixel of a dataset or a scene to the next, across and down."""
    if metres is None:
        return None
    transform = raster.transform
    points = np.array([(0, 0), (1, 0), (0, 1)]).T + [[raster.width / 2], [raster.height / 2]]
    x, y = reproject(raster.crs, metres, *pixels_to_crs(transform, *points))
    return math.hypot(x[1] - x[0], y[1] - y[0]), math.hypot(x[2] - x[0], y[2] - y[0])


def _resampled(path: Path, dataset: Any, gsd: float) -> Any:
    """A view of the dataset with `gsd` metres of ground per pixel."""
    width, height, transform = dataset.width, dataset.height, dataset.transform
    step = _ground_step(dataset, _metric(dataset))
    if step is None:
        raise UserError(
            f"image {str(path)!r} is not georeferenced, so --gsd cannot apply; leave it out."
        )
    across, down = gsd / step[0], gsd / step[1]
    # Alpha and nodata are in the bands that the view has. A mask is not, so it becomes an alpha.
    flags = dataset.mask_flag_enums[0]
    is_mask = MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags
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
        add_alpha=is_mask,
    )
