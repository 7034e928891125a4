"""Detect and outline every aircraft in scenes of any size with a trained Mask R-CNN.

python mask/inference.py runs/mask/model_best.pth data/test/images predictions
python mask/inference.py runs/mask/model_best.pth scene.tif maps --score-threshold 0.7
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import fraction, positive
from common.cli import run as run_main
from common.predict.folder import inference_parser


def main(argv: list[str] | None = None) -> None:
    parser = inference_parser("Detect and outline every aircraft in scenes of any size.")
    add = parser.add_argument
    add("--score-threshold", type=fraction, default=0.5, help="drop lower scores")
    help = "of one window; default: 100, or the .onnx file's"
    add("--max-detections", type=positive, metavar="N", help=help)
    args = parser.parse(argv)
    from mask.scenes import predict_folder  # imports torch

    predict_folder(args)


if __name__ == "__main__":
    run_main(main)
