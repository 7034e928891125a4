"""Write a trained FCN as an ONNX file, which inference.py and onnxruntime read.

python fcn/export.py runs/fcn/model_best.pth fcn.onnx
python fcn/inference.py fcn.onnx scene.tif maps
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import run as run_main
from common.predict.folder import export_parser


def main(argv: list[str] | None = None) -> None:
    args = export_parser("Write a trained FCN as an ONNX file.").parse(argv)
    from common.predict.onnx_file import export  # imports torch
    from fcn.model import NAME, from_checkpoint, probabilities

    export(args, NAME, from_checkpoint, probabilities, ("probabilities",))


if __name__ == "__main__":
    run_main(main)
