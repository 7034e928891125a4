"""Rasters of every kind come out as the right RGB of 8 bits, with the right valid pixels."""

import os

import cv2
import numpy as np
import pytest
import rasterio
from helpers.rasters import raster, read_all
from PIL import Image, ImageOps

from common.cli import UserError
from common.io.raster import NEUTRAL, open_scene

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (3, 70, 50), np.uint8)
SHOWN = np.moveaxis(RGB, 0, 2)


@pytest.mark.parametrize(
    "profile",
    [
        {},
        {"tiled": True, "blockxsize": 16, "blockysize": 32},
        {"blockysize": 7, "compress": "lzw", "predictor": 2},
        {"BIGTIFF": "YES", "compress": "deflate"},
        {"interleave": "pixel", "tiled": True, "blockxsize": 32, "blockysize": 32},
        {"driver": "PNG"},
        {"driver": "JP2OpenJPEG", "QUALITY": 100, "REVERSIBLE": "YES"},
    ],
    ids=str,
)
def test_eight_bits_stay_as_they_are(tmp_path, profile):
    pixels, valid = read_all(raster(tmp_path / "a.x", RGB, **profile))
    assert np.array_equal(pixels, SHOWN)
    assert valid.all()


def test_jpeg(tmp_path):
    Image.fromarray(cv2.blur(SHOWN, (9, 9))).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    pixels, _ = read_all(tmp_path / "a.jpg")
    expected = np.asarray(Image.open(tmp_path / "a.jpg"))
    assert np.abs(pixels.astype(int) - expected).max() <= 2


def test_a_stray_byte_in_a_jpeg_does_no_harm(tmp_path):
    Image.fromarray(SHOWN).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    at = data.index(b"\xff\xdb")
    (tmp_path / "b.jpg").write_bytes(data[:at] + b"\0" + data[at:])
    assert np.array_equal(read_all(tmp_path / "b.jpg")[0], read_all(tmp_path / "a.jpg")[0])


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_seen_as_viewers_show_it(tmp_path, orientation, name):
    tag = Image.Exif()
    tag[0x0112] = orientation
    image = Image.fromarray(cv2.blur(SHOWN, (9, 9)))
    image.save(tmp_path / name, exif=tag, quality=95, subsampling=0)
    pixels, _ = read_all(tmp_path / name)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / name)))
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= 2


def test_bands_are_chosen_by_number_by_colour_or_in_their_order(tmp_path):
    values = RNG.integers(0, 256, (5, 20, 30), np.uint8)
    colours = ["blue", "green", "red", "undefined", "alpha"]
    values[4] = 255
    values[4, :9, :9] = 0
    path = raster(tmp_path / "a.tif", values, colours=colours)
    pixels, valid = read_all(path)
    assert np.array_equal(valid, values[4] > 0)
    assert np.array_equal(pixels[valid], np.moveaxis(values[[2, 1, 0]], 0, 2)[valid])
    assert (pixels[~valid] == NEUTRAL).all()
    pixels, _ = read_all(path, bands=(4, 1, 2))
    assert np.array_equal(pixels[valid], np.moveaxis(values[[3, 0, 1]], 0, 2)[valid])
    pixels, _ = read_all(path, bands=(4,))
    assert np.array_equal(pixels[valid], np.repeat(values[3, :, :, None], 3, 2)[valid])
    plain = ["gray", *["undefined"] * 3, "alpha"]
    pixels, _ = read_all(raster(tmp_path / "b.tif", values, colours=plain))
    assert np.array_equal(pixels[valid], np.moveaxis(values[:3], 0, 2)[valid])
    with pytest.raises(UserError, match="no band 6; it has 5"):
        read_all(path, bands=(6,))


@pytest.mark.parametrize("count", [1, 2])
def test_one_band_is_repeated(tmp_path, count):
    pixels, _ = read_all(raster(tmp_path / "a.tif", RGB[:count]))
    assert np.array_equal(pixels, np.repeat(RGB[0, :, :, None], 3, 2))


