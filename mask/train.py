"""Train Mask R-CNN on the tiles of `preprocess.py`.

python mask/train.py --data-path data --output-dir runs/mask --amp --channels-last
torchrun --nproc-per-node=2 mask/train.py --data-path data --output-dir runs/mask
python mask/train.py --data-path data --test-only --resume runs/mask/model_best.pth
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.args import train_parser
from common.cli import positive
from common.cli import run as run_main
from common.engine import fit
from common.session import session
from common.speedups import make_step, place
from mask.evaluate import evaluate, test
from mask.model import BACKBONES, NAME, STRIDE, build_model, loss_fn
from mask.targets import training_views


def main(argv: list[str] | None = None) -> None:
    parser = train_parser("Train Mask R-CNN: every aircraft is found and outlined.", "runs/mask")
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50")
    parser.add_argument("--proposals", type=positive, default=1000, help="RPN proposals per tile")
    args = parser.parse(argv)
    if args.test_only:
        return test(args)

    with session(args, NAME, STRIDE) as s:
        model = build_model(
            args.backbone, len(s.classes), args.weights_backbone, args.norm, args.proposals
        )
        images = args.batch_size, 3, args.crop_size, args.crop_size
        objective = place(model, loss_fn, s.process, s.speedups, (model.dense, images))
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
        )
        run = s.run(model, optimizer)
        step = make_step(objective, run, s.speedups, args.clip_grad_norm)
        views = training_views(args.crop_size, args.seed, args.scale_jitter)
        fit(s, run, step, views, evaluate, select="mask_AP")


if __name__ == "__main__":
    run_main(main)
