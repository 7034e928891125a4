"""Predict images of any size with a trained DeepLabV3.

python DeepLabV3/inference.py runs/deeplabv3/model_best.pth data/test/images predictions
python DeepLabV3/inference.py runs/deeplabv3/model_best.pth photo.jpg predictions --overlap 0.5
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import run as run_main
from common.distributed import pick_device
from common.predict.folder import inference_parser, predict_folder
from common.run import checkpoint
from DeepLabV3.model import NAME, from_checkpoint, probabilities


def main(argv: list[str] | None = None) -> None:
    args = inference_parser("Predict images of any size with a trained DeepLabV3.").parse(argv)
    device = pick_device(args.device)
    saved = checkpoint.load(args.model, NAME)
    model = checkpoint.rebuild(saved, from_checkpoint).to(device).eval()
    predict_folder(partial(probabilities, model), saved["classes"], args, device)


if __name__ == "__main__":
    run_main(main)
