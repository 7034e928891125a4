"""Instances of scenes of any size: detected in overlapping windows, merged if a seam cut them.

A scene is read in strips, the rows under one row of windows: see `common.predict.windows`.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from common.cli import say
from common.io.pictures import save
from common.io.raster import Scene, no_valid_pixel
from common.predict.folder import predicted_scenes
from common.predict.maps import feature_file, wanted
from common.predict.network import load_network
from common.predict.pictures import Crops, Reduced, outline, with_legend
from common.predict.regions import Region
from common.predict.windows import Network, Strip, Tiling, predicted
from mask.model import NAME, from_checkpoint, from_outputs, predict
from mask.rcnn import MaskRCNN

MOST_PIXELS = (1 << 32) - 1  # COCO's run lengths are unsigned numbers of 32 bits

SAME = 0.5  # share of the smaller mask, in the area of both windows; above it, one aircraft
INSIDE = 0.8  # share of a mask that lies in another; from it on, a part of that aircraft

Box = tuple[int, int, int, int]  # x1, y1, x2, y2; the last two are exclusive


@dataclass(frozen=True, eq=False)
class Instance(Region):
    """One aircraft, and the window that it was detected in."""

    seen: Box


def predict_folder(args: argparse.Namespace) -> None:
    """Detect in every scene: overlays, GeoJSON, and one `predictions.json` in COCO's format.

    Args:
        args: From the parser of `mask/inference.py`.
    """
    network, classes = load_network(
        args,
        NAME,
        lambda content: from_checkpoint(content, args.max_detections),
        predict,
        from_outputs,
        max_detections=MaskRCNN.most_detections,
    )
    predict_one = partial(predict_scene, network=network, classes=classes, args=args)
    images: list[dict[str, Any]] = []
    total = 0
    with predicted_scenes(args, predict_one, read_results) as (file, results):
        categories = [{"id": i, "name": name} for i, name in enumerate(classes[1:], start=1)]
        file.write(f'{{"categories": {json.dumps(categories)}, "annotations": ['.encode())
        for entry, annotations in results:
            images.append(entry | {"id": len(images) + 1})
            for annotation in annotations:
                total += 1
                numbered = annotation | {"id": total, "image_id": len(images)}
                file.write(b",\n" * (total > 1) + json.dumps(numbered).encode())
        file.write(f'], "images": {json.dumps(images)}}}\n'.encode())
        print(
            f"{total} aircraft in {len(images)} images; overlays, maps and predictions.json in "
            f"{args.prediction_dir}"
        )


def read_results(content: dict[str, Any]) -> dict[str, tuple[dict[str, Any], list[dict]]]:
    """What `predict_scene` returned for each image of a `predictions.json`."""
    of_image: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    return {image["file_name"]: (image, of_image[image["id"]]) for image in content["images"]}


def predict_scene(
    scene: Scene, name: str, network: Network, classes: list[str], args: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Detect the aircraft of a scene, and write its overlay and its map.

    Returns:
        The scene's entry in `predictions.json`, and its annotations there, best first.
    """
    picture = Reduced(scene.width, scene.height, args.overlay_size)
    tiling = Tiling(args.window, args.overlap, args.batch_size)
    most = args.max_detections
    detected = detect(scene, network, tiling, args.score_threshold, most, picture)
    instances = wanted(detected, scene, args)
    entry = {
        "file_name": scene.path.name,
        "width": scene.width,
        "height": scene.height,
        "overlay": f"{name}_overlay.jpg",
    }
    crops = Crops(args.crops, lambda region: region.score)
    with feature_file(args.prediction_dir / f"{name}.geojson", scene, classes) as features:
        for instance in instances:
            features.add(instance)
            crops.add(instance)
        small = [reduced(instance, picture.factor) for instance in instances]
        overlay = with_legend(outline(picture.image(), small), classes)
        save(overlay, args.prediction_dir / entry["overlay"])
        crops.write(scene, args.prediction_dir / f"{name}_crops.jpg", classes)
    return entry, [annotate(instance, scene.height, scene.width) for instance in instances]


