"""A step with a non-finite loss or gradient changes nothing and is counted, with any speed-up."""

import copy
import inspect

import pytest
import torch
from helpers.commands import training
from helpers.networks import session_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torture import children

from benchmarks.lib.synthetic import bare_session
from common.args import Speedups
from common.cli import UserError
from common.distributed import Process, process_group
from common.engine import account
from common.run import nonfinite
from common.run.checkpoint import MovingAverage
from common.speedups import make_step, place
from unet import train

DECAY = 0.9
DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
GOOD, BAD = 1.0, float("inf")


class Gain(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor: the loss stays finite."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (factor,) = ctx.saved_tensors
        return gradient * factor, None


def loss_fn(model, images, targets):
    """`targets`: what the images are mapped to [B,1,1,1], and the gradient's factor [B]."""
    wanted, factor = targets
    return (Gain.apply(model(images).float(), factor.max()) - wanted).square().mean()


def trainer(settings, clip=None, process=None, average=True):
    """A session and its step, `(images, factor)` → loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
    process = process or Process(0, 1, torch.device("cpu"))
    objective = place(model, loss_fn, process, settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    s = session_of(model, optimizer, schedule, settings, clip)
    s.process = process
    s.average = MovingAverage(model, DECAY) if average else None
    step = make_step(objective, s)

    def run(images, factor):
        count = len(images)
        return step(images, (torch.ones(count, 1, 1, 1), torch.full((count,), factor))).clone()

    return s, objective, run


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("more", [{}, {"grad_accum": 2}, {"cuda_graphs": True}], ids=str)
def test_a_step_is_counted_and_averaged_if_and_only_if_it_changes_the_weights(
    standin, dtype, clip, more
):
    """The loss is always finite. With fp16 the scaler's first steps overflow by themselves."""
    s, _, step = trainer(Speedups(amp_dtype=DTYPES[dtype], **more), clip)
    tally, counted, skipped = nonfinite.Tally(), [], 0
    for number, images in enumerate(batches(32)):
        factor = BAD if number in (2, 9, 16, 17, 22) else GOOD * 1e4
        before, state = weights(s.model), copy.deepcopy(s.optimizer.state_dict()["state"])
        average = [t.clone() for t in (*s.average.sums.values(), s.average.factors)]
        loss = step(images, factor)
        tally.add(loss, number, torch.arange(4))
        changed = not equal(before, weights(s.model))
        assert bool(loss.isfinite()) == changed
        assert not changed or factor < BAD
        skipped += not changed
        if changed:
            counted.append(weights(s.model))
            continue
        for index, values in state.items():
            now = s.optimizer.state_dict()["state"][index]
            assert all(torch.equal(now[name], value) for name, value in values.items())
        assert equal(average, (*s.average.sums.values(), s.average.factors))
    assert skipped >= 5
    assert len(counted) >= 10
    assert tally.sums[1:3].tolist() == [len(counted), skipped]
    for index, name in enumerate(s.average.sums):
        factors = [DECAY ** (len(counted) - 1 - i) for i in range(len(counted))]
        pairs = zip(factors, counted, strict=True)
        expected = sum(f * w[index].double() for f, w in pairs) / sum(factors)
        found = s.average.averaged(s.model).state_dict()[name].double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_too(dtype):
    torch.compiler.reset()
    s, objective, step = trainer(Speedups(amp_dtype=DTYPES[dtype]))
    objective.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for images in batches(8):
        step(images, GOOD)
    before = weights(s.model)
    assert step(batches(1)[0], BAD).isnan()
    assert equal(before, weights(s.model))
    while step(batches(1)[0], GOOD).isnan():
        pass
    assert not equal(before, weights(s.model))


@pytest.mark.parametrize("dtype", DTYPES)
def test_twenty_in_a_row_end_the_run_and_a_falling_scale_does_not(dtype, capsys):
    s, _, step = trainer(Speedups(amp_dtype=DTYPES[dtype]))
    s.batches = type("Loader", (), {"dataset": type("Set", (), {"images": [{"file_name": "a"}]})})
    for number in range(3 * nonfinite.LIMIT):
        s.tally.add(step(batches(1)[0], BAD), number, torch.zeros(1, dtype=torch.int64))
    before = weights(s.model)
    with pytest.raises(UserError, match=r"not finite for 60 steps in a row, last at step 59"):
        account(s)
    assert equal(before, weights(s.model))


def test_a_loss_scale_that_falls_for_long_ends_no_run(capsys):
    """From 2^120 it takes more than 20 halvings to a scale at which these gradients are finite."""
    s, _, step = trainer(Speedups(amp_dtype=torch.float16))
    s.batches = type("Loader", (), {"dataset": type("Set", (), {"images": [{"file_name": "a"}]})})
    step(batches(1)[0], GOOD)
    s.scaler._scale.fill_(2.0**120)
    s.tally.clear()
    row = 0
    for number in range(130):
        loss = step(batches(1)[0], GOOD)
        s.tally.add(loss, number, torch.zeros(1, dtype=torch.int64))
        row += not loss.isfinite()
        if number % 5 == 4:
            account(s)
    assert row > nonfinite.LIMIT
    assert s.scaler.get_scale() > 1
    assert "they or their gradients were not finite" in capsys.readouterr().out
    assert loss.isfinite()


def unequal_ranks():
    """The gradients of one rank overflow; both skip, and both go on with the same weights."""
    torch.set_num_threads(1)
    with process_group("cpu") as process:
        for dtype in DTYPES.values():
            s, objective, step = trainer(Speedups(amp_dtype=dtype), process=process)
            assert isinstance(objective, DistributedDataParallel)
            for images in batches(12):
                step(images, GOOD)
            before = weights(s.model)
            average = [t.clone() for t in s.average.sums.values()]
            bad = BAD if process.rank == 1 else GOOD
            assert step(batches(1)[0], bad).isnan()
            assert equal(before, weights(s.model))
            assert equal(average, s.average.sums.values())
            while step(batches(1)[0], GOOD).isnan():
                pass
            assert not equal(before, weights(s.model))
            flat = torch.cat([w.flatten() for w in weights(s.model)])
            other = flat.clone()
            torch.distributed.broadcast(other, 1)
            assert torch.equal(flat, other)


def test_all_processes_skip_the_same_steps(tmp_path):
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ends = [children.end(rank) for rank in children.start_ranks(unequal_ranks, logs)]
    assert ends == [0, 0], logs[0].read_text() + logs[1].read_text()


# --- optimizers --------------------------------------------------------------------------------


def optimizers():
    classes = [c for c in vars(torch.optim).values() if inspect.isclass(c)]
    kinds = [c for c in classes if issubclass(c, torch.optim.Optimizer)]
    fused = [c for c in kinds if "fused" in inspect.signature(c).parameters]
    return [(c, {}) for c in kinds] + [(c, {"fused": True}) for c in fused]


@pytest.mark.parametrize(("kind", "options"), optimizers(), ids=str)
@pytest.mark.parametrize("dtype", ["float32", "fp16"])
def test_every_optimizer_keeps_the_promise_or_is_refused(kind, options, dtype):
    if kind is torch.optim.Optimizer:
        options = options | {"defaults": {"lr": 0.1}}
    model = nn.Linear(3, 1, bias=False)  # a matrix, which Muon wants
    settings = Speedups(amp_dtype=DTYPES[dtype])
    process = Process(0, 1, torch.device("cpu"))
    objective = place(model, lambda m, x, y: (m(x).float() * y).square().mean(), process, settings)
    optimizer = kind(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    s = session_of(model, optimizer, schedule, settings)
    if "fused" not in options:
        with pytest.raises(UserError, match=f"{kind.__name__} cannot skip a step.*fused=True"):
            make_step(objective, s)
        return
    step = make_step(objective, s)
    x, ones = torch.randn(4, 3), torch.ones(4, 1)
    for _ in range(3):
        step(x, ones)
    before = weights(model)
    for broken in (torch.inf, torch.nan) * 30:
        assert not step(x, ones * broken).isfinite()
    assert equal(before, weights(model))
    step(x, ones)
    assert not equal(before, weights(model))


def test_a_run_with_fp16_that_never_learns_ends_with_a_sentence(few, tmp_path, monkeypatch):
    train_loss = train.loss_fn

    def overflowing(model, images, targets):
        return Gain.apply(train_loss(model, images, targets), torch.tensor(BAD))

    monkeypatch.setattr(train, "loss_fn", overflowing)
    words = ["--max-steps", 60, "--amp", "--amp-dtype", "fp16", "--print-freq", 7]
    with pytest.raises(UserError, match=r"the loss or its gradient was not finite for 2\d steps"):
        train.main(training(few, tmp_path / "run", *words))


# --- the moving average ------------------------------------------------------------------------


def test_the_average_before_any_step_that_counts_is_the_model():
    s, _, step = trainer(Speedups())
    for images in batches(3):
        assert step(images, BAD).isnan()
    averaged = s.average.averaged(s.model)
    assert equal(weights(averaged), weights(s.model))
    content = {"model": s.model.state_dict(), "ema": s.average.state_dict()}
    from common.run.checkpoint import averaged as of_file

    assert equal(of_file(content).values(), s.model.state_dict().values())


def test_a_saved_average_goes_on_as_if_it_had_not_been_saved():
    """With skipped steps before and after."""

    def outcome(cut):
        s, _, step = trainer(Speedups())
        for number, images in enumerate(batches(9)):
            if number == 5 and cut:
                saved = copy.deepcopy(s.average.state_dict())
                s.average.update(torch.tensor(True))  # something else
                s.average.load_state_dict(saved)
            step(images, BAD if number in (0, 1, 4, 6) else GOOD)
        return s.average.state_dict()

    whole, cut = outcome(False), outcome(True)
    assert torch.equal(whole["factors"], cut["factors"])
    assert equal(whole["sums"].values(), cut["sums"].values())


def test_an_unopened_session_has_an_average_too():
    s = bare_session(Process(0, 1, torch.device("cpu")), Speedups(), ema=DECAY)
    model = nn.Linear(2, 1)
    s.start(model, torch.optim.SGD(model.parameters(), lr=0.1, fused=True))
    assert isinstance(s.average, MovingAverage)
