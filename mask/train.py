"""Train Mask R-CNN on the tiles of `preprocess.py`.

python mask/train.py --data-path data --output-dir runs/mask --amp --channels-last
torchrun --nproc-per-node=2 mask/train.py --data-path data --output-dir runs/mask
python mask/train.py --data-path data --test-only --resume runs/mask/model_best.pth
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common import args as arguments
from common import data, engine
from common.cli import positive
from common.cli import run as run_main
from common.distributed import locked, process_group
from common.run import checkpoint, resume
from common.speedups import make_step, place
from mask.evaluate import evaluate, test
from mask.model import BACKBONES, STRIDE, build_model, loss_fn, speed_up
from mask.views import training_views

PER_LR = 8  # tiles in the global batch that --lr is meant for


def main(argv: list[str] | None = None) -> None:
    parser = arguments.train_parser(
        "Train Mask R-CNN: every aircraft found, outlined and named.", output_dir="runs/mask"
    )
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50")
    parser.add_argument("--proposals", type=positive, default=1000, help="of the RPN, per tile")
    args = parser.parse(argv)
    if args.test_only:
        return test(args)
    train_tiles, val_tiles = data.training_splits(args.data_path)
    arguments.check(args, STRIDE, train_tiles.size)
    saved = resume.find(args, "mask")

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
            args.proposals,
        )
        speed_up(model, speedups, process.device, args.batch_size, args.crop_size)
        eager = replace(speedups, cuda_graphs=False, compile=False)
        objective = place(model, loss_fn, process, eager)
        global_batch = args.batch_size * process.world_size * args.grad_accum
        lr = args.lr * global_batch / PER_LR  # linear in the batch (Goyal et al. 2017)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, weight_decay=args.weight_decay, fused=True
        )
        schedule = engine.polynomial_schedule(optimizer, total_steps, args.warmup_steps)
        scaler = speedups.scaler(process.device)
        step = make_step(
            objective, optimizer, schedule, scaler, eager, process.device, args.clip_grad_norm
        )
        run = checkpoint.Run(
            "mask",
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
        process.print(
            f"learning rate {lr:g} = {args.lr:g} x global batch {global_batch} / {PER_LR}"
        )

        engine.fit(
            run,
            step,
            batches,
            training_views(args),
            partial(evaluate, model, val_batches, process, speedups, args.output_dir),
            process,
            args.output_dir,
            total_steps,
            args.print_freq,
            args.eval_freq,
            "mask_AP",
            args.save_every,
            args.eval_steps,
        )


if __name__ == "__main__":
    run_main(main)
