"""What a training step must not do on a GPU, tested without one; and how graphs replay."""

import copy
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import ENCODER
from helpers.fake_cuda import backward
from helpers.networks import session_of
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._pytree import tree_leaves

from benchmarks.lib.models import MODELS
from benchmarks.lib.standins import THIN, CpuGraph, thin_fcn
from benchmarks.lib.synthetic import noise_tiles, training_step
from benchmarks.syncs import census
from common import args as arguments
from common import augment, distributed, graphs
from common.args import Speedups
from common.cli import UserError
from common.distributed import Process, process_group
from common.run.checkpoint import restore_optimizer
from common.speedups import make_step, place
from fcn import model as fcn
from mask import model as mask

CPU = Process(0, 1, torch.device("cpu"))
# Light enough for a CPU; FCN has no light backbone, see `thin`.
LIGHT = {name: model.smallest or model.light for name, model in MODELS.items()}
# Mask R-CNN has backbones of two libraries.
NETWORKS = [*LIGHT.items(), ("mask", "resnet18")]
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def thin(monkeypatch):
    """A narrow FCN and Mask R-CNN for real steps; tests with fake tensors use the full ones."""
    monkeypatch.setitem(fcn.BACKBONES, "resnet50", thin_fcn)
    monkeypatch.setattr(mask, "CHANNELS", THIN)


