"""What only a GPU can show: real captures, real streams, real NCCL. `make test-gpu` runs these."""

import importlib
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ENCODER, ROOT
from torch import nn

from benchmarks.steps import noise_tiles, training_step
from common import data, graphs
from common.args import train_parser
from common.distributed import Process
from common.speedups import Speedups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CUDA = Process(0, 1, torch.device("cuda", 0))
LIGHT = {"fcn": "resnet50", "DeepLabV3": "mobilenet_v3_large", "unet": "resnet18"}
OPTIONS = {
    "fcn": ["--backbone", "resnet50", "--dropout", "0"],
    "DeepLabV3": ["--backbone", "mobilenet_v3_large", "--dropout", "0"],
    "unet": ["--encoder", ENCODER],
}
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = graphs.WARMUP_STEPS + 9


@pytest.fixture(autouse=True)
def back_to_the_default_stream():
    """A run with graphs leaves it for good; the next test is another run."""
    yield
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.default_stream())
    torch.cuda.empty_cache()


def batches_of(count, side=128):
    """Made before any step, as making them is not a part of it."""
    found = []
    for i in range(count):
        torch.manual_seed(i)
        cpu = noise_tiles(4, side, torch.device("cpu"))
        found.append(cpu.to(CUDA.device))
    return found


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def losses_of(name, settings, process=CUDA, **kwargs):
    model, step = training_step(name, process, settings, 96, LIGHT[name], norm="group", **kwargs)
    without_dropout(model)
    totals = [step(batch).clone() for batch in batches_of(STEPS)]
    return model, np.diff([0.0, *(total.item() for total in totals)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LIGHT)
def test_a_replayed_step_is_the_step(name, dtype):
    settings = {"amp_dtype": DTYPES[dtype], "channels_last": True}
    plain, expected = losses_of(name, Speedups(**settings))
    graphed, found = losses_of(name, Speedups(**settings, cuda_graphs=True))
    # Kernels that add in any order and what cuDNN chooses differ; the learnt function may not.
    np.testing.assert_allclose(found, expected, rtol=0.02 if dtype == "fp32" else 0.1)
    assert np.isfinite(found).all()
    a, b = (torch.cat([p.flatten() for p in m.parameters()]) for m in (plain, graphed))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99


@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_accumulation_and_clipping_are_captured(grad_accum, clip):
    settings = {"grad_accum": grad_accum, "amp_dtype": torch.float16}
    _, expected = losses_of("unet", Speedups(**settings), clip_grad_norm=clip)
    _, found = losses_of("unet", Speedups(**settings, cuda_graphs=True), clip_grad_norm=clip)
    np.testing.assert_allclose(found, expected, rtol=0.1)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LIGHT)
def test_no_step_waits_for_the_device(name, dtype, cuda_graphs):
    settings = Speedups(DTYPES[dtype], True, cuda_graphs=cuda_graphs)
    _, step = training_step(name, CUDA, settings, 96, LIGHT[name], clip_grad_norm=1.0)
    batches = batches_of(STEPS)
    for batch in batches:
        step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[:3]:
            total = step(batch)
        with pytest.raises(RuntimeError, match="synchronizing"):
            total.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert total.isfinite()


@pytest.mark.parametrize("name", LIGHT)
def test_replaying_takes_no_memory(name):
    settings = Speedups(torch.bfloat16, True, cuda_graphs=True)
    _, step = training_step(name, CUDA, settings, 96, LIGHT[name])
    batches = batches_of(STEPS)
    for batch in batches:
        step(batch)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for batch in batches:
        step(batch)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_a_captured_model_can_be_scored_and_trained_on():
    """Validation runs between replays, at other shapes, and must disturb nothing."""
    settings = Speedups(torch.bfloat16, True, cuda_graphs=True)
    model, step = training_step("unet", CUDA, settings, 96, "resnet18", norm="group")
    undisturbed, quiet = training_step("unet", CUDA, settings, 96, "resnet18", norm="group")
    for i, batch in enumerate(batches_of(STEPS + 6)):
        step(batch)
        quiet(batch)
        if i >= STEPS - 3:
            with torch.inference_mode():
                found = model.eval()(torch.randn(3, 3, 160, 128, device="cuda"))
            model.train()
            assert found.isfinite().all()
    for a, b in zip(model.parameters(), undisturbed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=5e-3)


@pytest.fixture
def nccl():
    """A process group of one, over NCCL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    torch.cuda.set_device(0)
    dist.init_process_group(
        "nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1, device_id=CUDA.device
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_collectives_are_captured_with_the_step(nccl, name, grad_accum):
    """DDP over one GPU: `place` wraps where a world has two, and NCCL reduces all the same."""
    settings = {"amp_dtype": torch.bfloat16, "channels_last": True, "grad_accum": grad_accum}
    _, expected = losses_of(name, Speedups(**settings))
    world = Process(0, 2, CUDA.device)
    _, found = losses_of(name, Speedups(**settings, cuda_graphs=True), process=world)
    np.testing.assert_allclose(found, expected, rtol=0.1)


def run_of(tiled, folder, output, *flags):
    words = ["--data-path", tiled, "--output-dir", output, "--max-steps", 24, "-b", 4, "-j", 2]
    words += ["--crop-size", 64, "--norm", "group", "--weights-backbone", "none"]
    words += ["--print-freq", 1, "--eval-freq", 99, "--device", "cuda", *OPTIONS[folder], *flags]
    return list(map(str, words))


def losses_in(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("folder", OPTIONS)
def test_all_techniques_together_through_the_command(tiled, tmp_path, folder):
    train = importlib.import_module(f"{folder}.train")
    train.main(run_of(tiled, folder, tmp_path / "plain"))
    torch.cuda.set_stream(torch.cuda.default_stream())
    flags = ["--amp", "--channels-last", "--cuda-graphs", "--compile"]
    train.main(run_of(tiled, folder, tmp_path / "all", *flags))
    np.testing.assert_allclose(
        losses_in(tmp_path / "all"), losses_in(tmp_path / "plain"), rtol=0.15
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each process")
@pytest.mark.parametrize("flags", [[], ["--amp", "--channels-last", "--cuda-graphs"]])
def test_two_gpus_learn_what_one_does(tiled, tmp_path, flags):
    script = ROOT / "unet/train.py"
    one = run_of(tiled, "unet", tmp_path / "one", *flags)
    two = run_of(tiled, "unet", tmp_path / "two", *flags, "-b", 2)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for words in ([script, *one], [*torchrun, script, *two]):
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses_in(tmp_path / "two"), losses_in(tmp_path / "one"), rtol=0.05)


def test_prefetched_batches_are_the_loaders(tiled):
    tiles = data.Tiles(tiled / "train")
    args = train_parser("").parse(["-b", "4", "-j", "1"])
    loader = data.scoring_loader(tiles, args, CUDA)
    expected = [data.Batch(*(t.clone() for t in batch)) for batch in loader]
    busy = torch.randn(2048, 2048, device="cuda")
    for batch, truth in zip(data.prefetch(loader, CUDA.device), expected, strict=True):
        for _ in range(20):
            busy = busy @ busy  # so that the copy of the next batch runs beside something
            busy = busy / busy.norm()
        for found, wanted in zip(batch, truth, strict=True):
            assert found.is_cuda
            assert torch.equal(found.cpu(), wanted)
