"""Ways to find instances in a scene by windows: ours, and those of sahi and supervision."""

import importlib.util
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.lib.mosaic import forget_peak, peak_memory
from benchmarks.lib.truth import Ids, Oracle, count_errors
from common.cli import keep_freed_memory, progress
from common.predict.windows import Tiling
from mask.scenes import detect

Way = Callable[[Ids, Oracle], list[Any]]


@dataclass(frozen=True)
class Found:
    """An aircraft: its mask in a scene, its top left pixel at (x, y)."""

    x: int
    y: int
    mask: np.ndarray  # bool [h,w]


def ways(tiling: Tiling) -> dict[str, Way]:
    """What is installed, by name and version."""
    found: dict[str, Way] = {
        "ours": lambda scene, oracle: detect(scene, oracle, tiling, 0.0).instances
    }
    if importlib.util.find_spec("sahi"):
        import sahi

        found[f"sahi {sahi.__version__} (GREEDYNMM, IOS 0.5)"] = _sahi(tiling)
    if importlib.util.find_spec("supervision"):
        import supervision

        found[f"supervision {supervision.__version__} (NMM, IOS 0.5)"] = _supervision(tiling)
    return found


def measure(
    name: str, tiling: Tiling, scenes: list[Ids], errors: float
) -> tuple[Counter[str], float, float]:
    """Aircraft found and missed; CPU seconds and peak MB, without the detector's seconds."""
    keep_freed_memory()
    way = ways(tiling)[name]
    window = Ids(scenes[0].ids[: tiling.side, : tiling.side])
    way(window, Oracle(window, 0, 0.0))  # imports
    total: Counter[str] = Counter()
    seconds = 0.0
    before = forget_peak()
    for seed, scene in enumerate(progress(scenes, desc=name)):
        oracle, since = Oracle(scene, seed, errors), time.process_time()
        found = way(scene, oracle)
        seconds += time.process_time() - since - oracle.seconds
        total.update(count_errors(scene, found))
    return total, seconds, peak_memory() - before


def _sahi(tiling: Tiling) -> Way:
    from sahi.models.base import DetectionModel
    from sahi.predict import get_sliced_prediction
    from sahi.prediction import ObjectPrediction
    from sahi.utils.cv import get_coco_segmentation_from_bool_mask

    class Detector(DetectionModel):
        def load_model(self) -> None:
            pass

        def perform_inference(self, image: np.ndarray) -> None:
            self._original_predictions = self.oracle.find(image[..., 0])

        def _create_object_prediction_list_from_original_predictions(
            self, shift_amount_list: Any = ((0, 0),), full_shape_list: Any = None
        ) -> None:
            shift, full = shift_amount_list, full_shape_list
            shift = shift[0] if isinstance(shift[0], list | tuple) else shift
            full = full[0] if full and isinstance(full[0], list | tuple) else full
            result = self._original_predictions
            pieces = []
            for mask, score in zip(result["masks"].numpy(), result["scores"].tolist(), strict=True):
                outline = get_coco_segmentation_from_bool_mask(mask)
                if outline:
                    pieces.append(
                        ObjectPrediction(
                            segmentation=outline, category_id=0, category_name="aircraft",
                            shift_amount=list(shift), full_shape=list(full), score=score,
                        )
                    )  # fmt: skip
            self._object_prediction_list_per_image = [pieces]

    model = Detector(confidence_threshold=0.0, device="cpu", category_mapping={"0": "aircraft"})

    def way(scene: Ids, oracle: Oracle) -> list[Any]:
        model.oracle = oracle
        result = get_sliced_prediction(
            scene.picture(), model, tiling.side, tiling.side, tiling.overlap, tiling.overlap,
            perform_standard_pred=False, verbose=0, force_postprocess_type=True,
        )  # fmt: skip
        return [_cut(one.mask.bool_mask) for one in result.object_prediction_list if one.mask]

    return way


def _supervision(tiling: Tiling) -> Way:
    import supervision as sv

    def way(scene: Ids, oracle: Oracle) -> list[Any]:
        def callback(image: np.ndarray) -> Any:
            result = oracle.find(image[..., 0])
            masks = result["masks"].numpy()
            if not len(masks):
                return sv.Detections.empty()
            return sv.Detections(
                xyxy=sv.mask_to_xyxy(masks),
                mask=masks,
                confidence=result["scores"].numpy(),
                class_id=np.zeros(len(masks), int),
            )

        overlap = round(tiling.side * tiling.overlap)
        slicer = sv.InferenceSlicer(
            callback, tiling.side, overlap, "non_max_merge", 0.5, "IOS", compact_masks=True
        )
        found = slicer(scene.picture())
        return [_cut(np.asarray(mask)) for mask in (found.mask if len(found) else [])]

    return way


def _cut(mask: np.ndarray) -> Found:
    """A mask of the whole scene, cut to its box."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return Found(0, 0, np.zeros((0, 0), bool))
    top, left = int(rows[0]), int(columns[0])
    return Found(left, top, mask[top : rows[-1] + 1, left : columns[-1] + 1])