@pytest.mark.parametrize(("name", "backbone"), NETWORKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_step_reads_nothing_back(fake, name, backbone, dtype):
    settings = Speedups(amp_dtype=DTYPES[dtype], channels_last=True, grad_accum=2)
    _, step = training_step(name, CPU, settings, 64, backbone, clip_grad_norm=1.0)
    for _ in range(2):
        loss = step(noise_tiles(4, 96, CPU.device))
    assert loss.shape == ()


@pytest.mark.parametrize(("name", "backbone"), NETWORKS)
def test_a_real_step_holds_no_operator_that_syncs(thin, name, backbone):
    settings = Speedups(amp_dtype=torch.bfloat16, channels_last=True)
    _, step = training_step(name, CPU, settings, 32, backbone, clip_grad_norm=1.0)
    batch = noise_tiles(2, 48, CPU.device)
    step(batch)
    assert census(lambda: step(batch)) == {}


def test_the_census_is_red_for_a_step_that_reads_its_loss():
    batch = noise_tiles(2, 96, CPU.device)
    _, step = training_step("unet", CPU, Speedups(), 64, ENCODER)
    found = census(lambda: step(batch).item())
    assert [operator for operator, _ in found] == ["aten::_local_scalar_dense"]
    assert "test_speedups.py" in next(iter(found))[1]


def test_a_fake_step_is_red_when_it_reads_its_loss(fake):
    _, step = training_step("unet", CPU, Speedups(), 64, ENCODER)
    with pytest.raises(DataDependentOutputException):
        step(noise_tiles(2, 96, CPU.device)).item()


@pytest.mark.parametrize("name", LIGHT)
def test_on_a_gpu_no_operator_of_a_prediction_mixes_devices(fake, monkeypatch, name):
    """Those of a training step: `test_fake_cuda.py`."""
    device = torch.device("cuda")
    module = MODELS[name].module
    monkeypatch.setattr(torch.Tensor, "backward", backward)  # building tries an encoder out
    with device:
        model = module.build_model(LIGHT[name], 2).eval()
    with monkeypatch.context() as patch:
        # Autocast asks for a driver once, when it is made; fake tensors need none.
        patch.setattr("torch.cuda.is_available", lambda: True)
        patch.setattr("torch.cuda.is_bf16_supported", lambda: True)
        autocast = torch.autocast("cuda", torch.bfloat16)
    with autocast:
        assert torch.is_autocast_enabled("cuda")
        images = augment.normalise(noise_tiles(2, 96, device).images)
        # The prediction of Mask R-CNN is cut to what was found, outside of its network.
        network = nn.Module.__call__ if name == "mask" else module.predict
        found = network(model, images)
    assert all(tensor.device.type == "cuda" for tensor in tree_leaves(found))


@pytest.mark.parametrize(
    ("name", "backbone"), [*NETWORKS, ("mask", "tu-test_efficientnet"), ("mask", "mobilenet_v2")]
)
def test_channels_last_goes_through_every_layer(thin, name, backbone):
    settings = Speedups(channels_last=True)
    seen, broken = [], []

    def look(module, _inputs, output):
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            seen.append(module)
            if not output.is_contiguous(memory_format=torch.channels_last):
                broken.append(f"{type(module).__name__} {list(output.shape)}")

    model, step = training_step(name, CPU, settings, 64, backbone)
    leaves = [m for m in model.modules() if not list(m.children())]
    for leaf in leaves:
        leaf.register_forward_hook(look)
    step(noise_tiles(2, 96, CPU.device))
    assert len(seen) > 25
    assert broken == []
    for parameter in model.parameters():
        if parameter.ndim == 4:
            assert parameter.grad.is_contiguous(memory_format=torch.channels_last)


# --- CUDA graphs -------------------------------------------------------------------------------


def losses_of(name, settings, steps, **kwargs):
    model, step = training_step(name, CPU, settings, 32, LIGHT[name], **kwargs)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found, total = [], 0.0
    for i in range(steps):
        torch.manual_seed(i)
        now = step(noise_tiles(4, 48, CPU.device)).item()
        found.append(now - total)
        total = now
    return model, found


@pytest.mark.parametrize(
    ("settings", "clip"),
    [
        ({}, None),
        ({"channels_last": True}, 1.0),
        ({"amp_dtype": torch.bfloat16}, None),
        ({"amp_dtype": torch.float16}, 1.0),
        ({"grad_accum": 2}, None),
    ],
)
def test_a_replayed_step_is_the_step(standin, settings, clip):
    steps = graphs.WARMUP_STEPS + 3
    plain, expected = losses_of("unet", Speedups(**settings), steps, clip_grad_norm=clip)
    graphed, found = losses_of(
        "unet", Speedups(**settings, cuda_graphs=True), steps, clip_grad_norm=clip
    )
    (graph,) = standin
    assert (graph.captures, graph.replays) == (1, 3)
    # A learning rate in a float32 tensor is not exactly the number it was made from.
    assert found == pytest.approx(expected, rel=0.02)
    for (key, a), b in zip(plain.state_dict().items(), graphed.state_dict().values(), strict=True):
        if "num_batches" in key:
            assert a == b


@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_replay_through_torchs_capture_has_the_gradients_of_an_eager_step(
    monkeypatch, grad_accum, backend
):
    """`torch.cuda.graph` itself captures, with a recorder in place of the driver's graph."""
    stream, made = SimpleNamespace(wait_stream=lambda other: None), []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(CpuGraph()) or made[-1])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    for name in ("current_stream", "default_stream", "synchronize", "set_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: stream)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)

    def gradients(settings, backend=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        objective = place(model, lambda m, x, y: (m(x) - y).square().mean(), CPU, settings)
        if backend:
            objective.compile(fullgraph=True, dynamic=False, backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        step = make_step(objective, session_of(model, optimizer, schedule, settings))
        found = []
        for i in range(graphs.WARMUP_STEPS + 3):
            torch.manual_seed(i)
            step(torch.randn(4, 3, 8, 8), torch.randn(4, 2, 6, 6))
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return torch.stack(found)

    eager = gradients(Speedups(grad_accum=grad_accum))
    graphed = gradients(Speedups(grad_accum=grad_accum, cuda_graphs=True), backend)
    torch.testing.assert_close(graphed, eager)
    assert [(graph.captures, graph.replays) for graph in made] == [(1, 3)]


def test_the_graph_trains_the_model_and_not_a_copy(standin):
    model, step = training_step("unet", CPU, Speedups(cuda_graphs=True), 64, ENCODER)
    batch = noise_tiles(2, 96, CPU.device)
    for _ in range(graphs.WARMUP_STEPS + 1):
        step(batch)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.data_ptr() for name, p in model.named_parameters()}
    statistics = model.encoder.state_dict()
    counted = {k: v.clone() for k, v in statistics.items() if "num_batches" in k}
    step(batch)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert parameter.grad.data_ptr() == gradients[name]
    for name, count in counted.items():
        assert statistics[name] == count + 1


def test_capturing_is_no_step(standin):
    """Twelve calls are twelve steps, although the twelfth is captured and replayed."""
    model, step = training_step("unet", CPU, Speedups(cuda_graphs=True), 64, ENCODER)
    batch = noise_tiles(2, 96, CPU.device)
    for _ in range(graphs.WARMUP_STEPS + 1):
        step(batch)
    counted = [v for k, v in model.state_dict().items() if "num_batches" in k]
    assert counted
    assert {int(count) for count in counted} == {graphs.WARMUP_STEPS + 1}


def test_the_schedule_reaches_the_graph(standin):
    model = nn.Conv2d(1, 1, 1, bias=False)
    settings = Speedups(cuda_graphs=True)
    objective = place(model, lambda m, x, y: (m(x) * y).mean(), CPU, settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    # The gradient is always 1, so a step moves the weight by the learning rate.
    rates = [0.5] * (graphs.WARMUP_STEPS + 2) + [0.25, 0.0, 0.125]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rates[min(i, len(rates) - 1)])
    s = session_of(model, optimizer, schedule, settings)
    step = make_step(objective, s)
    ones = torch.ones(2, 1, 4, 4)
    moved = []
    for _ in rates:
        before = model.weight.item()
        step(ones, ones)
        moved.append(before - model.weight.item())
    assert moved == pytest.approx(rates, abs=1e-6)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_code_learns_the_same():
    """With the real compiler; `make test-all` does it with UNet."""
    torch.compiler.reset()

    def losses(settings):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1)
        model = nn.Sequential(*layers)
        objective = place(model, lambda m, x, y: (m(x) - y).square().mean(), CPU, settings)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0)
        step = make_step(objective, session_of(model, optimizer, schedule, settings))
        images, targets = torch.rand(4, 3, 16, 16), torch.rand(4, 1, 16, 16)
        return [step(images, targets).item() for _ in range(4)]

    options = {"channels_last": True, "grad_accum": 2}
    # The headers would be compiled first, for 20 s, and then save a second for each kernel.
    # monkeypatch would leave the option deleted.
    with torch._inductor.config.patch(cpp_cache_precompile_headers=False):
        compiled = losses(Speedups(**options, compile=True))
    expected = losses(Speedups(**options))
    assert compiled == pytest.approx(expected, rel=1e-4)
    assert expected[3] < expected[0]