def reduced(region: Region, factor: int) -> Region:
    """The same on a picture that is `factor` times as small."""
    below, right = -region.box[3] % factor, -region.box[2] % factor
    mask = np.pad(region.mask, ((region.y % factor, below), (region.x % factor, right)))
    height, width = (side // factor for side in mask.shape)
    small = mask.reshape(height, factor, width, factor).any((1, 3))
    x, y = region.x // factor, region.y // factor
    return Region(region.label, region.score, x, y, np.asarray(small))


def annotate(region: Region, height: int, width: int) -> dict[str, Any]:
    """An instance as a COCO annotation, its mask as run lengths of the whole image."""
    x1, y1, x2, y2 = region.box
    annotation = {
        "category_id": region.label,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": region.area,
        "score": round(region.score, 5),
        "iscrowd": 0,
    }
    if height * width <= MOST_PIXELS:
        counts = {"size": [height, width], "counts": run_lengths(region, height, width)}
        runs = rle.frPyObjects(counts, height, width)
        annotation["segmentation"] = counts | {"counts": runs["counts"].decode()}
    return annotation


def run_lengths(region: Region, height: int, width: int) -> list[int]:
    """COCO's run lengths of a mask in an image, column by column, ground first.

    They are made from the cut mask alone, so their time does not depend on the image's size.
    """
    columns = np.pad(region.mask.T.astype(np.int8), ((0, 0), (1, 1)))
    steps = np.diff(columns, axis=1)
    starts, ends = (
        (column + region.x) * height + row + region.y
        for column, row in (np.nonzero(steps == step) for step in (1, -1))
    )
    # A run that reaches the image's bottom continues at the top of the next column.
    continued = np.flatnonzero(starts[1:] == ends[:-1])
    edges = np.stack([np.delete(starts, continued + 1), np.delete(ends, continued)], 1)
    counts = np.diff(edges.ravel(), prepend=0, append=height * width).tolist()
    return counts if counts[-1] else counts[:-1]


@torch.inference_mode()
def detect(
    scene: Scene, network: Network, tiling: Tiling, threshold: float, most: int, picture: Reduced
) -> list[Instance]:
    """All instances of a whole scene, best first.

    Args:
        network: Its results are dicts as `mask.model.predict` returns them.
        threshold: Detections that score less are left out.
        most: The number of detections that the network reports at most; a line says how many
            windows reached it.
        picture: Gets all rows of the scene.

    Raises:
        UserError: The scene has no valid pixel.
    """
    instances: list[Instance] = []
    computed = full = 0
    for strip, x, result in predicted(scene, network, tiling):
        if x == 0:
            picture.add(strip.pixels[-strip.new :])
        if result is not None:
            detections = list(_instances(result, strip, x, tiling.side, threshold))
            instances += detections
            computed += 1
            full += len(detections) >= most
    if not computed:
        raise no_valid_pixel(scene.path)
    if full:
        say(
            f"{scene.path.name!r}: {full} windows reached --max-detections {most}; with a higher "
            "one, or a smaller --window, there may be more"
        )
    return merge(instances)


def _instances(
    result: dict[str, Tensor], strip: Strip, x: int, side: int, threshold: float
) -> Iterator[Instance]:
    """The detections of the window at `x` as instances of the scene."""
    kept = result["scores"] >= threshold
    height, width = strip.pixels.shape[:2]
    masks = result["masks"][kept].cpu().numpy()[:, :height, : width - x]
    if strip.valid is not None:
        masks = masks & strip.valid[:, x : x + side]
    labels, scores = result["labels"][kept].tolist(), result["scores"][kept].tolist()
    for mask, label, score in zip(masks, labels, scores, strict=True):
        left, top, cut_width, cut_height = cv2.boundingRect(mask.view(np.uint8))
        if cut_width:
            cut = mask[top : top + cut_height, left : left + cut_width].copy()
            seen = (x, strip.y, x + side, strip.y + side)
            yield Instance(label, score, x + left, strip.y + top, cut, seen)


def merge(instances: list[Instance]) -> list[Instance]:
    """Merge the instances of one aircraft that several windows detected, best first.

    Boxes are not enough: the box of half an aircraft at a seam overlaps little with the box of the
    whole one. So two masks are compared in the area that both windows share, where both windows see
    the same half. Two instances of one window are never merged, because neighbours on a crowded
    apron would become one. If another window shows both as one instance, one of the windows is
    wrong: of each such pair the instance with the lower score is left out.
    """
    groups = [[i] for i in range(len(instances))]  # the members of one aircraft share a list
    pairs = (
        (_overlap(instances[i], instances[j]), i, j)
        for i, j in _overlapping([instance.box for instance in instances])
    )
    wrong: set[int] = set()
    for _, i, j in sorted((pair for pair in pairs if pair[0] > SAME), reverse=True):
        first, second = groups[i], groups[j]
        windows = {instances[k].seen for k in first}
        if windows.isdisjoint(instances[k].seen for k in second):
            first += second
            for k in second:
                groups[k] = first
        elif first is not second and instances[i].score != instances[j].score:
            wrong.add(min(i, j, key=lambda k: instances[k].score))
    merged: dict[int, Instance] = {}
    for i, instance in enumerate(instances):
        if i not in wrong:
            key = id(groups[i])
            merged[key] = _union(merged[key], instance) if key in merged else instance
    return distinct(sorted(merged.values(), key=lambda instance: -instance.score))


def distinct(instances: list[Instance]) -> list[Instance]:
    """The instances, best first, without those that show an aircraft again, or a part of it.

    The masks of two aircraft hardly overlap. So of two masks the one with the lower score is left
    out if `INSIDE` of the smaller one lies in the other; in two classes, `INSIDE` of the larger
    one, because a thing may lie on a thing of another class.
    """
    left_out: set[int] = set()
    for i, j in sorted(_overlapping([instance.box for instance in instances])):
        if not left_out & {i, j}:
            first, second = instances[i], instances[j]
            area = _common(first.box, second.box)
            shared = np.count_nonzero(_inside(first, area) & _inside(second, area))
            least = min if first.label == second.label else max
            if shared >= INSIDE * least(first.area, second.area):
                left_out.add(j)
    return [instance for i, instance in enumerate(instances) if i not in left_out]


def _overlapping(boxes: list[Box]) -> Iterator[tuple[int, int]]:
    """Each pair of boxes with common pixels, the lower index first."""
    corners = np.array(boxes).reshape(-1, 4)
    from_the_top = corners[:, 1].argsort(kind="stable")
    x1, y1, x2, y2 = corners[from_the_top].T
    # Only the boxes that begin above the lower end of a box can overlap it.
    ends = np.searchsorted(y1, y2).tolist()
    for n, end in enumerate(ends):
        below = slice(n + 1, end)
        beside = (x1[below] < x2[n]) & (x1[n] < x2[below])
        for j in from_the_top[below][beside].tolist():
            yield min(j, int(from_the_top[n])), max(j, int(from_the_top[n]))


def _overlap(a: Instance, b: Instance) -> float:
    """The shared part of the smaller of two masks in the area of both windows; 0 for two classes.

    An IoU would leave duplicates: two masks of a few pixels at a window's border often share less
    than half of their union.
    """
    if a.label != b.label or a.seen == b.seen:
        return 0.0
    area = _common(_common(a.seen, b.seen), _around(a, b))
    first, second = _inside(a, area), _inside(b, area)
    smaller = min(np.count_nonzero(first), np.count_nonzero(second))
    return float(np.count_nonzero(first & second) / smaller) if smaller else 0.0


def _around(a: Instance, b: Instance) -> Box:
    return min(a.x, b.x), min(a.y, b.y), max(a.box[2], b.box[2]), max(a.box[3], b.box[3])


def _common(a: Box, b: Box) -> Box:
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def _inside(instance: Instance, area: Box) -> np.ndarray:
    """The part of an instance's mask that lies in `area`, on a canvas of the area's size."""
    x1, y1, x2, y2 = area
    canvas = np.zeros((max(0, y2 - y1), max(0, x2 - x1)), bool)
    left, top, right, bottom = _common(instance.box, area)
    if right > left and bottom > top:
        canvas[top - y1 : bottom - y1, left - x1 : right - x1] = instance.mask[
            top - instance.y : bottom - instance.y, left - instance.x : right - instance.x
        ]
    return canvas


def _union(a: Instance, b: Instance) -> Instance:
    """Both masks as one, with the higher score."""
    area = _around(a, b)
    best = a if a.score >= b.score else b
    return replace(best, x=area[0], y=area[1], mask=_inside(a, area) | _inside(b, area))
