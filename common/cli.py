"""How a script talks to its user: options, errors in one sentence, progress."""

import argparse
import ctypes
import difflib
import errno
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from tqdm import tqdm

# Errors of a full disk, a missing permission or a lost network folder; all others are our bugs.
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
OF_THE_DISK |= {errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENOTDIR}


class UserError(Exception):
    """What was looked for, where, and what to do about it. The user sees it without a traceback."""


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its code; a `UserError` is printed as one sentence, exit code 2.

    An `OSError` with a code in `OF_THE_DISK` is printed in the same way. Ctrl-C ends with 130.
    """
    keep_freed_memory()
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        sys.exit(_complain(f"{error.strerror}: {error.filename or 'while writing'}."))
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped.", file=sys.stderr)
        sys.exit(130)


def keep_freed_memory() -> None:
    """Have glibc reuse the memory of large tensors instead of returning it to the kernel.

    By default every block above 32 MB is mapped again and faulted in page by page. On a CPU a
    forward pass of UNet on 4 x 512 x 512 pixels took 1.5 to 1.8 times as long that way, at the same
    peak memory. Without glibc this function does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
        mallopt(-2, 256 << 20)  # M_TOP_PAD: the heap grows by 256 MB at a time


def _complain(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """argparse with one-sentence errors, `--config`, and the nearest name for a mistyped flag.

    Underscores are accepted for hyphens. Values of `--config FILE.yaml` pass through the same
    checks as the command line, which overrides them.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        argv = [_hyphens(word) for word in (sys.argv[1:] if argv is None else argv)]
        if "--config" in self._option_string_actions:
            peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            peek.add_argument("--config")
            file = peek.parse_known_args(argv)[0].config
            argv = self._from_file(Path(file)) + argv if file else argv
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [word for word in unknown if word.startswith("-")]
            name = (flags or unknown)[0].split("=")[0]
            self.error(f"unknown option {name}; {_nearest(name, self._option_string_actions)}")
        return args

    def _from_file(self, file: Path) -> list[str]:
        try:
            settings = yaml.safe_load(file.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--config {str(file)!r} cannot be read as YAML: {reason}") from None
        if not isinstance(settings or {}, dict):
            raise UserError(f"--config {str(file)!r} must hold lines of the form `epochs: 20`.")
        options: list[str] = []
        for key, value in (settings or {}).items():
            flag = _hyphens(f"--{key}")
            if flag not in self._option_string_actions or flag == "--config":
                raise UserError(f"{str(file)!r}: {self._unknown_key(flag[2:])}")
            action = self._option_string_actions[flag]
            if isinstance(value, bool) and isinstance(action, argparse.BooleanOptionalAction):
                options.append(flag if value else f"--no-{flag[2:]}")
            elif isinstance(value, list):
                options += [flag, *map(str, value)]
            elif value is True and action.nargs in ("?", 0):
                options.append(flag)
            elif value is not None and (value is not False or action.nargs not in ("?", 0)):
                options.append(f"{flag}={value}")  # null is the default, as are `resume: false` …
        return options

    def _unknown_key(self, name: str) -> str:
        """A key is the long name of an option without its hyphens, also of one that has a short."""
        flags = self._option_string_actions
        short = flags.get(f"-{name.lstrip('-')}")
        wanted = max(short.option_strings, key=len)[2:] if short else name
        return f"unknown key {name}; {_nearest(wanted, [f[2:] for f in flags if f[:2] == '--'])}"

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def add_precision(group: argparse._ActionsContainer) -> None:
    """The speed-ups that training and prediction share."""
    add, switch = group.add_argument, argparse.BooleanOptionalAction
    add("--amp", action=switch, default=False, help="mixed precision")
    help = "default: bf16 where the hardware has it, else fp16"
    add("--amp-dtype", choices=("bf16", "fp16"), help=help)
    add("--channels-last", action=switch, default=False, help="NHWC layout")
    add("--compile", action=switch, default=False, help="compile the network with torch.compile")


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "see --help for all of them."


def _hyphens(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default but None and False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def number(
    kind: type[int] | type[float], low: float, high: float | None = None
) -> Callable[[str], float]:
    """An argument type: numbers of `kind` from `low` to `high`, by default 2³¹ - 1 or 1e9.

    Products of two such whole numbers fit 64 bits, as do 1e9 seconds in nanoseconds.
    """
    most = (2**31 - 1 if kind is int else 10**9) if high is None else high

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= most:  # refuses nan, too
            raise argparse.ArgumentTypeError(f"{text.strip()} is not from {low} to {most}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse: "invalid … value"
    return parse


def interval(text: str) -> tuple[str, float]:
    """An argument type: `500` is steps, `10m` is minutes, 0 of either means never."""
    minutes = text.endswith("m")
    value = float(text[:-1]) if minutes else int(text)
    if not 0 <= value < 1e9:
        raise ValueError
    return ("minutes" if minutes else "steps"), value


interval.__name__ = "number of steps (500) or minutes (10m)"  # argparse: "invalid … value"

positive, whole, fraction = number(int, 1), number(int, 0), number(float, 0, 1)
seeds = number(int, 0, 2**63 - 1)  # the global rank is added to it; torch takes 64 bits
processes, loaders = number(int, 1, 1024), number(int, 0, 1024)


class _Lines(tqdm):
    """tqdm for log files: prints a line at most every ten seconds and never moves the cursor."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.spoke = time.monotonic()
        super().__init__(*args, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if time.monotonic() - self.spoke > 10:
            self.spoke = time.monotonic()
            print(msg or str(self), file=sys.stderr, flush=True)

    def clear(self, nolock: bool = False) -> None:
        pass

    def close(self) -> None:
        self.disable = True


def progress(
    items: Iterable | None = None, *, desc: str, enabled: bool = True, **kwargs: Any
) -> tqdm:
    """`tqdm(items)`: a bar on a terminal, lines in a log file."""
    bar = tqdm if sys.stderr.isatty() else _Lines
    return bar(items, desc=desc, disable=not enabled, leave=False, ncols=88, **kwargs)


def say(text: str) -> None:
    """Print a line without breaking the bar."""
    if sys.stderr.isatty():
        tqdm.write(text)
    else:
        print(text, flush=True)
