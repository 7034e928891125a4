"""Train DeepLabV3 on the tiles of `preprocess.py`.

python DeepLabV3/train.py --data-path data --output-dir runs/deeplabv3 --amp --channels-last
torchrun --nproc-per-node=2 DeepLabV3/train.py --data-path data --output-dir runs/deeplabv3
python DeepLabV3/train.py --data-path data --test-only --resume runs/deeplabv3/model_best.pth
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.args import train_parser
from common.backbones import parameter_groups
from common.cli import fraction
from common.cli import run as run_main
from common.engine import fit
from common.predict.score import score_checkpoint
from common.semantic import scoring, training_views
from common.session import session
from common.speedups import make_step, place
from DeepLabV3.model import BACKBONES, NAME, STRIDE, build_model, from_checkpoint, loss_fn, predict


def main(argv: list[str] | None = None) -> None:
    parser = train_parser(f"Train {NAME}: every pixel is ground or an aircraft.", "runs/deeplabv3")
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50")
    parser.add_argument("--dropout", type=fraction, help="default: torchvision's, 0.5 and 0.1")
    args = parser.parse(argv)
    if args.test_only:
        return score_checkpoint(args, NAME, from_checkpoint, scoring(predict))

    with session(args, NAME, STRIDE, min_batch=2) as s:
        model = build_model(
            args.backbone,
            len(s.classes),
            weights_backbone=args.weights_backbone,
            norm=args.norm,
            dropout=args.dropout,
        )
        groups = parameter_groups(model, model.backbone, args.lr, args.lr_encoder)
        objective = place(model, loss_fn, s.process, s.speedups)
        optimizer = torch.optim.AdamW(
            groups, lr=args.lr, weight_decay=args.weight_decay, fused=True
        )
        s.start(model, optimizer)
        fit(s, make_step(objective, s), training_views(args), scoring(predict))


if __name__ == "__main__":
    run_main(main)
