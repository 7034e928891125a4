"""slurm.sh with stand-ins for SLURM's commands and for torchrun, which are not here."""

import os
import signal
import subprocess

from helpers.commands import PATIENCE, ROOT, wait_for

STANDINS = {
    "scontrol": 'echo "$@" >> calls; test "$1" = requeue || printf "node7\\nnode8\\n"',
    "srun": 'exec "$@"',
    "torchrun": 'env > environment; printf "%s\\n" "$@" > words; trap "sleep 0.3; '
    'echo saved > done; exit 1" TERM; while [ ! -e finish ]; do sleep 0.05; done',
}


def start(folder):
    for name, text in STANDINS.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        **{"SLURM_JOB_ID": "12", "SLURM_NNODES": "2", "SLURM_NODEID": "1"},
        **{
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_CPUS_PER_TASK": "32",
            "SLURMD_NODENAME": "node8",
            "SLURM_JOB_NODELIST": "node[7-8]",
        },
    }
    script = ["sh", ROOT / "slurm.sh", "unet/train.py", "--output-dir", "my runs"]
    process = subprocess.Popen(script, cwd=folder, env=environment)
    words = folder / "words"
    wait_for(lambda: words.exists() and words.read_text())
    return process


def test_every_node_is_told_who_it_is(tmp_path):
    process = start(tmp_path)
    (tmp_path / "finish").touch()
    assert process.wait(PATIENCE) == 0
    words = (tmp_path / "words").read_text().splitlines()
    assert "--nnodes=2" in words
    assert "--nproc-per-node=4" in words
    assert "--rdzv-endpoint=node7:29400" in words
    assert "--local-addr=node8" in words
    assert any(word.startswith("--rdzv-conf=is_host=0") for word in words)
    assert words[-5:] == ["unet/train.py", "--output-dir", "my runs", "--resume", "auto"]
    environment = (tmp_path / "environment").read_text().splitlines()
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in environment
    assert "SRUN_CPUS_PER_TASK=32" in environment
    assert "requeue" not in (tmp_path / "calls").read_text()


def test_before_its_time_is_over_a_job_saves_and_is_queued_again(tmp_path):
    process = start(tmp_path)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE) == 1
    assert (tmp_path / "done").read_text() == "saved\n"
    assert "requeue 12" in (tmp_path / "calls").read_text()
