"""What only a GPU can show: real captures, real streams, real NCCL. `make test-gpu` runs these.

With DRY_RUN=1 two of them run on the CPU, with a stand-in for graphs: it tests the tests.
"""

import gc
import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partialmethod
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.commands import ENCODER, PATIENCE, ROOT, losses
from helpers.fake_cuda import SMALL, Census
from helpers.networks import without_dropout
from torch import Tensor

from benchmarks.lib import synthetic
from benchmarks.lib.models import MODELS
from benchmarks.lib.standins import THIN
from benchmarks.lib.synthetic import noise_tiles
from benchmarks.syncs import waits
from common import data, graphs, loader
from common.args import Speedups
from common.distributed import Process
from mask import model as mask_model

DRY = bool(os.environ.get("DRY_RUN"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (DRY or torch.cuda.is_available()), reason="there is no CUDA device"),
]
CUDA = Process(0, 1, torch.device("cpu" if DRY else "cuda:0"))
# Before the data is made.
NOT_DRY = pytest.mark.skipif(DRY, reason="a dry run has no CUDA device")
LIGHT = {name: model.light for name, model in MODELS.items() if model.semantic}
# FCN takes a minute to compile, and differs from DeepLabV3 only in a layer or two.
OPTIONS = {
    "DeepLabV3": ["--backbone", "mobilenet_v3_large", "--dropout", "0"],
    "unet": ["--encoder", ENCODER],
}
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = graphs.WARMUP_STEPS + 9


@pytest.fixture(autouse=True)
def back_to_the_default_stream(request):
    """A run with graphs never returns to it, but the next test is another run."""
    if DRY:
        if not any(name in request.node.name for name in ("[unet-fp32]", "[1-batch-fp32]")):
            pytest.skip("a dry run has no fp16, no streams, no NCCL, and little time")
        request.getfixturevalue("standin")
        request.getfixturevalue("monkeypatch").setattr(mask_model, "CHANNELS", THIN)
        yield
        return
    yield
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.default_stream())
    gc.collect()  # a scheduler and its optimizer refer to each other, and keep the model alive
    torch.cuda.empty_cache()


def batches_of(count, side=128):
    """Made before any step, because making them is not a part of the step."""
    found = []
    for i in range(count):
        torch.manual_seed(i)
        cpu = noise_tiles(4, side, torch.device("cpu"))
        found.append(cpu.to(CUDA.device))
    return found


def training_step(*args, **kwargs):
    """Without cuDNN's search, which takes DeepLabV3 half a minute; the commands below have it."""
    made = synthetic.training_step(*args, **kwargs)
    torch.backends.cudnn.benchmark = False
    return made


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Run(NamedTuple):
    losses: np.ndarray
    moved: Tensor  # how far training took each weight
    step: Callable  # holds the graph


def trained(name, settings, process=CUDA, **kwargs):
    model, step = training_step(name, process, settings, 96, LIGHT[name], norm="group", **kwargs)
    without_dropout(model)
    start = weights(model)
    totals = [step(batch).clone() for batch in batches_of(STEPS)]
    losses = np.diff([0.0, *(total.item() for total in totals)])
    return Run(losses, (weights(model) - start).cpu(), step)


def assert_moved_alike(found, expected):
    """If the graph kept the learning rate of its capture, the ratio would be 0.88.

    On a CPU bf16 and float32 have a cosine of 0.92 to 0.95 and a ratio of 0.998.
    """
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.8
    assert (found.norm() / expected.norm()).item() == pytest.approx(1, abs=0.05)


# Kernels that add in no fixed order differ slightly between two equal runs.
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "fp16") for name in LIGHT), ("unet", "fp32"), ("unet", "bf16")]
)
def test_a_replayed_step_is_the_step(name, dtype):
    settings = {"amp_dtype": DTYPES[dtype], "channels_last": True}
    plain = trained(name, Speedups(**settings))
    graphed = trained(name, Speedups(**settings, cuda_graphs=True))
    rtol = 0.02 if dtype == "fp32" else 0.05
    np.testing.assert_allclose(graphed.losses, plain.losses, rtol=rtol)
    assert_moved_alike(graphed.moved, plain.moved)


