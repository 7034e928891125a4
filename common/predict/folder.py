"""What every inference.py shares: its options, the loop over a folder, the names of outputs.

No torch, which takes seconds to import: so `--help` and a wrong path are answered at once.
"""

import argparse
import hashlib
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import clear_frames
from typing import Any, BinaryIO, TypeVar

from common import cli
from common.cli import OF_THE_DISK, Parser, UserError, number, positive, say, whole
from common.io.files import read_file, read_json, sweep, whole_file
from common.io.folders import rasters_in
from common.io.look import add_look_options, look_from
from common.io.raster import Scene, open_scene

T = TypeVar("T")
STRIDE = 32  # a multiple of the stride of every network
WINDOW = 512  # pixels
LONGEST_NAME = 180  # bytes; a file system takes 255, with our endings and a temporary file's


def inference_parser(description: str) -> Parser:
    """The options that every inference.py has; the network itself comes from the checkpoint.

    An option that an ONNX file decides is None by default; `load_network` sets it.
    """
    parser = Parser(description=description)
    add = parser.add_argument
    add("model", type=there, help="model_best.pth of a training run, or what export.py made of it")
    add("image_dir", type=there, help="a folder of rasters of any size, or one of them")
    add("prediction_dir", type=Path, help="where overlays, masks, maps and predictions.json go")
    add("-i", "--index", type=whole, help="only this image of the sorted folder, from 0")
    add("--skip-existing", action="store_true", help="leave out scenes whose .geojson is there")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("-b", "--batch-size", type=positive, default=4, help="windows per forward pass")
    add(
        "--window",
        type=window,
        help=f"side in pixels, a multiple of {STRIDE}; default: {WINDOW}, or the .onnx file's",
    )
    add(
        "--overlap",
        type=number(float, 0, 0.9),
        default=0.25,
        help="share of a window that its neighbour also covers",
    )
    unit = "m², or pixels where a scene is not georeferenced"
    for flag, what in (("--min-area", "less; default: 16 pixels"), ("--max-area", "more")):
        add(flag, type=number(float, 0), help=f"{unit}: JSON and map leave out what has {what}")
    add(
        "--overlay-size",
        type=number(int, 16, 65_500),
        default=4096,
        metavar="PIXELS",
        help="longest side of the overlay",
    )
    add(
        "--crops",
        type=number(int, 0, 1000),
        default=0,
        metavar="N",
        help="also draw a sheet of the N largest regions or surest aircraft",
    )
    add_look_options(parser)
    cli.add_precision(parser.add_argument_group("speed-ups"))
    # What else `common.args.resolve_speedups` reads is for training only.
    parser.set_defaults(channels_last=None, cuda_graphs=False, grad_accum=1)
    parser.set_defaults(look_of_training=None)  # the file of the model may have it
    return parser


def semantic_parser(description: str) -> Parser:
    """The options that the inference.py of every semantic model has."""
    parser = inference_parser(description)
    add = parser.add_argument
    add("--score-threshold", type=cli.fraction, default=0.0, help="drop regions of lower scores")
    add("--confidence", action="store_true", help="also write the probability of the class shown")
    join = "m or pixels, as --min-area: parts of a class with a gap of less are one region"
    add("--join", type=number(float, 0, 1000), default=0.0, metavar="LENGTH", help=join)
    add("--tta", action="store_true", help="mean over eight symmetries; takes 8 times as long")
    return parser


def export_parser(description: str) -> Parser:
    """The options that every export.py has."""
    parser = Parser(description=description)
    add = parser.add_argument
    add("model", type=there, help="model_best.pth or checkpoint.pth of a training run")
    add("output", type=Path, help="the file to write: .onnx, or .pth for the weights alone")
    add("--window", type=window, default=WINDOW, help="side of an input, pixels; multiple of 32")
    return parser


def there(text: str) -> Path:
    """An argument type: the path of something that exists; told before the import of torch."""
    if not Path(text).exists():
        raise UserError(f"there is no file or folder {text!r}; check the path.")
    return Path(text)


def window(text: str) -> int:
    """An argument type: the side of a window that every network here accepts."""
    side = int(number(int, STRIDE, 8192)(text))
    if side % STRIDE:
        raise argparse.ArgumentTypeError(
            f"{text} is not a multiple of {STRIDE}, the networks' stride; "
            f"use {side // STRIDE * STRIDE}"
        )
    return side


def list_images(path: Path, index: int | None) -> list[tuple[Path, str]]:
    """The rasters of a folder sorted by name, or `path` itself, with the names of their outputs.

    Raises:
        UserError: Nothing is there, or `index` is beyond the last one.
    """
    images = output_names(rasters_in(path, say))
    if index is None or path.is_file():
        return images
    if index >= len(images):
        raise UserError(f"--index {index}: {str(path)!r} holds images 0 to {len(images) - 1}.")
    return [images[index]]


def make_output_folder(args: argparse.Namespace) -> None:
    """Make `prediction_dir`, which must not be where the images are.

    Raises:
        UserError: It is there; a mask or an overlay could overwrite an image.
    """
    source = args.image_dir if args.image_dir.is_dir() else args.image_dir.parent
    if args.prediction_dir.resolve() == source.resolve():
        raise UserError(
            f"{str(args.prediction_dir)!r} holds the images, and predictions could overwrite them; "
            "name another folder for the predictions."
        )
    try:
        str(args.prediction_dir.resolve()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"the name {str(args.prediction_dir)!r} is not UTF-8, which GDAL needs; choose another."
        ) from None
    args.prediction_dir.mkdir(parents=True, exist_ok=True)
    sweep(args.prediction_dir)


