"""A training over two hosts, started as the README says, and its logs and exit codes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from multinode.hosts import ADDRESSES, Hosts
from torture.children import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


class Job:
    """The run in `output`, one worker on each host, restarted up to ten times."""

    def __init__(self, hosts: Hosts, output: Path, *flags: object, nodes: str = "2") -> None:
        self.hosts, self.output, self.flags, self.nodes = hosts, output, flags, nodes
        self.agents: list[subprocess.Popen | None] = [None, None]
        for host in (0, 1):
            self.start(host)

    def start(self, host: int) -> None:
        """Start the agent of a host: the first time, or after `Hosts.kill`."""
        words = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={self.nodes}"),
            *("--nproc-per-node=1", "--max-restarts=10", "--monitor-interval=0.2"),
            *("--rdzv-backend=c10d", "--rdzv-id=job", f"--rdzv-endpoint={ADDRESSES[0]}:29400"),
            f"--rdzv-conf=is_host={1 - host},join_timeout=60,last_call_timeout=5",
            f"--local-addr={ADDRESSES[host]}",
            *(ROOT / "unet" / "train.py", "--output-dir", self.output, "--resume", "auto"),
            *self.flags,
        ]
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": self.hosts.cards[host],
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        self.agents[host] = self.hosts.start(
            host, list(map(str, words)), self.log(host), environment
        )

    def log(self, host: int) -> Path:
        return self.output.parent / f"host{host}.log"

    def said(self, text: str) -> bool:
        return any(text in self.log(host).read_text(errors="replace") for host in (0, 1))

    def lines(self) -> list[dict[str, float]]:
        """The log of the run, one line for each step and score."""
        path = self.output / "log.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        return [json.loads(row) for row in rows if row.endswith("}")]

    def step(self) -> int:
        return max((int(line["step"]) for line in self.lines()), default=0)

    def wait(self, what: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < end, self.tail()
            time.sleep(0.1)

    def finish(self) -> list[int | None]:
        """Exit codes of the agents once both have ended."""
        self.wait(lambda: all(a is None or a.poll() is not None for a in self.agents))
        return [agent and agent.returncode for agent in self.agents]

    def tail(self) -> str:
        return "\n".join(self.log(host).read_text(errors="replace")[-3000:] for host in (0, 1))
