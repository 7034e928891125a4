"""`--resume`: which file, what may differ between a checkpoint and now, and whether bit-exact."""

import math
import os
from pathlib import Path
from typing import Any

import torch

from common.cli import UserError
from common.distributed import Process
from common.run import checkpoint, checkpoint_file

AUTO = Path("auto")
# Options that do not change the training. All others are settings: if one has changed, a line says
# so, or the run is refused. README.md lists them all.
FREE = {"config", "data_path", "output_dir", "resume", "test_only", "device", "workers"}
FREE |= {"print_freq", "save_every", "dist_timeout", "init_from", "weights_backbone"}
FREE |= {"extra_data"}  # the tiles there count, as those in data_path do


def find(
    wanted: Path | None, output_dir: Path, model_name: str, classes: list[str]
) -> dict[str, Any] | None:
    """The checkpoint that `--resume` names, or the previous one if that is damaged.

    Args:
        wanted: The value of `--resume`: a file, `AUTO`, or None if it was not given.
        output_dir: Where `AUTO` looks.
        model_name: What the checkpoint must hold.
        classes: Of the training tiles; the checkpoint must have the same, in the same order.

    Returns:
        What `checkpoint.load` returns; None for None, and for `AUTO` if there is no checkpoint.

    Raises:
        UserError: The folder holds a run that is not continued, neither file can be read, or the
            checkpoint is of another model or of other classes.
    """
    continued = wanted is not None and (wanted == AUTO or wanted.parent == output_dir)
    names = (checkpoint.LATEST, checkpoint.PREVIOUS)
    if not continued and any((output_dir / name).exists() for name in names):
        raise UserError(
            f"{str(output_dir)!r} holds a run already; continue it with --resume auto or "
            "choose another --output-dir."
        )
    if wanted is None:
        return None
    latest = output_dir / checkpoint.LATEST if wanted == AUTO else wanted
    previous = latest.with_name(checkpoint.PREVIOUS)
    if wanted == AUTO and not latest.exists() and not previous.exists():
        return None
    source = latest
    try:
        saved = checkpoint_file.read(latest)
    except UserError as error:
        if latest.name != checkpoint.LATEST or not previous.exists():
            raise
        source, saved = previous, checkpoint_file.read(previous)
        if int(os.environ.get("RANK", 0)) == 0:
            print(
                f"{error} Continuing from {str(previous)!r}, step {saved.get('step')!r:.20}.",
                flush=True,
            )
    checkpoint_file.check_model(saved, source, model_name)
    if saved["classes"] != classes:
        raise UserError(
            f"{str(source)!r} was trained on the classes {saved['classes'][1:]} and the tiles have "
            f"{classes[1:]}; make the tiles with the same classes in this order, or start a new "
            "run with --init-from this checkpoint."
        )
    return saved


def settings(args: dict[str, Any], process: Process, train: Any, val: Any) -> dict[str, Any]:
    """What must be equal for a bit-exact run besides its state, as plain values for a checkpoint.

    Args:
        args: The options, as `arguments.plain` returns them.
        process: This process.
        train: The `Tiles` to train on.
        val: The `Tiles` to validate on, or None.
    """
    device = process.device
    on_gpu = device.type == "cuda"
    chosen = {k: v for k, v in args.items() if k not in FREE}
    return chosen | {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "world_size": process.world_size,
        "global_batch": args["batch_size"] * args["grad_accum"] * process.world_size,
        "torch": str(torch.__version__),
        "train index": train.fingerprint(),
        "val index": val.fingerprint() if val else None,
    }


def restore(state: checkpoint.State, saved: dict[str, Any], total_steps: int) -> None:
    """Continue from `saved`, which `find` returned; print the step, and whether it is bit-exact.

    If all of `total_steps` are done, that is what is printed.

    Raises:
        UserError: It does not fit, or another number of processes would change the global batch.
    """
    before, now = saved.get("settings", {}), state.settings
    # An option that the checkpoint does not name is newer than the checkpoint. Values of an
    # untrusted file are compared as texts: a tensor is not equal or unequal to a number.
    changed = [name for name in now if name in before and repr(before[name]) != repr(now[name])]
    if "world_size" in changed and "global_batch" in changed:
        wanted, world = f"{before['global_batch']!r:.20}", now["world_size"]
        raise UserError(
            f"the run had a global batch of {wanted} on {before['world_size']!r:.20} processes and "
            f"would continue with {now['global_batch']} on {world}; choose -b and --grad-accum so "
            f"that {world} processes x -b x --grad-accum is {wanted}."
        )
    kept = before.get("lr_encoder", 1.0)  # earlier checkpoints do not name it
    if repr(kept) != repr(now["lr_encoder"]):
        raise UserError(
            f"the run had --lr-encoder {kept!r:.20} and keeps it; to change it, "
            "start a new run with --init-from this checkpoint."
        )
    state.restore(saved)
    if "train index" in changed or "seed" in changed:
        state.seen = 0  # the current epoch had another order
    if "val index" in changed or "eval_tiles" in changed:
        state.best = -math.inf  # scores of other tiles cannot be compared
    if state.step >= total_steps:
        state.process.print(
            f"all {total_steps} steps are done: the checkpoint is at step {state.step}; to train "
            "more, give a larger --epochs or --max-steps."
        )
        return
    message = f"continuing at step {state.step}, {state.seen} tiles into epoch {state.epoch}"
    differences = [_difference(name, before.get(name), now[name]) for name in changed]
    if differences:
        message += f"; not bit-exact, because {', '.join(differences)}"
    if {"lr", "weight_decay"} & set(changed):
        message += "; learning rate and weight decay stay the checkpoint's"
    state.process.print(message + ".")


def _difference(name: str, before: Any, now: Any) -> str:
    if name == "train index":
        return "the training tiles have changed (the current epoch starts again)"
    if name == "val index":
        return "the validation tiles have changed (the best checkpoint is chosen again)"
    return f"{name} was {before!r:.80} and is {now!r:.80}"  # `before` is untrusted