@pytest.mark.parametrize("driver", ["GTiff", "PNG"])
def test_palettes_are_expanded(tmp_path, driver):
    values = RNG.integers(0, 4, (1, 30, 20), np.uint8)
    colours = {0: (9, 8, 7, 255), 1: (200, 0, 0, 255), 2: (0, 200, 0, 255), 3: (1, 2, 3, 255)}
    path = tmp_path / ("a.tif" if driver == "GTiff" else "a.png")
    if driver == "GTiff":
        raster(path, values, palette=colours, photometric="palette")
    else:
        picture = Image.fromarray(values[0], "P")
        picture.putpalette([c for i in range(4) for c in colours[i][:3]])
        picture.save(path)
    pixels, valid = read_all(path)
    assert np.array_equal(pixels, np.array([colours[i][:3] for i in range(4)])[values[0]])
    assert valid.all()


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "float32", "float64"])
def test_more_bits_are_stretched_by_percentiles_of_the_scene(tmp_path, dtype):
    values = (np.arange(3 * 100 * 100).reshape(3, 100, 100) % 9_973).astype(dtype)
    values[:, :20] = -9999 if dtype[0] in "fi" else 0
    nodata = float(values[0, 0, 0])
    path = raster(tmp_path / "a.tif", values, nodata=nodata)
    pixels, valid = read_all(path, stretch=(10, 80))
    assert np.array_equal(valid, (values != nodata).any(0))
    for band in range(3):
        seen = values[band][valid].astype(float)
        low, high = np.percentile(seen, (10, 80))
        expected = np.clip((seen - low) / (high - low) * 255, 0, 255)
        assert np.abs(pixels[..., band][valid] - expected).max() <= 0.51
    pixels, _ = read_all(path, limits=(1000, 3000))
    expected = np.clip((values.astype(float) - 1000) / 2000 * 255, 0, 255)
    assert np.abs(np.moveaxis(pixels, 2, 0)[:, valid] - expected[:, valid]).max() <= 0.51


def test_not_a_number_is_not_valid(tmp_path):
    values = RNG.random((3, 40, 40), np.float32)
    values[1, :10] = np.nan
    values[2, -10:] = np.inf
    _, valid = read_all(raster(tmp_path / "a.tif", values))
    assert np.array_equal(valid, np.isfinite(values).all(0))