def test_a_new_shape_is_refused(standin):
    _, step = training_step("unet", CPU, Speedups(cuda_graphs=True), 64, ENCODER)
    step(noise_tiles(4, 96, CPU.device))
    with pytest.raises(UserError, match=r"for float32 \[4, 3, 64, 64\], .* given float32 \[3, "):
        step(noise_tiles(3, 96, CPU.device))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ((torch.ones(3, dtype=torch.float64), (2, None)), r"float64 \[3\], 2, None"),
        ((torch.ones(3), (3, None)), r"float32 \[3\], 3, None"),
        ((torch.ones(3), (2, torch.ones(1))), r"float32 \[3\], 2, float32 \[1\]"),
        ((torch.ones(3), [2, None]), "float32"),
    ],
)
def test_a_new_dtype_constant_or_structure_is_refused(changed, named):
    graph = CpuGraph()
    step = graphs.Graphed(lambda x, more: x * more[0], graph, warmup=1)
    same = torch.ones(3), (2, None)
    for _ in range(3):
        assert step(*same).tolist() == [2, 2, 2]
    with pytest.raises(UserError, match=rf"captured for float32 \[3\], 2, None and .* {named}"):
        step(*changed)
    assert graph.replays == 2


def test_what_syncs_cannot_be_captured(standin):
    step = graphs.Graphed(lambda x: x * x.sum().item(), CpuGraph(), warmup=1)
    step(torch.ones(3))
    with pytest.raises(RuntimeError, match="not permitted"):
        step(torch.ones(3))


