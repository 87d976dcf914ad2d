"""Building in parts and after a kill: finished shards stay, and the result is byte for byte that of one build."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from samples import image_bytes, make_records, make_settings, make_tokenizer, question, write_jsonl

from megatron_eagle.cli import main
from megatron_eagle.data.build.dataset import Part, build_dataset, join_parts
from megatron_eagle.data.build.index import check_dataset
from megatron_eagle.data.storage.shards import iterate_samples
from megatron_eagle.data.stream.digest import read_digest
from megatron_eagle.data.stream.planned import PlannedStream
from megatron_eagle.errors import UserError


def contents(folder):
    """Digest of every file that is the same for the same data; Energon's index holds dates."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".sqlite"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def messy_source(folder, count=46):
    """Bad images, a bad line, an id twice, in blocks of two parts, a block without a good sample."""
    folder.mkdir()
    records = make_records(folder, count)
    (folder / records[8]["image"][0]).write_bytes(b"no image")
    lines = [*records[:20], b"no json", *records[20:], dict(records[3], task="again")]
    lines[25:30] = [b"nothing"] * 5
    return write_jsonl(folder, lines)


@pytest.mark.slow
def test_three_parts_joined_are_one_build(tmp_path):
    source = messy_source(tmp_path / "source")
    options = {"samples_per_shard": 5, "max_rejected": 10}
    whole = build_dataset(source, tmp_path / "whole", **options)
    joined = tmp_path / "joined"
    with pytest.raises(UserError, match=r"holds no parts of a data set; 'data build --part i/n' makes them"):
        join_parts(joined)
    first = build_dataset(source, joined, part=Part(1, 3), samples_per_shard=5)
    third = build_dataset(source, joined, part=Part(3, 3), samples_per_shard=5, workers=2)
    with pytest.raises(UserError, match=r"joined cannot be joined: part 2/3 is missing or unfinished"):
        join_parts(joined, max_rejected=10)
    with pytest.raises(UserError, match=r"unfinished build of something else: parts was 3, is 4; remove it"):
        build_dataset(source, joined, part=Part(2, 4), samples_per_shard=5)
    second = build_dataset(source, joined, part=Part(2, 3), samples_per_shard=5)
    assert (whole.read, whole.rejected) == (48, 7)
    assert sum(part.read for part in (first, second, third)) == 48
    with pytest.raises(UserError, match=r"7 of 48 samples are bad and 6 are allowed"):
        join_parts(joined, max_rejected=6)
    assert join_parts(joined, max_rejected=7) == whole
    assert contents(joined) == contents(tmp_path / "whole") and check_dataset(joined) == 41
    assert not list(tmp_path.glob(".*"))
    tokenizer = make_tokenizer(tmp_path)

    def digest(folder, ranks):
        settings = make_settings(folder, pack_length=512, tile_size=64, tokens_per_tile=16, packing="best_fit")
        opened = lambda rank: PlannedStream(settings, tokenizer, rank=rank, world_size=ranks, batch=2)  # noqa: E731
        return read_digest(opened, ranks, 10, 2)

    assert digest(joined, 2) == digest(tmp_path / "whole", 1)


def slow_source(folder, count=40):
    """Images that take a while to decode."""
    folder.mkdir()
    (folder / "big.jpg").write_bytes(image_bytes((2500, 2000), "red", "JPEG"))
    records = [question(f"s{number}", "<image>\nWhat?", "Red.", "big.jpg") for number in range(count)]
    return write_jsonl(folder, [*records[:7], b"no json", *records[7:]])


def start(source, out, *more):
    command = [sys.executable, "-m", "megatron_eagle", "data", "build", str(source), str(out), "--max-rejected", "1"]
    command += ["--samples-per-shard", "4", *more]
    return subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.long), "2"])
def test_a_killed_build_goes_on_where_it_was(tmp_path, workers):
    source, out = slow_source(tmp_path / "source"), tmp_path / "out"
    victim = start(source, out, "--workers", workers)
    state = tmp_path / ".out.partial" / ".state"
    deadline = time.monotonic() + 120
    while len(list(state.glob("shard-*.json"))) < 3:
        assert victim.poll() is None and time.monotonic() < deadline, victim.communicate()[0]
        time.sleep(0.002)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    finished = sorted(path.stem for path in state.glob("shard-*.json"))
    assert 3 <= len(finished) < 11 and not out.exists()
    before = {name: (state.parent / f"{name}.tar").stat() for name in finished}
    second = start(source, out, "--workers", workers)
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0, said
    counts = re.search(r"41 samples read, 40 written, 1 rejected, (\d+) of 11 shards were there already", said)
    assert counts and int(counts[1]) == len(finished)
    for name, stat in before.items():
        now = (out / f"{name}.tar").stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns), f"{name} was built again"
    build_dataset(source, tmp_path / "whole", samples_per_shard=4, max_rejected=1)
    assert contents(out) == contents(tmp_path / "whole")
    assert len(list(iterate_samples(out))) == 40


@pytest.mark.slow
def test_two_builds_of_the_same_part_do_not_meet(tmp_path):
    source, out = slow_source(tmp_path / "source", count=200), tmp_path / "out"
    first = start(source, out)
    try:
        while not (tmp_path / ".out.partial" / ".state" / "part-1.lock").exists():
            time.sleep(0.01)
        time.sleep(0.1)
        with pytest.raises(UserError, match=r"another process is building part 1/1 in .*\.out\.partial"):
            build_dataset(source, out, samples_per_shard=4)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()


def test_a_source_that_changed_is_not_mixed_with_what_was_built(tmp_path):
    source = messy_source(tmp_path / "source")
    build_dataset(source, tmp_path / "out", part=Part(1, 2), samples_per_shard=5)
    source.write_bytes(source.read_bytes() + b"{}\n")
    with pytest.raises(UserError, match=r"unfinished build of something else: files was .*; remove it to start over"):
        build_dataset(source, tmp_path / "out", part=Part(2, 2), samples_per_shard=5)
    with pytest.raises(UserError, match=r"part 3/2 must be between 1/2 and 2/2"):
        Part(3, 2)


def test_the_commands(tmp_path, capsys):
    source = messy_source(tmp_path / "source")

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["data", *map(str, arguments)])
        return stopped.value.code, " ".join(capsys.readouterr())

    for number in (1, 2):
        code, said = run("build", source, tmp_path / "out", "--part", f"{number}/2", "--samples-per-shard", 5)
        assert code == 0 and f"part {number}/2: 2" in said and "megatron-eagle data join" in said
    code, said = run("join", tmp_path / "out")
    assert code != 0 and "7 of 48 samples are bad and 0 are allowed (--max-rejected)" in said
    assert run("join", tmp_path / "out", "--max-rejected", 7)[1].count("48 samples read, 41 written, 7 rejected") == 1
    assert run("build", source, tmp_path / "new", "--part", "2")[0] != 0
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in rejected] == [9, 21, 26, 27, 28, 29, 30]