def test_a_sixteen_bit_png(tmp_path):
    values = np.linspace(0, 60_000, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels, _ = read_all(tmp_path / "a.png", stretch=(0, 100))
    assert np.abs(pixels[..., 1] - values / 60_000 * 255).max() <= 0.51


def test_transparent_pixels_of_a_png(tmp_path):
    values = np.concatenate([SHOWN, np.full((70, 50, 1), 255, np.uint8)], 2)
    values[:30, :, 3] = 0
    Image.fromarray(values).save(tmp_path / "a.png")
    _, valid = read_all(tmp_path / "a.png")
    assert np.array_equal(valid, values[..., 3] > 0)


def test_resampling_to_a_ground_resolution(tmp_path):
    values = np.zeros((3, 400, 600), np.uint8)
    values[:, 100:200, 150:300] = 250
    place = {"crs": "EPSG:32631", "transform": rasterio.Affine(0.3, 0, 500_000, 0, -0.3, 5e6)}
    path = raster(tmp_path / "a.tif", values, **place)
    with open_scene(path) as whole:
        assert (whole.width, whole.height) == (600, 400)
    pixels, _ = read_all(path, gsd=0.6)
    assert pixels.shape == (200, 300, 3)  # 60 times 120 metres of ground, as before
    assert np.array_equal(pixels[51:99, 76:149], np.full((48, 73, 3), 250))
    assert not pixels[:49].any()
    with pytest.raises(UserError, match="not georeferenced"):
        read_all(raster(tmp_path / "b.tif", values), gsd=0.6)


@pytest.mark.parametrize("kind", ["tif", "png", "jpg", "jp2"])
def test_a_truncated_file_is_refused(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    noise = RNG.integers(0, 256, (3, 300, 300), np.uint8)
    if kind == "jpg":
        Image.fromarray(np.moveaxis(noise, 0, 2)).save(path)
    else:
        raster(path, noise, {"tif": "GTiff", "png": "PNG", "jp2": "JP2OpenJPEG"}[kind])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="damaged or truncated"):
        read_all(path)


def test_what_is_no_raster_is_refused(tmp_path):
    link = tmp_path / "remote.vrt"
    link.write_text('<VRTDataset rasterXSize="9" rasterYSize="9"></VRTDataset>')
    (tmp_path / "a.tif").write_bytes(link.read_bytes())
    os.mkfifo(tmp_path / "pipe.tif")
    complex_ = raster(tmp_path / "c.tif", np.ones((1, 9, 9), np.complex64))
    short = raster(tmp_path / "wide.tif", RGB, SPARSE_OK="TRUE")
    data = bytearray(short.read_bytes())
    for tag in (b"\x00\x01", b"\x01\x01"):  # width and height in the first directory
        at = data.index(tag + b"\x03\x00\x01\x00\x00\x00")
        data[at + 8 : at + 10] = b"\xff\xff"
    short.write_bytes(data)
    for path, sentence in (
        (tmp_path / "a.tif", "is not a PNG, JPEG, GeoTIFF or JPEG 2000"),
        (tmp_path / "none.tif", "there is no image"),
        (tmp_path / "pipe.tif", "not a regular file"),
        (complex_, "complex numbers"),
        (short, "states 65535x65535 pixels"),
    ):
        with pytest.raises(UserError, match=sentence):
            read_all(path)


def test_no_file_beside_the_named_one_is_opened(tmp_path):
    path = raster(tmp_path / "a.tif", RGB)
    beside = tmp_path / "a.tif.aux.xml"
    beside.write_text("<PAMDataset><SRS>EPSG:32631</SRS></PAMDataset>")
    (tmp_path / "a.tfw").write_text("1\n0\n0\n-1\n5\n5\n")
    (tmp_path / "a.tif.msk").write_bytes(raster(tmp_path / "m.tif", RGB[:1] * 0).read_bytes())
    with open_scene(path) as scene:
        assert scene.metres is None
        assert scene.transform.is_identity
    assert read_all(path)[1].all()


@pytest.mark.parametrize("hidden", ["nodata", "alpha"])
def test_resampling_keeps_what_is_not_valid(tmp_path, hidden):
    values = np.full((4, 200, 200), 90, np.uint8)
    values[3] = 255
    values[:, :100] = 0
    place = {"crs": "EPSG:32631", "transform": rasterio.Affine(0.3, 0, 500_000, 0, -0.3, 5e6)}
    if hidden == "alpha":
        path = raster(
            tmp_path / "a.tif", values, colours=["red", "green", "blue", "alpha"], **place
        )
    else:
        path = raster(tmp_path / "a.tif", values[:3], nodata=0, **place)
    pixels, valid = read_all(path, gsd=0.6)
    assert not valid[:49].any()
    assert valid[51:].all()
    assert (pixels[51:] == 90).all()
    assert (pixels[:49] == NEUTRAL).all()


@pytest.mark.parametrize("place", [(40, 40), (0, 0), (2990, 1500)])
def test_few_valid_pixels_of_a_large_scene_are_found(tmp_path, place):
    """Also between the squares of the sample."""
    values = np.zeros((1, 3000, 3000), np.uint16)
    y, x = place
    part = values[:, y : y + 40, x : x + 40]
    part[...] = RNG.integers(100, 5000, part.shape)
    path = raster(tmp_path / "a.tif", values, nodata=0, compress="deflate")
    with open_scene(path) as scene:
        expected = np.percentile(part.astype(float), (2, 98))
        assert scene.limits[:, 0] == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("gsd", [None, 0.6])
def test_black_and_white_of_one_bit(tmp_path, gsd):
    values = np.zeros((1, 200, 200), np.uint8)
    values[:, 60:140, 60:140] = 1
    place = {"crs": "EPSG:32631", "transform": rasterio.Affine(0.3, 0, 500_000, 0, -0.3, 5e6)}
    pixels, _ = read_all(raster(tmp_path / "a.tif", values, nbits=1, **place), gsd=gsd)
    middle = len(pixels) // 2
    assert (pixels[middle, middle] == 255).all()
    assert not pixels[0, 0].any()
