"""Write a trained Mask R-CNN as an ONNX file, which inference.py and onnxruntime read.

python mask/export.py runs/mask/model_best.pth mask.onnx
python mask/inference.py mask.onnx scene.tif maps
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import positive
from common.cli import run as run_main
from common.predict.folder import export_parser


def suppress_in_onnx(boxes: Any, exists: Any, threshold: float) -> Any:
    """`mask.boxes.suppress` by ONNX's NonMaxSuppression, for the exporter."""
    import onnxscript

    op: Any = onnxscript.opset18
    count = op.Squeeze(op.Shape(exists, start=1, end=2))
    falling = op.CastLike(op.Range(count, 0, -1), boxes)
    scores = op.Unsqueeze(op.Where(exists, falling, 0.0), [1])
    chosen = op.NonMaxSuppression(boxes, scores, count, threshold, 0.0)  # [K,3]: image, class, box
    places = op.Gather(chosen, [0, 2], axis=1)
    none = op.Xor(exists, exists)
    return op.ScatterND(none, places, op.GatherND(exists, places))


def main(argv: list[str] | None = None) -> None:
    parser = export_parser("Write a trained Mask R-CNN as an ONNX file.")
    help = "of one window; as many masks are always computed"
    parser.add_argument("--max-detections", type=positive, default=100, metavar="N", help=help)
    args = parser.parse(argv)
    import torch

    from common.predict.onnx_file import export
    from mask.model import NAME, OUTPUTS, from_checkpoint, outputs

    translations = {torch.ops.mask.suppress.default: suppress_in_onnx}
    build = partial(from_checkpoint, most_detections=args.max_detections)
    most = args.max_detections
    export(args, NAME, build, outputs, OUTPUTS, translations, max_detections=most)


if __name__ == "__main__":
    run_main(main)