@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_accumulation_and_clipping_are_captured(grad_accum, clip):
    settings = {"grad_accum": grad_accum, "amp_dtype": torch.float16}
    plain = trained("unet", Speedups(**settings), clip_grad_norm=clip)
    graphed = trained("unet", Speedups(**settings, cuda_graphs=True), clip_grad_norm=clip)
    np.testing.assert_allclose(graphed.losses, plain.losses, rtol=0.05)
    assert_moved_alike(graphed.moved, plain.moved)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_no_step_waits_for_the_device(name, cuda_graphs):
    """In fp16, which has all operators of the other dtypes and those of the scaler."""
    settings = Speedups(torch.float16, True, cuda_graphs=cuda_graphs)
    _, step = training_step(name, CUDA, settings, 96, MODELS[name].light, clip_grad_norm=1.0)
    batches = batches_of(STEPS)
    for batch in batches:
        step(batch)
    torch.cuda.synchronize()
    assert [waits(lambda batch=batch: step(batch)) for batch in batches[:3]] == [0, 0, 0]
    total = step(batches[3])
    assert waits(total.item) == 1
    assert total.isfinite()


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", LIGHT)
def test_a_step_stays_in_channels_last_as_fake_tensors_say(name, norm):
    settings = Speedups(torch.bfloat16, channels_last=True)
    _, step = training_step(name, CUDA, settings, 96, LIGHT[name], norm=norm)
    batch = noise_tiles(2, 128, CUDA.device)
    step(batch)
    with Census() as census:
        step(batch)
    assert census.mixed == {}
    if norm == "group":
        return  # newer torch has a channels-last kernel
    # ASPP's pooled branch is 1×1, which is in both layouts; torch then joins the branches in NCHW.
    aspp = {"aten::cat", "aten::hardswish_backward"} if name == "DeepLabV3" else set()
    assert set(census.left) <= SMALL | aspp


def test_replaying_takes_no_memory():
    settings = Speedups(torch.bfloat16, True, cuda_graphs=True)
    _, step = training_step("unet", CUDA, settings, 96, "resnet18")
    batches = batches_of(STEPS)
    for batch in batches:
        step(batch)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for batch in batches:
        step(batch)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_a_captured_model_can_be_scored_and_trained_on():
    """Validation runs between replays, with other shapes, and must not disturb them."""
    settings = Speedups(torch.bfloat16, True, cuda_graphs=True)
    model, step = training_step("unet", CUDA, settings, 96, "resnet18", norm="group")
    undisturbed, quiet = training_step("unet", CUDA, settings, 96, "resnet18", norm="group")
    start = weights(model)
    for i, batch in enumerate(batches_of(STEPS + 6)):
        step(batch)
        quiet(batch)
        if i >= STEPS - 3:
            with torch.inference_mode():
                found = model.eval()(torch.randn(3, 3, 160, 128, device="cuda"))
            model.train()
            assert found.isfinite().all()
    assert_moved_alike(weights(model) - start, weights(undisturbed) - start)


