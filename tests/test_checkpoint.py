"""Checkpoints: whole, plain, checked on load."""

import pytest
import torch
from torture import checkpoints

from common.cli import UserError
from common.io import files
from common.run import checkpoint, checkpoint_file


@pytest.fixture
def content():
    content = {
        "format": 1,
        "model_name": "unet",
        "classes": ["ground", "aircraft"],
        "args": {"encoder": "resnet18", "lr": 1e-3, "resume": None, "betas": (0.9, 0.999)},
        "model": {"w": torch.randn(30, 40), "n": torch.tensor(3), "b": torch.rand(5) > 0.5},
        "bf16": torch.randn(4).bfloat16(),
    }
    return content


def test_round_trip(content, tmp_path):
    path = tmp_path / "a.pth"
    checkpoint_file.write(content, path)
    back = checkpoint.load(path, "unet")
    assert torch.equal(back["model"]["w"], content["model"]["w"])
    assert back["args"] == content["args"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_tied_weights_are_loaded(content, tmp_path):
    """They are stored once: the file has fewer bytes than its tensors."""
    tied = torch.randn(1000)
    names = [f"layer{i}.weight" for i in range(5)]
    made = content | {"model": dict.fromkeys(names, tied)}
    checkpoint_file.write(made, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 5 * tied.nbytes
    loaded = checkpoint.load(tmp_path / "a.pth")["model"]
    assert all(torch.equal(loaded[name], tied) for name in names)


def test_any_flipped_bit_is_noticed(content, tmp_path):
    path = tmp_path / "a.pth"
    checkpoint_file.write(content, path)
    good = path.read_bytes()
    start = good.index(content["model"]["w"].numpy().tobytes())
    for at in range(start, start + 4800, 97):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"checksum|damaged"):
            checkpoint.load(path, "unet")


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04" + b"0" * 100])
def test_what_is_no_checkpoint(data, tmp_path):
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        checkpoint.load(tmp_path / "a.pth")


def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"format": 1, "model": Evil()}, tmp_path / "a.pth")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        checkpoint.load(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


def test_foreign_and_other_models(content, tmp_path):
    torch.save({"model_state_dict": {}}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="was not written by"):
        checkpoint.load(tmp_path / "foreign.pth")
    checkpoint_file.write(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"python unet/inference\.py"):
        checkpoint.load(tmp_path / "a.pth", "fcn")
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "none.pth")


@pytest.mark.parametrize(
    "number", [torch.empty(0), torch.zeros(2), torch.tensor(2), [1], True, None], ids=str
)
def test_a_format_that_is_no_number_is_no_format_of_ours(content, tmp_path, number):
    made = content | {"format": number}
    torch.save(checkpoint_file.sealed(made), tmp_path / "a.pth")
    with pytest.raises(UserError, match="was not written by"):
        checkpoint.load(tmp_path / "a.pth")


def test_a_failed_write_keeps_the_old_file(content, tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    checkpoint_file.write(content, path)
    before = path.read_bytes()

    def full(value, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="is the disk full"):
        checkpoint_file.write(content, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize(
    ("case", "number"),
    [(checkpoints.killed_save, 40), (checkpoints.corrupted, 80), (checkpoints.fuzzed, 120)],
)
def test_a_small_torture(case, number, tmp_path):
    outcomes = {case(i, tmp_path) for i in range(number)}
    assert outcomes - {"without effect"}


def test_a_compressed_archive_is_not_unpacked(content, tmp_path):
    path = tmp_path / "a.pth"
    checkpoint_file.write(content | {"zeros": torch.zeros(10**6)}, path)
    path.write_bytes(checkpoints.deflated(bytearray(path.read_bytes())))
    with pytest.raises(UserError, match="it is compressed"):
        checkpoint.load(path)


def test_the_one_before_is_kept_and_temporaries_are_swept(content, tmp_path):
    path, previous = tmp_path / "checkpoint.pth", tmp_path / "checkpoint.previous.pth"
    for step in range(3):
        checkpoint_file.write(content | {"step": step}, path, previous)
    assert [checkpoint.load(p)["step"] for p in (path, previous)] == [2, 1]
    (tmp_path / ".checkpoint.pth.999999999.tmp").write_bytes(b"half")
    files.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [previous.name, path.name]
