"""A peer whose beat goes on while its loop hangs, without processes: the test writes its beats.

A peer that is stopped, with processes: `test_resume.py`.
"""

import os
import time

import pytest
import torch.distributed as dist

from common.run import heartbeat

LIMIT = 2.0  # seconds; a busy machine may take one to wake a thread


@pytest.fixture
def heart(monkeypatch):
    """Rank 0 of two at step 9, and the codes with which it would have ended the process."""
    store, ended = dist.HashStore(), []
    monkeypatch.setattr(dist.HashStore, "clone", lambda self: self)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(os, "_exit", ended.append)
    heart = heartbeat._Heart(0, 2, LIMIT, lambda: 9)
    heart.start()
    yield heart, ended
    heart.stop()


def beat(heart, seconds, step_at):
    begin = time.monotonic()
    while (elapsed := time.monotonic() - begin) < seconds:
        heart.store.set("1", f"{elapsed}|{step_at(elapsed)}|there, process 7")
        time.sleep(0.02)


def test_a_peer_that_beats_and_does_not_move_is_named(heart, capsys):
    heart, ended = heart
    beat(heart, 2 * LIMIT, lambda elapsed: 7)
    assert ended[:1] == [2]
    said = capsys.readouterr().err
    assert "rank 1 (there, process 7) has not moved since step 7, and rank 0 waits" in said


def test_a_peer_that_scores_or_is_slow_is_not_stuck(heart):
    heart, ended = heart
    beat(heart, 2 * LIMIT, lambda elapsed: 9)  # at our own step it may take its time
    heart.step = lambda: 999
    beat(heart, 2 * LIMIT, lambda elapsed: 10 + int(20 * elapsed))
    assert ended == []