@pytest.fixture
def nccl(monkeypatch):
    """A process group of one, over NCCL, and a list for objects that must outlive it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    torch.cuda.set_device(0)
    dist.init_process_group(
        "nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1, device_id=CUDA.device
    )
    kept = []
    yield kept
    graphs.release()  # as in `process_group`: NCCL would wait for the graph for ever
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "grad_accum"), [("fcn", 1), ("DeepLabV3", 1), ("unet", 1), ("unet", 2)]
)
def test_collectives_are_captured_with_the_step(nccl, name, grad_accum):
    """DDP on one GPU: `place` wraps for a world size of two.

    A sum over one rank in place needs no kernel, so this shows that DDP's hooks and buckets can be
    captured; that NCCL's kernels can, the next test.
    """
    settings = {"amp_dtype": torch.bfloat16, "channels_last": True, "grad_accum": grad_accum}
    plain = trained(name, Speedups(**settings))
    world = Process(0, 2, CUDA.device)
    graphed = trained(name, Speedups(**settings, cuda_graphs=True), process=world)
    nccl.append(graphed.step)  # train.py still holds its step when the group ends
    np.testing.assert_allclose(graphed.losses, plain.losses, rtol=0.05)
    assert_moved_alike(graphed.moved, plain.moved)


def test_a_kernel_of_nccl_is_captured(nccl):
    """A sum that also multiplies has one, even on one rank."""
    values, stream = torch.ones(8, device="cuda"), torch.cuda.Stream()
    doubled = dist._make_nccl_premul_sum(2.0)
    with torch.cuda.stream(stream):
        for _ in range(3):  # the communicator is made outside of the capture
            dist.all_reduce(values, op=doubled)
        graph = graphs.CudaGraph()
        nccl.append(graph)
        graph.capture(lambda: dist.all_reduce(values, op=doubled))
        values.fill_(1.0)
        graph.replay()
    stream.synchronize()
    assert values.tolist() == [2.0] * 8


def run_of(tiled, folder, output, *flags):
    words = ["--data-path", tiled, "--output-dir", output, "--max-steps", 24, "-b", 4, "-j", 2]
    words += ["--crop-size", 64, "--norm", "group", "--weights-backbone", "none"]
    words += ["--print-freq", 1, "--eval-freq", 99, "--device", "cuda", *OPTIONS[folder], *flags]
    return list(map(str, words))


@NOT_DRY
@pytest.mark.parametrize("folder", OPTIONS)
def test_all_techniques_together_through_the_command(tiled, tmp_path, folder):
    train = importlib.import_module(f"{folder}.train")
    train.main(run_of(tiled, folder, tmp_path / "plain"))
    torch.cuda.set_stream(torch.cuda.default_stream())
    flags = ["--amp", "--channels-last", "--cuda-graphs", "--compile"]
    train.main(run_of(tiled, folder, tmp_path / "all", *flags))
    found, expected = np.array(losses(tmp_path / "all")), np.array(losses(tmp_path / "plain"))
    # As on a CPU: a single step shows more of bf16's three digits than of the techniques.
    assert np.abs(found - expected).mean() < 0.05 * expected.mean()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_a_captured_step_of_mask_rcnn_has_the_gradients_of_an_eager_one(norm, grad_accum, dtype):
    """From the same weights: those of later steps depend on which boxes rounding lets through."""
    settings = {"grad_accum": grad_accum, "amp_dtype": DTYPES[dtype], "channels_last": True}
    graphed, captured_step = training_step(
        "mask", CUDA, Speedups(**settings, cuda_graphs=True), 96, "resnet18", norm=norm
    )
    eager, eager_step = training_step("mask", CUDA, Speedups(**settings), 96, "resnet18", norm=norm)
    *before, last = batches_of(graphs.WARMUP_STEPS + 3)
    for batch in before:
        captured_step(batch)
    eager.load_state_dict(graphed.state_dict())
    captured_step(last)
    eager_step(last)
    for name, parameter in eager.named_parameters():
        found, expected = graphed.get_parameter(name).grad.flatten(), parameter.grad.flatten()
        cosine = torch.nn.functional.cosine_similarity(found, expected, dim=0).item()
        assert cosine == pytest.approx(1, abs=0.01 if dtype == "fp32" else 0.1), name
    for (name, found), expected in zip(graphed.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05, msg=name)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each process")
@pytest.mark.parametrize("flags", [[], ["--amp", "--channels-last", "--cuda-graphs"]])
def test_two_gpus_learn_what_one_does(tiled, tmp_path, flags):
    script = ROOT / "unet/train.py"
    one = run_of(tiled, "unet", tmp_path / "one", *flags)
    two = run_of(tiled, "unet", tmp_path / "two", *flags, "-b", 2)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for words in ([script, *one], [*torchrun, script, *two]):
        # A signal that torchrun forwards; if it were killed, its processes would stay.
        command = ["timeout", str(PATIENCE), sys.executable, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    rtol = 0.1 if flags else 0.05
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=rtol)


@NOT_DRY
def test_prefetched_batches_are_the_loaders(tiled, monkeypatch):
    tiles = data.Tiles(tiled / "train")
    batches = loader.scoring_loader(tiles, 4, 1, CUDA)
    expected = [data.Batch(*(t.clone() for t in batch)) for batch in batches]
    at_once = data.Batch.to

    def late(batch, device, cycles):
        torch.cuda._sleep(cycles)
        return at_once(batch, device)

    # If nothing waited for it, a slow copy would be read too early. If nothing kept the batch's
    # memory, a slow reader would find the next copies in it.
    for copying, reading in ((20_000_000, 0), (0, 20_000_000)):
        monkeypatch.setattr(data.Batch, "to", partialmethod(late, cycles=copying))
        found = []
        for batch in loader.prefetch(batches, CUDA.device):
            torch.cuda._sleep(reading)
            found.append(data.Batch(*(t.clone() for t in batch)))
        for batch, truth in zip(found, expected, strict=True):
            for tensor, wanted in zip(batch, truth, strict=True):
                assert tensor.is_cuda
                assert torch.equal(tensor.cpu(), wanted)
