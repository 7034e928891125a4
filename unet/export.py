"""Write a trained UNet as an ONNX file, which inference.py and onnxruntime read.

python unet/export.py runs/unet/model_best.pth unet.onnx
python unet/inference.py unet.onnx scene.tif maps
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import run as run_main
from common.predict.folder import export_parser


def main(argv: list[str] | None = None) -> None:
    args = export_parser("Write a trained UNet as an ONNX file.").parse(argv)
    from common.predict.onnx_file import export  # imports torch
    from unet.model import NAME, from_checkpoint, probabilities

    export(args, NAME, from_checkpoint, probabilities, ("probabilities",))


if __name__ == "__main__":
    run_main(main)
