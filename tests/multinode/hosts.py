"""Two hosts on one machine: network namespaces with a cable between them and no other connection.

Needs root and iproute2. The addresses exist only inside the two namespaces, so nothing that runs
there can reach the machine's own network, or be reached from it.
"""

import itertools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from torture.children import PATIENCE

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_numbers = itertools.count()


def ip(*words: object) -> str:
    command = ["ip", *map(str, words)]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=PATIENCE
    ).stdout


def why_not() -> str | None:
    """Why two hosts cannot be made here; None if they can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "two hosts need root and the ip command"
    name = f"probe{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except subprocess.SubprocessError:
        return "this system does not let root make network namespaces"
    return None


class Hosts:
    """Hosts 0 and 1 for the duration of a block; whatever runs on them ends with it."""

    def __enter__(self) -> "Hosts":
        mark = f"{os.getpid()}-{next(_numbers)}"
        self.names = [f"host{n}-{mark}" for n in (0, 1)]
        self.cards = [f"c{n}-{mark}"[:15] for n in (0, 1)]
        for name in self.names:
            ip("netns", "add", name)
        peer = ("peer", "name", self.cards[1], "netns", self.names[1])
        ip("-n", self.names[0], "link", "add", self.cards[0], "type", "veth", *peer)
        for name, card, address in zip(self.names, self.cards, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", card)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", card, "up")
            # Give up a silent host after two minutes, as in the README, instead of fifteen.
            ip("netns", "exec", name, "sh", "-c", "echo 8 >/proc/sys/net/ipv4/tcp_retries2")
        return self

    def __exit__(self, *_: object) -> None:
        for host, name in enumerate(self.names):
            self.kill(host)
            ip("netns", "del", name)

    def start(
        self, host: int, command: list[str], log: Path, environment: dict[str, str]
    ) -> subprocess.Popen:
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command],
                stdout=file,
                stderr=file,
                env=environment,
                cwd=log.parent,
            )

    def processes(self, host: int, word: str = "") -> list[int]:
        """Ids of the processes on a host that have `word` in their command line."""
        matching = []
        for pid in map(int, ip("netns", "pids", self.names[host]).split()):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if word.encode() in line:
                matching.append(pid)
        return matching

    def kill(self, host: int) -> None:
        """Like a power cut: kill everything on a host at once, without notice to anybody."""
        end = time.monotonic() + PATIENCE
        while pids := self.processes(host):
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            assert time.monotonic() < end
            time.sleep(0.05)

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", self.cards[1], "down")

    def heal(self) -> None:
        ip("-n", self.names[1], "link", "set", self.cards[1], "up")
