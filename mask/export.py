"""Write a trained Mask R-CNN as an ONNX file, which inference.py and onnxruntime read.

python mask/export.py runs/mask/model_best.pth mask.onnx
python mask/inference.py mask.onnx scene.tif maps
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import positive
from common.cli import run as run_main
from common.predict.onnx_file import export, export_parser
from mask.model import NAME, OUTPUTS, from_checkpoint, outputs
from mask.rcnn import MaskRCNN


def main(argv: list[str] | None = None) -> None:
    parser = export_parser("Write a trained Mask R-CNN as an ONNX file.")
    parser.add_argument(
        "--max-detections",
        type=positive,
        default=MaskRCNN.most_detections,
        metavar="N",
        help="of one window; as many masks are always computed",
    )
    args = parser.parse(argv)
    build = partial(from_checkpoint, most_detections=args.max_detections)
    export(args, NAME, build, outputs, OUTPUTS, max_detections=args.max_detections)


if __name__ == "__main__":
    run_main(main)