def test_an_optimizers_state_moves_between_a_graph_and_a_plain_run(standin):
    def trained(settings, saved=None):
        model = nn.Conv2d(1, 1, 1)
        objective = place(model, lambda m, x, y: (m(x) * y).mean(), CPU, settings)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5)
        step = make_step(objective, session_of(model, optimizer, schedule, settings))
        if saved:
            restore_optimizer(optimizer, saved)
        ones = torch.ones(2, 1, 4, 4)
        for _ in range(graphs.WARMUP_STEPS + 2):
            step(ones, ones)
        return optimizer

    graphed, plain = trained(Speedups(cuda_graphs=True)), trained(Speedups())
    onward = trained(Speedups(), graphed.state_dict()).param_groups[0]
    assert not onward["capturable"]
    assert float(onward["lr"]) == pytest.approx(0.05)
    onward = trained(Speedups(cuda_graphs=True), plain.state_dict()).param_groups[0]
    assert onward["capturable"]
    assert isinstance(onward["lr"], torch.Tensor)


def test_an_optimizers_state_moves_between_layouts():
    """The fused kernel reads memory in order: state in another order would hit wrong weights."""
    torch.manual_seed(0)
    images = torch.randn(2, 4, 8, 8)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
        return model.weight.detach()

    plain = nn.Conv2d(4, 4, 3)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, fused=True)
    step(plain, optimizer)
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    onward = torch.optim.AdamW(other.parameters(), lr=0.1, fused=True)
    restore_optimizer(onward, copy.deepcopy(optimizer.state_dict()))
    torch.testing.assert_close(step(other, onward), step(plain, optimizer))


def test_graphs_end_before_the_process_group(monkeypatch):
    """NCCL waits for graphs, and for the peers of a process that fails alone."""
    ended = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: ended.append("group"))
    monkeypatch.setattr(graphs, "release", lambda: ended.append("graphs"))
    with process_group("cpu"):
        pass
    assert ended == ["graphs", "group"]
    ended.clear()
    with pytest.raises(UserError), process_group("cpu"):
        raise UserError("alone")
    assert ended == ["graphs"]


# --- What is printed ---------------------------------------------------------------------------


def test_a_processor_without_bf16_is_told_what_amp_costs(monkeypatch, capsys):
    monkeypatch.setattr(arguments, "has_native_bf16", lambda device: False)
    parser = arguments.train_parser("")
    settings = arguments.resolve_speedups(parser.parse(["--amp"]), CPU)
    assert settings.amp_dtype == torch.bfloat16
    assert "slower than float32; leave out --amp" in capsys.readouterr().out
    monkeypatch.setattr(arguments, "has_native_bf16", lambda device: True)
    arguments.resolve_speedups(parser.parse(["--amp"]), CPU)
    assert capsys.readouterr().out == ""


def test_a_processor_that_may_not_use_its_bf16_has_none(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    for allowed, native in (("AVX2", False), ("AVX512", True)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=allowed: name)
        assert arguments.has_native_bf16(CPU.device) == native


def test_the_banner_says_what_was_resolved():
    settings = Speedups(torch.bfloat16, True, cuda_graphs=True, compile=True, grad_accum=3)
    banner = settings.banner(Process(0, 2, CPU.device), batch_size=4)
    for words in ("bfloat16", "channels-last", "compiled", "CUDA graph after 11", "world size 2"):
        assert words in banner
    assert "global batch 24 (4 tiles x 2 processes x 3 passes)" in banner
