"""Writes a trained network as an ONNX file, and runs such a file in place of the checkpoint.

The graph takes `images`, uint8 [B,window,window,3] for any B, and normalises them itself. The
file's metadata holds the rest, each value as JSON: the model's name, the classes, the mean and
deviation that the graph applies, the network's stride, the window, and options of the model.
"""

import argparse
import importlib.util
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.args import of_the_model
from common.augment import MEAN, STD, normalise
from common.cli import UserError, say
from common.io.files import read_file, write_atomic
from common.predict.folder import STRIDE
from common.run import checkpoint, checkpoint_file
from common.run.checkpoint_file import MAX_CLASSES, check_model

SUFFIX, WEIGHTS = ".onnx", ".pth"
PYTORCH_OPTIONS = ("amp", "amp_dtype", "channels_last", "compile")  # of inference.py


def export(
    args: argparse.Namespace,
    name: str,
    from_checkpoint: Callable[[dict[str, Any]], nn.Module],
    outputs: Callable[[nn.Module, Tensor], Any],
    names: tuple[str, ...],
    translations: dict[Any, Any] | None = None,
    **options: int,
) -> None:
    """Write the network of `args.model` to `args.output`, completely or not at all.

    Args:
        args: From `common.predict.folder.export_parser`.
        name: The model's `NAME`.
        outputs: (model, float [B,3,side,side], normalised) → a tensor, or a tuple of tensors.
        names: Of these tensors.
        translations: Operators that torch's exporter does not know → functions for onnxscript.
        options: More options of inference.py that this file decides, besides `--window`.

    Raises:
        UserError: A package is missing, the output's name or folder is unsuitable, or torch cannot
            export this network.
    """
    if args.output.suffix not in (SUFFIX, WEIGHTS):
        raise UserError(
            f"{str(args.output)!r} ends neither in {SUFFIX} nor in {WEIGHTS}, by which "
            f"inference.py knows the file; use {str(args.output.with_suffix(SUFFIX))!r}."
        )
    if not args.output.parent.is_dir():
        raise UserError(
            f"there is no folder {str(args.output.parent)!r}; make it, or choose another."
        )
    if args.output.suffix == SUFFIX:
        _require("onnx", "onnxscript")
    saved = checkpoint.load(args.model, name)
    model = checkpoint.rebuild(saved, from_checkpoint).eval()
    if args.output.suffix == WEIGHTS:
        checkpoint_file.write(weights_alone(saved), args.output)
        size = args.output.stat().st_size / 1e6
        return say(f"wrote {str(args.output)!r} ({size:.1f} MB): the weights in half precision")
    facts = {
        "model": name,
        "classes": saved["classes"],
        "look": saved["args"].get("look"),
        "mean": MEAN,
        "std": STD,
        "stride": STRIDE,
        "window": args.window,
        **options,
    }
    data = to_onnx(model, outputs, names, args.window, facts, translations)
    write_atomic(args.output, data)
    say(
        f"wrote {str(args.output)!r} ({len(data) / 1e6:.1f} MB): images uint8 "
        f"[B,{args.window},{args.window},3] → {', '.join(names)}"
    )


