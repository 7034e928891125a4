"""Predict scenes of any size with a trained UNet.

python unet/inference.py runs/unet/model_best.pth data/test/images predictions
python unet/inference.py runs/unet/model_best.pth scene.tif maps --amp
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import run as run_main
from common.predict.folder import semantic_parser


def main(argv: list[str] | None = None) -> None:
    args = semantic_parser("Predict scenes of any size with a trained UNet.").parse(argv)
    from common.predict.semantic import predict_folder  # imports torch
    from unet.model import NAME, from_checkpoint, probabilities

    predict_folder(args, NAME, from_checkpoint, probabilities)


if __name__ == "__main__":
    run_main(main)
