"""Train FCN on the tiles of `preprocess.py`.

python fcn/train.py --data-path data --output-dir runs/fcn --amp --channels-last
torchrun --nproc-per-node=2 fcn/train.py --data-path data --output-dir runs/fcn
python fcn/train.py --data-path data --test-only --resume runs/fcn/model_best.pth
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common import args as arguments
from common import data, engine
from common.cli import fraction
from common.cli import run as run_main
from common.distributed import locked, process_group
from common.predict.score import test_semantic
from common.run import checkpoint, resume
from common.semantic import evaluate, training_views
from common.speedups import make_step, place
from fcn.model import BACKBONES, STRIDE, build_model, from_checkpoint, loss_fn, predict


def main(argv: list[str] | None = None) -> None:
    parser = arguments.train_parser(
        "Train FCN: every pixel is ground or a class of aircraft.", output_dir="runs/fcn"
    )
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50")
    parser.add_argument("--dropout", type=fraction, help="default: torchvision's, 0.1")
    args = parser.parse(argv)
    if args.test_only:
        return test_semantic(args, "fcn", from_checkpoint, predict)
    train_tiles, val_tiles = data.training_splits(args.data_path)
    arguments.check(args, STRIDE, train_tiles.size)
    saved = resume.find(args, "fcn")

    with (
        process_group(args.device, args.cuda_graphs, args.dist_timeout) as process,
        locked(args.output_dir, process),
    ):
        speedups = arguments.speedups(args, process)
        batches = data.training_loader(train_tiles, args, process)
        val_batches = data.validation_loader(val_tiles, args, process)
        total_steps = args.max_steps or args.epochs * len(batches)

        torch.manual_seed(args.seed)  # the same weights on every rank
        model = build_model(
            args.backbone,
            len(train_tiles.classes),
            args.weights_backbone,
            args.norm,
            args.dropout,
        )
        torch.manual_seed(args.seed + process.rank)  # and another dropout
        objective = place(model, loss_fn, process, speedups)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
        )
        schedule = engine.polynomial_schedule(optimizer, total_steps, args.warmup_steps)
        scaler = speedups.scaler(process.device)
        step = make_step(
            objective, optimizer, schedule, scaler, speedups, process.device, args.clip_grad_norm
        )
        run = checkpoint.Run(
            "fcn",
            train_tiles.classes,
            arguments.plain(args),
            model,
            optimizer,
            schedule,
            scaler,
            resume.settings(args, process, train_tiles),
        )
        resume.restore(run, saved, process)
        process.print(speedups.banner(process, args.batch_size))
        engine.fit(
            run,
            step,
            batches,
            training_views(args),
            partial(evaluate, model, predict, val_batches, process, speedups, args.output_dir),
            process,
            args.output_dir,
            total_steps,
            args.print_freq,
            args.eval_freq,
            save_every=args.save_every,
            eval_steps=args.eval_steps,
        )


if __name__ == "__main__":
    run_main(main)