def weights_alone(saved: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint to publish: what prediction needs, the weights in half precision.

    The weights are the averaged ones if there are any. Of the options those stay that make the
    network, and how scenes are read: no path of the machine is in the file.
    """
    kept = of_the_model(saved["args"]) | {"look": saved["args"].get("look")}
    weights = {
        key: value.half() if value.is_floating_point() else value
        for key, value in checkpoint.averaged(saved).items()
    }
    facts = {key: saved[key] for key in ("format", "model_name", "classes")}
    return facts | {"args": kept, "model": weights}


class _FromPixels(nn.Module):
    """From pixels to the tensors that leave the file."""

    def __init__(self, model: nn.Module, outputs: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, images: Tensor) -> Any:
        return self.outputs(self.model, normalise(images).contiguous())


def to_onnx(
    model: nn.Module,
    outputs: Callable[[nn.Module, Tensor], Any],
    names: tuple[str, ...],
    side: int,
    facts: dict[str, Any],
    translations: dict[Any, Any] | None = None,
) -> bytes:
    """The content of an ONNX file; the arguments are those of `export`, and its metadata."""
    # torch would take a batch of 1 for a constant.
    images = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    normalise(images[:1, :1, :1])  # caches its constants, which the tracer must not make
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # about torch's own code
            program = torch.onnx.export(
                _FromPixels(model, outputs),
                (images,),
                dynamo=True,
                verbose=False,
                optimize=False,  # onnxruntime does it; here it would take most of the time
                input_names=["images"],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                custom_translation_table=translations,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"torch cannot export this network to ONNX: {reason}") from error
    assert program is not None  # only dynamo=False returns None
    # If the network's code fixes the number of windows, torch fixes it in the file, too.
    shape = program.model.graph.inputs[0].shape
    if shape is None or isinstance(shape[0], int):
        raise UserError("torch cannot export this network to ONNX for any number of windows.")
    program.model.metadata_props.update({key: json.dumps(facts[key]) for key in facts})
    return program.model_proto.SerializeToString()


def load(
    args: argparse.Namespace, name: str, options: list[str]
) -> tuple[Callable[[Tensor], tuple[Tensor, ...]], list[str]]:
    """Open the ONNX file `args.model`, and set the options that it decides in `args`.

    Args:
        args: From `common.predict.folder.inference_parser`.
        name: The model's `NAME`.
        options: Those that the file decides; None in `args` if the user gave none.

    Returns:
        A function that runs the network on uint8 [B,window,window,3], and the classes.

    Raises:
        UserError: An option is not for such a file, onnxruntime is missing, or the file is not one
            that `export` wrote for this model.
    """
    _require("onnxruntime")
    import onnxruntime

    given = [option for option in PYTORCH_OPTIONS if getattr(args, option)]
    useless = [f"--{option.replace('_', '-')}" for option in given]
    if args.device not in ("auto", "cpu"):
        useless.append(f"--device {args.device}")
    if useless:
        raise UserError(
            f"{' '.join(useless)} cannot be used with an {SUFFIX} file, which onnxruntime runs on "
            "the CPU in float32; leave it out, or give the checkpoint."
        )
    data = read_file(args.model, "ONNX file")
    try:
        network, facts = open_network(data)
        check_model({"model_name": facts["model"]}, args.model, name)
        classes, decided = facts["classes"], {option: facts[option] for option in options}
        if not (
            all(isinstance(value, int) for value in decided.values())
            and isinstance(classes, list)
            and 0 < len(classes) <= MAX_CLASSES
            and all(isinstance(label, str) for label in classes)
        ):
            raise ValueError("its metadata is invalid")
    except UserError:
        raise
    except Exception as error:  # onnxruntime has a dozen of its own
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{str(args.model)!r} is damaged or was not written by export.py ({reason})."
        ) from error
    args.look_of_training = facts.get("look")
    for option, value in decided.items():
        wanted = getattr(args, option)
        if wanted not in (None, value):
            flag = f"--{option.replace('_', '-')}"
            raise UserError(
                f"{flag} {wanted}: {str(args.model)!r} was exported for {value}; leave it out, or "
                f"use `python {name}/export.py CHECKPOINT OUTPUT {flag} {wanted}`."
            )
        setattr(args, option, value)
    runner = f"onnxruntime {onnxruntime.__version__}"
    say(f"{args.model.name!r}: {runner}, cpu, windows of {args.window} pixels")
    return network, classes


def open_network(data: bytes) -> tuple[Callable[[Tensor], tuple[Tensor, ...]], dict[str, Any]]:
    """Load an ONNX file into onnxruntime, on the CPU.

    Returns:
        uint8 [B,window,window,3] → the tensors of the file; and the metadata.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; warnings are about the graph's form
    session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
    stored = session.get_modelmeta().custom_metadata_map
    facts = {key: json.loads(value) for key, value in stored.items()}
    (images,) = session.get_inputs()
    if images.shape[1] != facts["window"]:
        raise ValueError("its metadata is invalid")

    def run(images: Tensor) -> tuple[Tensor, ...]:
        arrays = session.run(None, {"images": images.contiguous().numpy()})
        return tuple(map(torch.from_numpy, arrays))

    return run, facts


def _require(*packages: str) -> None:
    """Refuse to go on if a package is missing; nothing else here needs these."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        names = " ".join(missing)
        raise UserError(f"ONNX needs {names}; install it with `python -m pip install {names}`.")
