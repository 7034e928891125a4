"""Pictures are read as every viewer shows them, whatever else their files hold."""

import io
import json
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from common.cli import UserError
from common.io.images import image_size, read_image, read_rgb, turned
from preprocessing.coco import main


def pixels(width=37, height=23, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def exif(orientation, order="<", kind=3, before=2):
    """An EXIF block with some other tags before and after the orientation."""
    value = {3: "HH", 4: "I"}[kind]
    tags = [
        (0x0100 + n, struct.pack(order + "HHIHH", 0x0100 + n, 3, 1, 7, 0)) for n in range(before)
    ]
    own = (orientation, 0) if kind == 3 else (orientation,)
    tags.append((0, struct.pack(order + "HHI" + value, 0x0112, kind, 1, *own)))
    body = b"".join(entry for _, entry in tags)
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    return b"Exif\0\0" + start + struct.pack(order + "H", len(tags)) + body + bytes(4)


def encoded(image, suffix, block=b""):
    data = io.BytesIO()
    kind = {".jpg": "JPEG", ".png": "PNG"}[suffix]
    Image.fromarray(image).save(data, kind, exif=block, quality=95)
    return data.getvalue()


def shown(data):
    """What Pillow makes of a file as a viewer would."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@given(
    st.integers(0, 9), st.sampled_from("<>"), st.integers(0, 30), st.sampled_from([".jpg", ".png"])
)
def test_a_picture_is_turned_as_viewers_turn_it(
    tmp_path_factory, orientation, order, before, suffix
):
    data = encoded(pixels(), suffix, exif(orientation, order, before=before))
    path = tmp_path_factory.getbasetemp() / f"turned{suffix}"
    path.write_bytes(data)
    wanted = shown(data)
    assert image_size(path) == wanted.shape[1::-1]
    assert np.abs(read_rgb(path).astype(int) - wanted).max() <= 3 * (suffix == ".jpg")
    other = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(read_image(path, cv2.IMREAD_COLOR), other)
    stored = cv2.imdecode(
        np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    )
    assert image_size(path, as_stored=True) == (37, 23)
    assert np.array_equal(read_image(path, cv2.IMREAD_COLOR, as_stored=True), stored)


@given(st.binary(max_size=80), st.booleans())
def test_any_exif_block_leaves_the_picture_readable(tmp_path_factory, block, with_start):
    path = tmp_path_factory.getbasetemp() / "block.jpg"
    data = encoded(pixels(), ".jpg")
    body = b"Exif\0\0" + (b"II*\0" if with_start else b"") + block
    path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:])
    assert sorted(image_size(path)) == [23, 37]
    assert sorted(read_rgb(path).shape[:2]) == [23, 37]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_twice_by_opposites_is_nothing(orientation):
    opposite = {6: 8, 8: 6}.get(orientation, orientation)
    image = pixels()
    assert np.array_equal(turned(turned(image, orientation), opposite), image)


def jpeg_of(parts):
    """A JPEG with some bytes before its segments."""
    data = encoded(pixels(), ".jpg")
    at = data.index(b"\xff\xdb")
    return data[:at] + parts + data[at:]


@pytest.mark.parametrize(
    "parts",
    [
        b"\0", b"stray", b"\xff" * 9, b"\xff\0", b"\xff\xd0",
        b"\xff\xe2" + struct.pack(">H", 60_000) + bytes(59_998),
        (b"\xff\xe2" + struct.pack(">H", 60_000) + b"\xff\xd9" * 29_999) * 5,
    ],
    ids=["zero", "text", "fill bytes", "stuffed byte", "bare marker", "long", "profile"],
)  # fmt: skip
def test_jpegs_that_other_readers_read(tmp_path, parts):
    path = tmp_path / "a.jpg"
    data = jpeg_of(parts)
    path.write_bytes(data)
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    assert image_size(path) == (37, 23)
    assert np.array_equal(read_image(path, cv2.IMREAD_COLOR), decoded)


@given(st.lists(st.sampled_from([b"\0", b"a", b"\xff", b"\xff\0"]), max_size=6))
def test_stray_bytes_between_segments_are_skipped_as_opencv_skips_them(tmp_path_factory, parts):
    path = tmp_path_factory.getbasetemp() / "stray.jpg"
    data = jpeg_of(b"".join(parts))
    path.write_bytes(data)
    if cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is not None:
        assert read_rgb(path).shape == (23, 37, 3)


def segments(count, body):
    return (b"\xff\xe5" + struct.pack(">H", len(body) + 2) + body) * count


def with_scans(count):
    """A progressive JPEG whose last scan is repeated."""
    buffer = io.BytesIO()
    Image.fromarray(pixels()).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


@pytest.mark.parametrize(
    "data",
    [
        with_scans(1_000),
        encoded(pixels(), ".jpg", exif(6)) + b"\xff\xda\0\x0c" * 1_000 + pixels(999, 999).tobytes(),
        jpeg_of(segments(30_000, b"x" * 20)),
        jpeg_of(segments(200, b"\xff\xda" * 30_000)),
    ],
    ids=["scans", "motion photo", "small segments", "large segments"],
)
def test_a_jpeg_may_have_many_scans_many_segments_and_a_film_behind_it(tmp_path, data):
    (tmp_path / "a.jpg").write_bytes(data)
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    assert np.array_equal(read_image(tmp_path / "a.jpg", cv2.IMREAD_COLOR), decoded)
    assert image_size(tmp_path / "a.jpg") == decoded.shape[1::-1]


def test_a_png_may_hold_a_long_text(tmp_path):
    """Programs write XMP there. Pillow's own limit is 1 MB, unpacked."""
    info = PngImagePlugin.PngInfo()
    info.add_text("XML:com.adobe.xmp", "x" * 2_000_000, zip=True)
    Image.fromarray(np.full((4, 6, 3), 7, np.uint8)).save(tmp_path / "a.png", pnginfo=info)
    assert image_size(tmp_path / "a.png") == (6, 4)
    assert (read_rgb(tmp_path / "a.png") == 7).all()


@pytest.mark.parametrize(("width", "height"), [(9_700, 9_900), (20_000, 20_000)])
def test_the_limit_of_pixels_is_ours_and_not_pillows(tmp_path, recwarn, width, height):
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = b"IDAT" + bytes(10)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
            for c in (ihdr, idat)
        )
    )
    if width * height <= 100_000_000:
        assert image_size(tmp_path / "a.png") == (width, height)
    else:
        with pytest.raises(UserError, match="states 20000x20000 pixels; up to 100,000,000"):
            image_size(tmp_path / "a.png")
    assert not recwarn.list


