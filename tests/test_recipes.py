"""The recipes of CONTRIBUTING.md, followed word by word in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import PATIENCE, ROOT


def edit(path: Path, *changes: tuple[str, str]) -> None:
    """Replace the first occurrence of each text, which must be there."""
    text = path.read_text()
    for old, new in changes:
        assert old in text, (path, old)
        text = text.replace(old, new, 1)
    path.write_text(text)


def another_loss(root: Path) -> None:
    loss = '''
def focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Cross-entropy weighted by (1 - p)^gamma (Lin et al. 2017): the mean over images.

    Args:
        logits: [B,C,H,W].
        target: int64 [B,H,W], `IGNORE` where a pixel does not count.
    """
    entropy = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="none")
    counts = (target != IGNORE).sum((1, 2)).clamp(min=1)
    weighted = (1 - torch.exp(-entropy)) ** gamma * entropy
    return (weighted.sum((1, 2)) / counts).mean()

'''
    edit(root / "common/semantic.py", ("\ndef likeliest", f"{loss}\ndef likeliest"))
    edit(
        root / "unet/model.py",
        ("likeliest, segmentation_loss, softmax", "focal_loss, likeliest, softmax"),
        ("segmentation_loss(model", "focal_loss(model"),
    )


def another_score(root: Path) -> None:
    edit(
        root / "common/semantic.py",
        (
            '"mDice": dice[present].mean().item(),\n',
            '"mDice": dice[present].mean().item(),\n'
            '        "worst_IoU": iou[present].min().item(),\n',
        ),
    )


def another_optimizer(root: Path) -> None:
    edit(
        root / "unet/train.py",
        (
            "torch.optim.AdamW(\n            groups, lr=args.lr, weight_decay=args.weight_decay,",
            "torch.optim.SGD(\n            groups, lr=args.lr, momentum=0.9, nesterov=True,",
        ),
    )


def another_augmentation(root: Path) -> None:
    """Grey images, for a tenth of the tiles."""
    edit(
        root / "common/augment.py",
        (
            "        images = _light(images, u[:, 6:])\n",
            "        grey = images.float().mean(3, keepdim=True)\n"
            "        images = torch.where(u[:, 14, None, None, None] < 0.1, grey, images)\n"
            "        images = _light(images, u[:, 6:])\n",
        ),
    )
    edit(
        root / "tests/test_augment.py",
        (
            "    gain = ",
            '    if mode == "light" and u[14] < 0.1:\n'
            "        view = view.mean(2, keepdims=True)\n"
            "    gain = ",
        ),
    )


def a_technique(root: Path) -> None:
    """Gradients without their mean."""
    edit(
        root / "common/args.py",
        (
            "    return parser\n\n\ndef check(",
            '    help = "gradients of zero mean (Yong et al. 2020)"\n'
            '    group.add_argument("--centralize", action=switch, default=False, help=help)\n'
            "    return parser\n\n\ndef check(",
        ),
        ("    grad_accum: int = 1\n", "    grad_accum: int = 1\n    centralize: bool = False\n"),
        (
            "    return Speedups(dtype, args.channels_last, args.cuda_graphs, args.compile, ",
            '    centralize = vars(args).get("centralize", False)\n'
            "    return Speedups(dtype, args.channels_last, args.cuda_graphs, args.compile, "
            "centralize=centralize, grad_accum=",
        ),
    )
    edit(
        root / "common/speedups.py",
        (
            '        s.clock.mark("optimizer")\n',
            '        s.clock.mark("optimizer")\n'
            "        for p in parameters if s.speedups.centralize else []:\n"
            "            if p.grad is not None and p.ndim > 1:\n"
            "                p.grad -= p.grad.mean(tuple(range(1, p.ndim)), keepdim=True)\n",
        ),
    )
    edit(
        root / "common/README.md",
        ("| `--channels-last` |", "| `--centralize` | off | centred |\n| `--channels-last` |"),
    )
    edit(
        root / "common/run/README.md",
        ("`--channels-last`, `--compile`", "`--channels-last`, `--centralize`, `--compile`"),
    )
    edit(
        root / "tests/test_decided.py",
        ('    "--channels-last": "",\n', '    "--channels-last": "",\n    "--centralize": "",\n'),
    )
    edit(
        root / "benchmarks/lib/techniques.py",
        (
            '"compile": "--compile",\n',
            '"compile": "--compile",\n    "centralize": "--centralize",\n',
        ),
    )
    edit(
        root / "tests/test_techniques.py",
        ('    "EMA": ([', '    "centralized": (["--centralize"], 0.5),\n    "EMA": (['),
    )


OF_THE_WIDTH = r"DECODER|WIDEST|decoder_channels|default width|import (Sequence|positive)$"


def a_fifth_model(root: Path) -> None:
    """SegFormer, whose randomness is DropPath."""
    folder = root / "segformer"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name in ("model.py", "train.py", "inference.py", "export.py", "README.md"):
        text = (root / "unet" / name).read_text()
        for old, new in (("unet", "segformer"), ("UNet", "SegFormer"), ("a UNet", "a SegFormer")):
            text = text.replace(old, new)
        (folder / name).write_text(text)
    text = (folder / "model.py").read_text().replace("smp.Unet", "smp.Segformer")
    text = text.replace(', args["norm"], width)', ', args["norm"])')
    text = text.replace("decoder_channels=decoder_channels, ", "")
    # Every other line that names its width, and what is made of several lines.
    text = re.sub(r"    fine = .*?numbers from 1 to .*?\n", "", text, flags=re.DOTALL)
    lines = (line for line in text.splitlines() if not re.search(OF_THE_WIDTH, line))
    (folder / "model.py").write_text("\n".join(lines) + "\n")
    text = (folder / "train.py").read_text().replace("import DECODER, ", "import ")
    text = text.replace(", args.decoder_channels\n", "\n")
    lines = (line for line in text.splitlines() if not re.search(OF_THE_WIDTH, line))
    (folder / "train.py").write_text("\n".join(lines) + "\n")
    edit(
        root / "benchmarks/lib/models.py",
        (
            '        Model(\n            "mask"',
            '        Model("segformer", "SegFormer", "--encoder", "mit_b1", "mit_b0"),\n'
            '        Model(\n            "mask"',
        ),
    )
    edit(root / "pyproject.toml", ('"unet", "mask"', '"unet", "segformer", "mask"'))


RECIPES = [
    *(another_loss, another_score, another_optimizer, another_augmentation),
    *(a_technique, a_fifth_model),
]


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the repository, in which all recipes have been followed."""
    root = tmp_path_factory.mktemp("recipes")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("the files of the repository are listed by git")
    for name in listed.stdout.splitlines():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for recipe in RECIPES:
        recipe(root)
    run(root, "benchmarks/table.py")
    return root


def run(root: Path, *words: str) -> None:
    # A change of one's own may exceed the budget of lines, which CI wants to be kept.
    environment = {k: v for k, v in os.environ.items() if k != "EXACT_BUDGET"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_structure_and_the_pages_are_still_checked(changed):
    """Budget, directions, the options in the README, the tables, and the types."""
    tests = [
        "test_house.py",
        "test_cli.py",
        "test_augment.py",
        "test_metrics.py",
        "test_numbers.py",
        "test_decided.py",
    ]
    words = [
        "house or readme or augment or metrics or refused or reasoned or front or planned "
        "or decided"
    ]
    files = [f"tests/{name}" for name in (*tests, "test_techniques.py", "test_run.py")]
    run(changed, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", *words)
    run(changed, "-m", "mypy")


@pytest.mark.long
@pytest.mark.parametrize("what", ["SegFormer", "centralized", "UNet"])
def test_every_technique_trains_the_changed_models(changed, what):
    words = ["tests/test_techniques.py", "-k", what]
    run(changed, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words)
