"""`--ema`: the average is the right one, and is scored, saved and used for prediction."""

import importlib
import json

import pytest
import torch
from helpers.commands import NETWORKS, training

from benchmarks.lib.standins import THIN, thin_fcn
from common.cli import UserError
from common.run import checkpoint, checkpoint_file
from fcn import model as fcn
from mask import model as mask
from unet import train

DECAY = 0.5


@pytest.fixture
def weights_of(monkeypatch):
    """Train a model with a command line; its weights after each step."""
    monkeypatch.setitem(fcn.BACKBONES, "resnet50", thin_fcn)
    monkeypatch.setattr(mask, "CHANNELS", THIN)

    def train(model, words):
        module = importlib.import_module(f"{model}.train")
        make_step, steps = module.make_step, []

        def watched(objective, s):
            step = make_step(objective, s)

            def watch(*given):
                loss = step(*given)
                steps.append({n: p.detach().clone() for n, p in s.model.named_parameters()})
                return loss

            return watch

        with monkeypatch.context() as patch:
            patch.setattr(module, "make_step", watched)
            module.main(words)
        return steps

    return train


def predicting(path, model):
    """The network with which `inference.py` and `--test-only` predict."""
    from_checkpoint = importlib.import_module(f"{model}.model").from_checkpoint
    return checkpoint.rebuild(checkpoint.load(path, model), from_checkpoint)


def check_average(network, steps, first_factor=1 - DECAY):
    """The weights of `steps`, each counted `DECAY` times less than the next one."""
    factors = [
        DECAY ** (len(steps) - 1 - i) * (1 - DECAY if i else first_factor)
        for i in range(len(steps))
    ]
    for name, weight in network.named_parameters():
        expected = sum(f * step[name].double() for f, step in zip(factors, steps, strict=True))
        expected /= sum(factors)
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(weight, steps[-1][name])


@pytest.mark.parametrize("model", NETWORKS)
def test_the_average_is_scored_saved_and_used(few, tmp_path, weights_of, model):
    out = tmp_path / "run"
    words = ["--max-steps", 3, "--lr", 0.01, "--warmup-steps", 0, "--ema", DECAY]
    steps = weights_of(model, training(few, out, *words, model=model))
    saved = checkpoint.load(out / "model_best.pth")["model"]
    assert all(torch.equal(saved[name], value) for name, value in steps[-1].items())
    check_average(predicting(out / "model_best.pth", model), steps)
    scored = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    train = importlib.import_module(f"{model}.train")
    test = ["--test-only", "val", "--resume", out / "model_best.pth"]
    train.main(training(few, out, *test, model=model))
    scores = json.loads((out / "val_scores.json").read_text())
    assert scores == {name: scored[name] for name in scores}


def test_an_odd_average_is_answered_by_one_sentence(few, trained, tmp_path):
    content = checkpoint.load(trained / "checkpoint.pth")
    name, weight = next(iter(content["model"].items()))
    one = torch.tensor(1.0)
    for number, odd in enumerate(
        [
            "text",
            [1],
            {"sums": 3},
            {"sums": {name: weight}},
            {"sums": {name: 1}, "factors": 0},
            {"sums": {name: weight[:1]}, "factors": one},
            {"sums": {"unknown": weight}, "factors": one},
        ]
    ):
        path = tmp_path / f"{number}.pth"
        checkpoint_file.write(content | {"ema": odd}, path)
        with pytest.raises(UserError):
            predicting(path, "unet")
        with pytest.raises(UserError):
            train.main(training(few, tmp_path / "run", "--init-from", path))


def test_it_may_begin_and_end_in_the_middle_of_a_run(few, tmp_path, weights_of, capsys):
    words = training(few, tmp_path / "run", "--lr", 0.01, "--eval-steps", 2, "--max-steps")
    (*_, last) = weights_of("unet", [*words, "2"])
    steps = weights_of("unet", [*words, "4", "--resume", "--ema", str(DECAY)])
    assert "ema was None and is 0.5" in capsys.readouterr().out
    check_average(predicting(tmp_path / "run/checkpoint.pth", "unet"), [last, *steps], 1)
    (*_, last) = weights_of("unet", [*words, "6", "--resume"])
    network = predicting(tmp_path / "run/checkpoint.pth", "unet")
    assert all(torch.equal(weight, last[name]) for name, weight in network.named_parameters())
