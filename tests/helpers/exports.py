"""The same picture and outline as the exporters of annotation tools write them."""

import json

import cv2
import numpy as np

SIDE, X, Y, WIDTH, HEIGHT = 128, 20, 30, 40, 24
AREA = WIDTH * HEIGHT
BOX = [X, Y, WIDTH, HEIGHT]
POLYGON = [X, Y, X + WIDTH, Y, X + WIDTH, Y + HEIGHT, X, Y + HEIGHT]
COUNTS = [SIDE * X + Y, *[HEIGHT, SIDE - HEIGHT] * (WIDTH - 1), HEIGHT]
COUNTS.append(SIDE * SIDE - sum(COUNTS))
RUNS = {"size": [SIDE, SIDE], "counts": COUNTS}


def picture(path, ground=40, aircraft=230):
    """A bright aircraft on dark ground, where all outlines of this module are."""
    pixels = np.full((SIDE, SIDE, 3), ground, np.uint8)
    pixels[Y : Y + HEIGHT, X : X + WIDTH] = aircraft
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())
    return path


def annotation(number=1, image=1, category=1, **more):
    one = {"id": number, "image_id": image, "category_id": category, "iscrowd": 0, "area": AREA}
    return one | {"bbox": BOX, "segmentation": [POLYGON]} | more


def image(number=1, name="a.png", **more):
    return {"id": number, "file_name": name, "width": SIDE, "height": SIDE} | more


def write(path, images, annotations, categories=({"id": 1, "name": "aircraft"},), **more):
    content = {"images": images, "annotations": annotations, "categories": list(categories)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | more))
    return path


# Each returns what a user types: the folder of the images and the file.


def cvat(root):
    """Polygon tool."""
    picture(root / "images/default/a.png")
    entry = image(license=0, flickr_url="", coco_url="", date_captured=0)
    one = annotation(area=float(AREA), attributes={"occluded": False, "rotation": 0.0})
    categories = [{"id": 1, "name": "aircraft", "supercategory": ""}]
    file = root / "annotations/instances_default.json"
    return [root / "images/default", write(file, [entry], [one], categories, licenses=[])]


def cvat_brush(root):
    """Brush and AI tools: run lengths that claim to be a crowd."""
    picture(root / "images/default/a.png")
    one = annotation(segmentation=RUNS, iscrowd=1, attributes={"occluded": False})
    file = root / "annotations/instances_default.json"
    return [root / "images/default", write(file, [image()], [one]), "--no-crowds"]


def label_studio(root, name="images/6b3f1c2e-a.png"):
    """`result.json` beside `images/`, whose name is part of the file names; ids begin at 0."""
    picture(root / "images/6b3f1c2e-a.png")
    one = annotation(0, 0, 0, ignore=0)
    file = write(root / "result.json", [image(0, name)], [one], [{"id": 0, "name": "aircraft"}])
    return [root / "images", file]


def label_studio_on_windows(root):
    return label_studio(root, "images\\6b3f1c2e-a.png")


def labelme(root):
    """The script of its examples: the background is a category."""
    picture(root / "JPEGImages/a.jpg")
    entry = image(0, "JPEGImages/a.jpg", license=0, url=None, date_captured=None)
    one = annotation(0, 0, 1, area=float(AREA), bbox=list(map(float, BOX)))
    names = ("_background_", "aircraft")
    categories = [{"supercategory": None, "id": n, "name": name} for n, name in enumerate(names)]
    file = write(root / "annotations.json", [entry], [one], categories, type="instances")
    return [root / "JPEGImages", file]


def roboflow(root, split="train", grounds=40, number=0):
    """The file lies among the images; the first category is a heading with the project's name."""
    name = f"a_png.rf.{number:032x}.jpg"
    picture(root / split / name, grounds)
    categories = [
        {"id": 0, "name": "aircraft-k3vd", "supercategory": "none"},
        {"id": 1, "name": "aircraft", "supercategory": "aircraft-k3vd"},
    ]
    entry = image(0, name, license=1, date_captured="2026-11-25T00:00:00+00:00")
    file = root / split / "_annotations.coco.json"
    return [root / split, write(file, [entry], [annotation(0, 0, 1)], categories, licenses=[])]


def via(root):
    """One flat polygon, the image's id as a text, no size of pictures that were not opened."""
    picture(root / "images/a.png")
    entry = image(0, width=0, height=0, license=0, flickr_url="a.png", date_captured="")
    one = annotation(0, "0", 1, segmentation=POLYGON)
    return [root / "images", write(root / "via.json", [entry], [one])]


def fiftyone(root, absolute=False):
    """`data/` and `labels.json`; labels of several tools have no iscrowd."""
    path = picture(root / "data/a.png")
    entry = image(name=str(path.resolve()) if absolute else "a.png", license=None, coco_url=None)
    one = annotation(1, 1, 0)
    del one["iscrowd"]
    categories = [{"id": 0, "name": "aircraft", "supercategory": None}]
    return [root / "data", write(root / "labels.json", [entry], [one], categories)]


def fiftyone_with_absolute_paths(root):
    return fiftyone(root, absolute=True)


EXPORTERS = (
    cvat,
    cvat_brush,
    label_studio,
    label_studio_on_windows,
    labelme,
    roboflow,
    via,
    fiftyone,
    fiftyone_with_absolute_paths,
)