def test_a_jpeg_without_a_frame_is_called_damaged(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(pixels(), ".jpg")[:100])
    with pytest.raises(UserError, match="damaged or truncated"):
        image_size(path)


def coco_of(tmp_path, name, size, **more):
    """A set of one picture with a bright square at 20…60."""
    square = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 1600}
    square |= {"bbox": [20, 20, 40, 40], "segmentation": [[20, 20, 60, 20, 60, 60, 20, 60]]} | more
    image = {"id": 1, "file_name": name, "width": size[0], "height": size[1]}
    categories = [{"id": 1, "name": "aircraft"}]
    content = {"images": [image], "annotations": [square], "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(content))
    words = [tmp_path / "images", tmp_path / "a.json", "-o", tmp_path / "out", "-n", 1, "-s", 128]
    return list(map(str, words))


def photograph(tmp_path, orientation, width, height, as_drawn):
    """A stored picture whose square is at 20…60 as it is shown, or as it is stored."""
    drawn = np.full((height, width, 3), 40, np.uint8)
    drawn[20:60, 20:60] = 230
    back = {6: 8, 8: 6}.get(orientation, orientation)
    (tmp_path / "images").mkdir()
    path = tmp_path / "images/a.jpg"
    stored = drawn if as_drawn else turned(drawn, back)
    path.write_bytes(encoded(stored, ".jpg", exif(orientation)))


def grey_under_label(tmp_path):
    image = np.asarray(Image.open(tmp_path / "out/train/images_tiled/a_tile_0.png").convert("L"))
    mask = np.asarray(Image.open(tmp_path / "out/train/masks_tiled/a_tile_0_mask.png"))
    return image[mask == 1].mean()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_outlines_drawn_on_what_a_viewer_shows_are_learnt_there(tmp_path, orientation):
    photograph(tmp_path, orientation, 128, 100, as_drawn=False)
    assert main(coco_of(tmp_path, "a.jpg", (128, 100))) == 0
    assert grey_under_label(tmp_path) == pytest.approx(230, abs=3)


@pytest.mark.parametrize("orientation", [3, 6])
def test_outlines_drawn_on_the_stored_pixels_need_an_option(tmp_path, capsys, orientation):
    photograph(tmp_path, orientation, 128, 100, as_drawn=True)
    words = coco_of(tmp_path, "a.jpg", (128, 100))
    if orientation == 6:  # the sides show it
        with pytest.raises(UserError, match="none of the 1 scenes"):
            main(words)
        assert "shown as 100x128" in (said := capsys.readouterr().err)
        assert "--ignore-exif" in said
    assert main([*words, "--ignore-exif"]) == 0
    assert grey_under_label(tmp_path) == pytest.approx(230, abs=3)


def test_the_option_is_named_where_it_is_wrong(tmp_path, capsys):
    photograph(tmp_path, 6, 128, 100, as_drawn=False)
    with pytest.raises(UserError, match="none of the 1 scenes"):
        main([*coco_of(tmp_path, "a.jpg", (128, 100)), "--ignore-exif"])
    assert "leave out --ignore-exif" in capsys.readouterr().err


def test_a_picture_without_a_tag_keeps_its_pixels(tmp_path):
    (tmp_path / "images").mkdir()
    image = pixels(128, 100)
    (tmp_path / "images/a.png").write_bytes(encoded(image, ".png"))
    assert main(coco_of(tmp_path, "a.png", (128, 100))) == 0
    tile = np.asarray(Image.open(tmp_path / "out/train/images_tiled/a_tile_0.png"))
    assert np.array_equal(tile[:100], image)