@contextmanager
def predicted_scenes(
    args: argparse.Namespace,
    predict: Callable[[Scene, str], T],
    read: Callable[[Any], dict[str, T]],
) -> Iterator[tuple[BinaryIO, Iterator[T]]]:
    """Predict each scene of `args.image_dir`; the error of one does not stop the others.

    SIGTERM and Ctrl-C end the results after those that are complete.

    Args:
        args: From `inference_parser`.
        predict: (scene, name of its outputs) → its result.
        read: The content of an earlier `predictions.json` → its results, by the file's name.

    Yields:
        `predictions.json`, to be written, and the results.

    Raises:
        UserError: There is no scene; or some could not be read, when the block has ended.
        KeyboardInterrupt: It was stopped, when the block has ended.
    """
    images = list_images(args.image_dir, args.index)
    look = look_from(args, args.look_of_training)
    make_output_folder(args)
    report = args.prediction_dir / "predictions.json"
    earlier: dict[str, T] = {}
    if args.skip_existing and report.exists():
        try:
            earlier = read(read_json(report))
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"{str(report)!r} was not written by this command ({error!r:.80}); leave out "
                "--skip-existing."
            ) from None
    errors: list[UserError | KeyboardInterrupt] = []

    def each_scene() -> Iterator[T]:
        """Yield the result of each scene; append to `errors` what went wrong."""
        for done, (path, name) in enumerate(images):
            if args.skip_existing and (args.prediction_dir / f"{name}.geojson").exists():
                if path.name in earlier:
                    yield earlier[path.name]
                else:
                    say(
                        f"{path.name!r} has a map and is skipped; predictions.json does not list it"
                    )
                continue
            if errors and isinstance(errors[-1], KeyboardInterrupt):
                continue
            try:
                with open_scene(path, look) as scene:
                    say(f"{done + 1} of {len(images)}, {decided(scene, look.trained_gsd)}")
                    try:
                        result = predict(scene, name)
                    except BaseException as error:
                        clear_frames(error.__traceback__)  # ends the thread that reads the scene
                        raise
            except UserError as error:
                errors.append(error)
            except OSError as error:
                if error.errno not in OF_THE_DISK:
                    raise
                what = error.filename or "while writing"
                errors.append(UserError(f"{str(path)!r}: {error.strerror}: {str(what)!r}."))
            except KeyboardInterrupt:
                stopped = (
                    f"stopped after {done} of {len(images)} scenes; go on with --skip-existing"
                )
                errors.append(KeyboardInterrupt(stopped))
            else:
                yield result

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with whole_file(report) as file:
            yield file, each_scene()
    finally:
        signal.signal(signal.SIGTERM, before)
    if errors and (len(images) == 1 or isinstance(errors[-1], KeyboardInterrupt)):
        raise errors[-1]
    if errors:
        raise UserError(
            f"{len(errors)} of {len(images)} images could not be read and are not among the "
            f"predictions: {' '.join(map(str, errors[:3]))}{' …' if len(errors) > 3 else ''}"
        )


def decided(scene: Scene, trained_gsd: float | None) -> str:
    """How a scene is read, and its ground resolution beside that of the training tiles."""
    values = "values as they are"
    if scene.limits is not None:
        pairs = ", ".join(f"{low:g} to {high:g}" for low, high in scene.limits.T)
        values = f"{pairs} become black to white"
    place = "not georeferenced, so map and areas are in pixels"
    if not scene.gsd and (beside := _unread_place(scene.path)):
        place += (
            f"; {beside.name!r} is not read: `gdal_translate -a_srs EPSG:CODE {scene.path.name} "
            "placed.tif` puts it into the file"
        )
    if scene.gsd:
        place = f"{scene.gsd:.3g} m a pixel"
        if trained_gsd and not 0.9 < scene.gsd / trained_gsd < 1.1:
            place += f", the training tiles {trained_gsd:.3g} m: see --gsd {trained_gsd:.3g}"
    size = f"{scene.width}x{scene.height} pixels"
    return f"{scene.path.name!r}: {size}, bands {scene.chosen}, {values}; {place}"


def _unread_place(path: Path) -> Path | None:
    """The file beside a raster that says where it lies, if there is one."""
    world = path.suffix[:2] + path.suffix[-1] + "w"  # .tif → .tfw
    beside = path.with_name(f"{path.name}.aux.xml")
    if beside.is_file() and b"<GeoTransform" in read_file(beside, limit=1 << 30):
        return beside
    sides = (path.with_suffix(suffix) for suffix in (world, ".prj"))
    return next((side for side in sides if side.is_file()), None)


def output_names(images: list[Path]) -> list[tuple[Path, str]]:
    """Each image with the name of its outputs.

    `a.png` and `a.jpg` in one folder must not overwrite each other's prediction: images that share
    a name get the whole file name, which is unique. A name that would become too long for the file
    system ends in a hash instead.
    """
    names = {path: path.stem for path in images}
    while shared := [n for n, count in Counter(names.values()).items() if count > 1]:
        names |= {path: path.name for path in images if names[path] in shared}
    return [(path, _short(name)) for path, name in names.items()]


def _short(name: str) -> str:
    encoded = os.fsencode(name)
    if len(encoded) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return f"{encoded[: LONGEST_NAME - 13].decode(errors='ignore')}-{digest}"
