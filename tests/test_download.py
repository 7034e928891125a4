"""rareplanes/download.py against a local S3 server that can be told to fail."""

import errno
import functools
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from helpers.commands import PATIENCE, ROOT, wait_for
from helpers.s3 import AIRPORTS, MODIFIED, FakeS3, fill, keys_of

from common.cli import UserError
from common.io import files
from common.io.files import temporary_name
from rareplanes import bucket
from rareplanes.bucket import Bucket, RemoteScene
from rareplanes.download import choose, fetch_all, main, parse_args

SCRIPT = ROOT / "rareplanes" / "download.py"


@pytest.fixture(scope="module")
def server():
    server = FakeS3()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


make_client = functools.cache(bucket.make_client)  # boto needs half a second to make one


@pytest.fixture
def s3(server, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(bucket, "BACKOFF_S", 0.02)
    monkeypatch.setattr(bucket, "BACKOFF_CAP_S", 0.3)
    monkeypatch.setattr(bucket, "BOTO_ATTEMPTS", 1)
    monkeypatch.setattr(bucket, "TIMEOUT_S", 15.0)
    monkeypatch.setattr(bucket, "make_client", make_client)
    server.reset()
    fill(server)
    return server


def download(s3, out, *flags):
    return main(["-o", str(out), "--endpoint-url", s3.url, "-j", "4", *flags])


def tree(out):
    """Path below `out` → content."""
    return {str(p.relative_to(out)): p.read_bytes() for p in Path(out).rglob("*") if p.is_file()}


def expected(s3):
    return {k.removeprefix("synthetic/"): v for k, v in s3.objects.items()}


def temporaries(out):
    return list(Path(out).rglob(".*"))


# What is downloaded


def test_everything_comes_byte_for_byte_over_many_pages(s3, tmp_path):
    assert download(s3, tmp_path / "data", "--all") == 0
    assert tree(tmp_path / "data") == expected(s3)
    assert len(tree(tmp_path / "data")) == 2 * 4 * 3 * 3 > s3.page_size


def test_the_second_run_transfers_no_object_byte(s3, tmp_path):
    download(s3, tmp_path, "--all")
    sent = s3.object_bytes
    assert sent == sum(map(len, s3.objects.values()))
    assert download(s3, tmp_path, "--all") == 0
    assert s3.object_bytes == sent


def test_files_of_another_time_are_known_by_their_content(s3, tmp_path, capsys):
    """As after a copy; the third run need not read them again."""
    download(s3, tmp_path, "--all")
    sent = s3.object_bytes
    for path in tmp_path.rglob("*.*"):
        os.utime(path)
    assert download(s3, tmp_path, "--all") == 0
    assert s3.object_bytes == sent
    assert "0 files (0.0 MB) fetched, 72 were in" in capsys.readouterr().out
    assert {path.stat().st_mtime for path in tmp_path.rglob("*.*")} == {MODIFIED.timestamp()}


def test_a_smaller_choice_removes_nothing(s3, tmp_path):
    for limit in ("2", "4", "1"):
        download(s3, tmp_path, "-n", limit)
    assert len(tree(tmp_path)) == 2 * 4 * 3
    assert tree(tmp_path).items() <= expected(s3).items()


def test_dry_run_tells_and_writes_nothing(s3, tmp_path, capsys):
    out = tmp_path / "data"
    assert download(s3, out, "-n", "8", "--dry-run") == 0
    assert list(tmp_path.iterdir()) == []
    assert s3.object_bytes == 0
    told = capsys.readouterr().out
    for airport in AIRPORTS:
        assert re.search(rf"^{airport} +2 +2$", told, re.MULTILINE)
    assert download(s3, out, "-n", "8") == 0
    size = sum(map(len, tree(out).values()))
    assert f"16 scenes, 48 files, {size / 1e6:.1f} MB" in told


@pytest.mark.parametrize("flag", ["-s", "--split", "--data-split"])
def test_one_split_and_some_airports(s3, tmp_path, flag):
    assert download(s3, tmp_path, "-a", flag, "test", "--airports", "Hong_Kong", "Basel") == 0
    assert set(tree(tmp_path)) == {
        path
        for path in expected(s3)
        if path.startswith("test/") and ("Basel" in path or "Hong_Kong" in path)
    }


def test_the_real_half_comes_whole_into_a_folder_of_its_own(s3, tmp_path, capsys):
    """Scenes and labels by split; a scene without labels and tiles of others are not fetched."""
    rng, wanted = random.Random(0), {}
    for split in ("train", "test"):
        for stem in ("7_104001000896F900", "45_10400100202A2200", "45_1040010041354E00"):
            for part, ending in bucket.REAL.parts.items():
                wanted[f"real/{split}/{part}/{stem}{ending}"] = rng.randbytes(500)
    s3.objects |= wanted
    s3.objects["real/train/PS-RGB_cog/8_1040010041354E00.tif"] = b"without labels"
    s3.objects["real/train/PS-RGB_tiled/7_104001000896F900_tile_1.png"] = b"a tile"
    assert download(s3, tmp_path / "data", "--real", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "6 scenes, 12 files, 0.0 MB" in said
    assert re.search(r"^location +train +test\n7 +1 +1\n45 +2 +2$", said, re.MULTILINE)
    assert not (tmp_path / "data").exists()
    assert download(s3, tmp_path / "data", "--real") == 0
    assert tree(tmp_path / "data") == wanted
    sent = s3.object_bytes
    assert download(s3, tmp_path / "data", "--real", "-n", "1", "-s", "train") == 0
    assert s3.object_bytes == sent


# Which scenes are chosen


def scene(airport, n):
    return RemoteScene("train", f"{airport}_Airport_0_0_{n}", ())


def test_the_choice_is_even_nested_and_a_matter_of_seed_and_names_alone():
    scenes = [scene(a, n) for a in AIRPORTS for n in range(50)]
    for seed in range(5):
        order = choose(scenes, None, seed)
        assert sorted(s.stem for s in order) == sorted(s.stem for s in scenes)
        for limit in range(1, 201):
            chosen = choose(scenes, limit, seed) if limit % 40 == 1 else order[:limit]
            assert chosen == order[:limit]
            counts = Counter(s.location for s in chosen)
            assert max(counts.values()) - min(counts[a] for a in AIRPORTS) <= 1
        shuffled = random.Random(seed).sample(scenes, len(scenes))
        assert choose(shuffled, 40, seed) == order[:40]
    assert choose(scenes, 40, 0) != choose(scenes, 40, 1)
    first_keys = {
        s.stem for a in AIRPORTS for s in scenes if s.location == a and s.stem[-2:] == "_0"
    }
    assert {s.stem for s in choose(scenes, 4, 0)} != first_keys


def test_small_airports_give_all_they_have_and_the_others_fill_up():
    scenes = [scene("Atlanta", 1)] + [scene("Basel", n) for n in range(9)]
    assert Counter(s.location for s in choose(scenes, 6, 0)) == {"Atlanta": 1, "Basel": 5}


# Faults


@pytest.mark.parametrize(
    "fault", ["503", "500", "short", "reset", "stall", "flip", "long", "nonsense"]
)
def test_one_fault_after_another_leaves_a_right_tree(s3, tmp_path, fault, monkeypatch, capsys):
    s3.faults = {key: [fault] * (1 if fault == "stall" else 3) for key in list(s3.objects)[4::7]}
    if fault == "stall":
        monkeypatch.setattr(bucket, "TIMEOUT_S", 1.0)
        monkeypatch.setattr(bucket, "make_client", make_client.__wrapped__)  # with this timeout
    assert download(s3, tmp_path, "--all", "-j", "8") == 0
    assert not any(s3.faults.values())
    assert tree(tmp_path) == expected(s3)
    assert temporaries(tmp_path) == []
    assert "trying again" in capsys.readouterr().err


def test_a_storm_of_503_in_listing_and_transfer_is_sat_out(s3, tmp_path):
    s3.storm_until = time.monotonic() + 1.0

    def storm_again(*args):
        s3.storm_until = time.monotonic() + 1.0
        return fetch_all(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rareplanes.download.fetch_all", storm_again)
        assert download(s3, tmp_path, "--all", "--retries", "12") == 0
    assert tree(tmp_path) == expected(s3)


def test_default_retries_outlast_a_storm_of_30_seconds(monkeypatch):
    """Even if every random wait has its shortest length."""
    waits = []
    monkeypatch.setattr(random, "uniform", lambda low, high: low)

    def fails():
        raise bucket.DamagedError("no")

    with Bucket(None, 1, parse_args(["-a"]).retries) as remote:
        monkeypatch.setattr(remote.stop, "wait", waits.append)
        with pytest.raises(bucket.DamagedError):
            remote.persist(fails)
    assert len(waits) == 8
    assert sum(waits) > 30


def test_what_stays_broken_is_named_and_the_rest_comes(s3, tmp_path, capsys):
    bad = list(s3.objects)[4]  # a mask
    s3.faults[bad] = ["flip"] * 99
    assert download(s3, tmp_path, "--all", "--retries", "2") == 1
    error = capsys.readouterr().err
    assert "failed: train/masks/Atlanta_Airport_0_0_1_mask.png (DamagedError: MD5" in error
    assert "1 files could not be fetched" in error
    wanted = expected(s3)
    del wanted[bad.removeprefix("synthetic/")]
    assert tree(tmp_path) == wanted
    s3.faults.clear()
    sent = s3.object_bytes
    assert download(s3, tmp_path, "--all") == 0
    assert s3.object_bytes - sent == len(s3.objects[bad])


def test_an_object_gone_or_changed_since_the_listing_is_not_retried(
    s3, tmp_path, monkeypatch, capsys
):
    gone, _, _, changed, *_ = s3.objects
    real = Bucket.list_scenes

    def list_then_change(*args):
        scenes = real(*args)
        del s3.objects[gone]
        s3.objects[changed] = s3.objects[changed][::-1]
        return scenes

    monkeypatch.setattr(Bucket, "list_scenes", list_then_change)
    assert download(s3, tmp_path, "--all") == 1
    tries = Counter(unquote(urlsplit(path).path) for path, _ in s3.log)
    assert tries[f"/rareplanes-public/{gone}"] == tries[f"/rareplanes-public/{changed}"] == 1
    error = capsys.readouterr().err
    assert "NoSuchKey" in error
    assert "PreconditionFailed" in error
    assert "no\\u202eon" in error  # the server's text, escaped
    assert "\u202e" not in error


def test_a_bucket_that_is_gone_for_good_ends_the_run(s3, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rareplanes.download.GIVE_UP_AFTER", 6)
    s3.faults = {key: ["503"] * 99 for key in s3.objects}
    assert download(s3, tmp_path, "--all", "--retries", "0") == 1
    assert "stopped early" in capsys.readouterr().err
    assert len(s3.log) < len(s3.objects)
    assert tree(tmp_path) == {}


# Uploads in parts, whose ETag is not the MD5 of the content


def in_parts(s3):
    s3.etags = {key: f"{hashlib.md5(body).hexdigest()}-3" for key, body in s3.objects.items()}


def test_uploads_in_parts_are_checked_by_the_checksum_of_the_bucket(s3, tmp_path):
    in_parts(s3)
    s3.sends_checksums = True
    s3.faults = {key: ["flip"] for key in list(s3.objects)[::5]}
    assert download(s3, tmp_path, "--all") == 0
    assert not any(s3.faults.values())
    assert tree(tmp_path) == expected(s3)


def test_uploads_in_parts_are_known_by_their_size_and_time(s3, tmp_path):
    in_parts(s3)
    s3.faults = {key: ["short"] for key in list(s3.objects)[::5]}
    assert download(s3, tmp_path, "--all") == 0
    assert tree(tmp_path) == expected(s3)
    sent, victim = s3.object_bytes, min(tmp_path.rglob("*.xml"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    assert download(s3, tmp_path, "--all") == 0
    assert tree(tmp_path) == expected(s3)
    assert s3.object_bytes - sent == victim.stat().st_size
    # Nothing says that their content is right, so to verify them is to download them.
    assert download(s3, tmp_path, "--all", "--verify") == 0
    assert s3.object_bytes - sent == victim.stat().st_size + sum(map(len, s3.objects.values()))


# What was downloaded before


def test_changed_files_come_again_and_only_those(s3, tmp_path):
    download(s3, tmp_path, "--all")
    first, second, third, *_ = sorted(tmp_path.rglob("*.png"))
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    os.utime(second, ns=(0, 0))
    os.utime(third, ns=(0, 0))  # touched, not changed
    sent, size = s3.object_bytes, first.stat().st_size + 1 + second.stat().st_size
    assert download(s3, tmp_path, "--all") == 0
    assert s3.object_bytes - sent == size
    assert tree(tmp_path) == expected(s3)


def test_verify_finds_rot_that_left_size_and_time_alone(s3, tmp_path):
    download(s3, tmp_path, "--all")
    victim = min(tmp_path.rglob("*.xml"))
    times = victim.stat()
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert download(s3, tmp_path, "--all") == 0
    assert tree(tmp_path) != expected(s3)
    s3.faults[f"synthetic/{victim.relative_to(tmp_path)}"] = ["503"]
    assert download(s3, tmp_path, "--all", "--verify", "--retries", "0") == 1
    sent = s3.object_bytes
    assert download(s3, tmp_path, "--all") == 0  # what was found is not forgotten
    assert tree(tmp_path) == expected(s3)
    assert s3.object_bytes - sent == victim.stat().st_size


def test_an_object_that_changed_in_the_bucket_comes_again(s3, tmp_path, monkeypatch):
    download(s3, tmp_path, "--all")
    sent, changed = s3.object_bytes, min(s3.objects)
    s3.objects[changed] = s3.objects[changed][::-1]
    monkeypatch.setattr("helpers.s3.MODIFIED", MODIFIED.replace(year=2021))
    assert download(s3, tmp_path, "--all") == 0
    assert tree(tmp_path) == expected(s3)
    assert s3.object_bytes - sent == len(s3.objects[changed])


def test_temporaries_of_dead_runs_go_and_those_of_living_ones_stay(s3, tmp_path):
    images = tmp_path / "train" / "images"
    images.mkdir(parents=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid in (dead.pid, os.getpid(), os.getppid()):
        (images / f".x.png.{pid}.tmp").write_text("half")
    (images / ".mine.tmp").write_text("a user's")
    download(s3, tmp_path, "--all")
    left = {path.name for path in temporaries(tmp_path)}
    assert left == {f".x.png.{os.getppid()}.tmp", ".mine.tmp"}


# Interruptions


@pytest.fixture
def slow(s3):
    s3.chunk_delay = 0.02
    return s3


def start(s3, out, *flags):
    command = [sys.executable, SCRIPT, "-o", out, "--endpoint-url", s3.url, "-a", "-j", "4", *flags]
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # When the tests run in the background, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_bytes(s3, process, count):
    goal = s3.object_bytes + count
    wait_for(lambda: s3.object_bytes >= goal or process.poll() is not None)
    assert process.poll() is None


def test_kill_9_leaves_no_half_file_and_the_next_run_ends_as_a_clean_one(slow, tmp_path):
    half_written = 0
    for count in (20_000, 70_000, 45_000):
        process = start(slow, tmp_path / "data")
        wait_for_bytes(slow, process, count)
        process.kill()
        process.communicate()
        names = {p.name for p in temporaries(tmp_path)}
        half_written += len(names)
        wanted = expected(slow)
        for path, content in tree(tmp_path / "data").items():
            assert Path(path).name in names or content == wanted[path]
    assert half_written
    slow.chunk_delay = 0
    whole = {path for path in tree(tmp_path / "data") if not path.endswith(".tmp")}
    slow.log.clear()
    assert download(slow, tmp_path / "data", "--all") == 0
    assert tree(tmp_path / "data") == expected(slow)
    asked_for = {unquote(path).partition("/synthetic/")[2] for path, _ in slow.log} - {""}
    assert asked_for == set(expected(slow)) - whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_kill_end_tidily(slow, tmp_path, number):
    for key in keys_of("train", "Basel_Airport_0_0_1"):
        slow.objects[key] = b"x" * 10_000_000  # takes 50 s; the test does not wait for it
    process = start(slow, tmp_path)
    wait_for_bytes(slow, process, 120_000)
    process.send_signal(number)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "the same command continues" in error
    assert "Traceback" not in error
    assert temporaries(tmp_path) == []
    there, wanted = tree(tmp_path), expected(slow)
    assert 0 < len(there) < len(wanted)
    assert all(content == wanted[path] for path, content in there.items())


def test_a_full_disk_ends_the_run_and_keeps_what_is_there(s3, tmp_path, monkeypatch):
    download(s3, tmp_path, "-n", "1")
    before = tree(tmp_path)
    real, calls = files.fresh_file, []

    def full(path):
        calls.append(path)
        if len(calls) > 10:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path)

    monkeypatch.setattr(files, "fresh_file", full)
    with pytest.raises(OSError, match="No space left"):
        download(s3, tmp_path, "--all")
    after, wanted = tree(tmp_path), expected(s3)
    assert before.items() <= after.items() <= wanted.items()
    assert temporaries(tmp_path) == []


# No key leads out of the folder


STEM = "Atlanta_Airport_0_0_1"
HOSTILE = [
    "../../../evil.png",
    f"../../../../{STEM}.png",
    f"../images2/{STEM}.png",
    f"/etc/{STEM}.png",
    f"..\\..\\{STEM}.png",
    f"C:\\{STEM}.png",
    f"a/{STEM}.png",
    f"a/../../b/{STEM}.png",
    f"..%2f{STEM}.png",
    f"{STEM}\n.png",
    f"{STEM}.png\n",
    f"\x1b[31m{STEM}.png",
    f"{STEM}\x00.png",
    f"{STEM}.png/",
    f"{STEM}.png.aux.xml",
    f"{STEM}.PNG",
    f".{STEM}.png",
    f"-o_{STEM}.png",
    f"{STEM}\u202e.png",
    f"Zu\u0308rich_{STEM}.png",
    f"{'A' * 300}_{STEM}.png",
    "_Airport_.png",
    "Thumbs.db",
    ".png",
    "..",
]


def test_hostile_keys_are_refused_counted_and_shown_harmlessly(s3, tmp_path, capsys):
    wanted = expected(s3)
    for name in HOSTILE:
        s3.objects[f"synthetic/train/images/{name}"] = b"evil" * 50
        s3.objects[f"synthetic/train/masks/{name.replace('.png', '_mask.png')}"] = b"evil" * 50
        s3.objects[f"synthetic/train/xmls/{name.replace('.png', '.xml')}"] = b"evil" * 50
    s3.objects["synthetic/train/images/"] = b""  # a folder made in the console: not an error
    out = tmp_path / "a" / "b" / "data"
    assert download(s3, out, "--all") == 0
    assert tree(tmp_path) == {f"a/b/data/{path}": content for path, content in wanted.items()}
    told = capsys.readouterr().out
    count = len(s3.objects) - len(wanted) - 1
    assert f"skipped {count} incomplete scenes and other keys" in told
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", told)


def test_listings_that_lie_are_answered_in_a_sentence(s3, tmp_path, capsys):
    image, mask, xml = keys_of("train", "Basel_Airport_0_0_1")
    s3.sizes = {image: "-5", mask: str(10**18)}
    assert download(s3, tmp_path, "--all") == 0
    assert "train/Basel_Airport_0_0_1 (without images, masks)" in capsys.readouterr().out
    for s3.sizes, s3.extra in (({xml: "many"}, ""), ({}, "<Contents><Size>7</Size></Contents>")):
        with pytest.raises(UserError, match=r"cannot list .*(ValueError|KeyError)"):
            download(s3, tmp_path, "--all", "--retries", "1")


def test_a_listing_without_end_is_left(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket, "MAX_KEYS", 10)
    with pytest.raises(UserError, match=r"cannot list .*more than 10 keys"):
        download(s3, tmp_path, "--all")


def test_scenes_without_all_three_keys_are_left_and_named(s3, tmp_path, capsys):
    del s3.objects[keys_of("train", "Basel_Airport_0_0_1")[1]]
    del s3.objects[keys_of("test", "Chicago_Airport_0_0_2")[0]]
    del s3.objects[keys_of("test", "Chicago_Airport_0_0_2")[2]]
    assert download(s3, tmp_path, "--all") == 0
    told = capsys.readouterr().out
    assert "skipped 2 incomplete scenes" in told
    assert "train/Basel_Airport_0_0_1 (without masks)" in told
    assert "test/Chicago_Airport_0_0_2 (without images, xmls)" in told
    assert len(tree(tmp_path)) == 3 * (24 - 2)


def test_links_are_not_followed(s3, tmp_path):
    outside, data = tmp_path / "outside", tmp_path / "data"
    outside.mkdir()
    (outside / "canary").write_text("alive")
    (data / "train").mkdir(parents=True)
    (data / "train" / "images").symlink_to(outside)
    with pytest.raises(
        UserError, match=r"train/images' is not a folder, or is a link that leads out"
    ):
        download(s3, data, "--all")
    assert tree(outside) == {"canary": b"alive"}

    (data / "train" / "images").unlink()
    (data / "train" / "images").mkdir()
    final = data / "train" / "images" / "Basel_Airport_0_0_0.png"
    final.symlink_to(outside / "canary")
    temporary_name(final).symlink_to(outside / "canary")
    assert download(s3, data, "--all") == 0
    assert tree(outside) == {"canary": b"alive"}
    assert not final.is_symlink()
    assert tree(data) == expected(s3)


# No credentials


def test_keys_in_the_environment_are_sent_to_nobody_and_written_nowhere(
    s3, tmp_path, monkeypatch, capsys
):
    config = tmp_path / "config"
    config.write_text("not [an ini file")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "CANARY",
        "AWS_SECRET_ACCESS_KEY": "CANARY",
        "AWS_SESSION_TOKEN": "CANARY",
        "AWS_PROFILE": "no-such-profile",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "AWS_CONFIG_FILE": str(config),
        "AWS_SHARED_CREDENTIALS_FILE": str(config),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bucket, "make_client", make_client.__wrapped__)  # with these variables
    assert download(s3, tmp_path / "data", "-n", "2") == 0
    public = bucket.make_client(None, 4)
    assert public.meta.endpoint_url == "https://s3.us-west-2.amazonaws.com"
    assert len(s3.log) > 12
    for path, headers in s3.log:
        assert "authorization" not in {name.lower() for name in headers}
        assert not re.search("CANARY|Signature|Credential", f"{path} {headers}", re.IGNORECASE)
    printed = capsys.readouterr()
    assert "CANARY" not in printed.out + printed.err
    assert not any(b"CANARY" in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_the_largest_numbers_download(s3, tmp_path, monkeypatch):
    """Also the last of 1,000 retries has a delay."""
    words = ["-n", 2**31 - 1, "-j", 1024, "--seed", 2**63 - 1, "--retries", 1000]
    failing = iter(range(1000))

    def fails_at_first():
        if next(failing, None) is not None:
            raise bucket.DamagedError("cut short")

    monkeypatch.setattr(bucket, "BACKOFF_CAP_S", 0.0)
    with Bucket(s3.url, 4, 1000) as remote:
        remote.persist(fails_at_first)
    assert download(s3, tmp_path / "data", *map(str, words)) == 0
    assert tree(tmp_path / "data") == expected(s3)


# User mistakes


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "-n/--limit -a/--all is required"),
        (["-n", "3", "-a"], "not allowed with"),
        (["-n", "0"], "-n/--limit: 0 is not from 1 to 2147483647"),
        (["-a", "--workers", "0"], "--workers: 0 is not from 1 to 1024"),
        (["-a", "--airports", "Bazel"], "'Bazel'.* it has Atlanta, Basel, Chicago, Hong_Kong"),
        (["-a", "--airports", "Basel", "\x1b[2J"], r"'\\x1b\[2J'.* it has Atlanta"),
    ],
)
def test_mistakes_get_one_sentence(s3, tmp_path, flags, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        download(s3, tmp_path / "data", *flags)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "data").exists()
    assert s3.object_bytes == 0


def test_an_output_that_cannot_be_is_found_before_the_listing(s3, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "file", tmp_path / "file" / "data", tmp_path / "link"):
        with pytest.raises(UserError, match="is not a folder"):
            download(s3, out, "--all")
    assert s3.log == []
    assert (tmp_path / "file").read_text() == "mine"


def test_too_small_a_disk_is_found_before_the_first_byte(s3, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=50_100_000))
    with pytest.raises(UserError, match=r"MB are needed in .* and 50.1 MB are free"):
        download(s3, tmp_path / "data", "--all")
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    download(s3, tmp_path / "data", "--all")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    assert download(s3, tmp_path / "data", "--all") == 0  # nothing is missing


def test_a_bucket_that_cannot_be_listed(s3, tmp_path):
    s3.storm_until = time.monotonic() + 60
    with pytest.raises(UserError, match=r"cannot list s3://rareplanes-public/.*SlowDown"):
        download(s3, tmp_path, "--all", "--retries", "1")
    s3.storm_until = 0
    for status, code in ((403, "AccessDenied"), (404, "NoSuchBucket")):
        s3.log.clear()
        s3.refuses = status, code
        with pytest.raises(UserError, match=rf"cannot list s3://rareplanes-public/.*{code}"):
            download(s3, tmp_path, "--all")
        assert len(s3.log) <= 6  # once for each folder: not retried
    s3.refuses = None
    s3.objects.clear()
    with pytest.raises(UserError, match="no complete scene"):
        download(s3, tmp_path, "--all")
    with pytest.raises(UserError, match="is not an address"):
        main(["-a", "-o", str(tmp_path), "--endpoint-url", "nowhere"])
    nobody = ["--endpoint-url", "http://127.0.0.1:9", "--retries", "0"]
    with pytest.raises(UserError, match=r"cannot list .*EndpointConnectionError.* the network"):
        main(["-a", "-o", str(tmp_path), *nobody])
    assert list(tmp_path.iterdir()) == []


def test_a_download_does_not_wait_for_the_import_of_opencv_torch_or_pycocotools(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import rareplanes.download; "
        "print(*sorted({'cv2', 'numpy', 'torch', 'pycocotools'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_from_any_directory_a_mistake_is_exit_code_2_without_traceback(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: one of the arguments -n/--limit -a/--all is required")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
