"""Windows that the ranks of a machine share: planned once, the same from a file, whoever is killed or comes late."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from samples import make_dataset, make_settings, make_tokenizer

from megatron_eagle.data.order import plan as plan_module
from megatron_eagle.data.order import shared_windows
from megatron_eagle.data.order.sample_index import Names
from megatron_eagle.data.order.shared_windows import SharedWindows
from megatron_eagle.data.order.window import Window
from megatron_eagle.data.stream.digest import read_digest
from megatron_eagle.data.stream.planned import PlannedStream

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*multi-threaded.*fork")


def window(number):
    some = np.array([number, 1, 2])
    return Window(
        *(some, some, some),
        Names.of("abc"),
        Names.of("def"),
        some,
        np.array([0, 3]),
        np.ones(1),
        some[:0],
        Names.of([]),
    )


def planned_in(folder, seconds=0.0):
    """A plan that writes down each window it makes."""

    def plan(number):
        with (folder / "planned").open("a") as log:
            log.write(f"{number}\n")
        time.sleep(seconds)
        return window(number)

    return plan


def planned(folder):
    return sorted(map(int, (folder / "planned").read_text().split()))


def streams_in(folder):
    return [own for own in (folder / "streams").iterdir() if own.is_dir()]


def reader(folder, numbers, seconds, found):
    shared = SharedWindows("stream", planned_in(folder, seconds), folder / "streams")
    found.put([int(shared.get(number).sources[0]) for number in numbers])
    time.sleep(1.0)
    shared.close()


def test_eight_processes_plan_each_window_once_and_leave_nothing(tmp_path):
    found = FORK.Queue()
    readers = [FORK.Process(target=reader, args=(tmp_path, [0, 1, 7], 0.1, found)) for _ in range(8)]
    for own in readers:
        own.start()
    assert [found.get(timeout=60) for _ in readers] == [[0, 1, 7]] * 8
    for own in readers:
        own.join()
    assert planned(tmp_path) == [0, 1, 7] and streams_in(tmp_path) == []


def test_when_who_plans_is_killed_another_does(tmp_path):
    found = FORK.Queue()
    first = FORK.Process(target=reader, args=(tmp_path, [3], 60.0, found))
    first.start()
    while not (tmp_path / "planned").exists():
        time.sleep(0.01)
    second = FORK.Process(target=reader, args=(tmp_path, [3], 0.0, found))
    second.start()
    time.sleep(0.3)
    assert planned(tmp_path) == [3]  # the second one waits
    os.kill(first.pid, signal.SIGKILL)
    assert found.get(timeout=30) == [3] and planned(tmp_path) == [3, 3]
    second.join()
    assert streams_in(tmp_path) == []


def test_what_a_killed_run_left_goes_with_the_next_start_of_any(tmp_path):
    found = FORK.Queue()
    killed = FORK.Process(target=reader, args=(tmp_path, [0], 0.0, found))
    killed.start()
    found.get(timeout=30)
    alive = SharedWindows("other", window, tmp_path / "streams")
    alive.get(5)
    assert len(streams_in(tmp_path)) == 2
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    third = SharedWindows("third", window, tmp_path / "streams")
    assert len(streams_in(tmp_path)) == 2 and alive._folder.exists()
    third.close(), alive.close()
    assert streams_in(tmp_path) == []


def test_the_next_window_is_planned_in_the_background_and_old_ones_go(tmp_path):
    shared = SharedWindows("stream", planned_in(tmp_path), tmp_path / "streams")
    for number in range(6):
        shared.get(number)
        shared.prepare(number + 1)
        shared.prepare(number + 1)
        deadline = time.monotonic() + 20
        while not (shared._folder / str(number + 1)).exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
    assert planned(tmp_path) == list(range(7))
    assert sorted(own.name for own in shared._folder.iterdir() if own.name.isdigit()) == ["4", "5", "6"]
    shared.close()


def test_without_a_place_to_write_each_plans_for_itself(tmp_path, monkeypatch):
    (tmp_path / "streams").write_text("a file")
    shared = SharedWindows("stream", planned_in(tmp_path), tmp_path / "streams")
    assert shared.get(2).sources[0] == 2 and shared.get(2).sources[0] == 2 and planned(tmp_path) == [2, 2]
    shared.close()
    (tmp_path / "streams").unlink()
    shared = SharedWindows("stream", planned_in(tmp_path), tmp_path / "streams")
    monkeypatch.setattr(Window, "save", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    assert shared.get(2).sources[0] == 2 and [own.name for own in shared._folder.glob("*2*")] == ["2.lock"]
    shared.close()
    users = iter(range(10**6, 10**6 + 9))  # another one at every look, so the folder is never ours
    monkeypatch.setattr(shared_windows.os, "getuid", lambda: next(users))
    stranger = SharedWindows("stream", planned_in(tmp_path), tmp_path / "streams")
    assert stranger.get(2).sources[0] == 2 and not stranger._folder.exists()


def test_one_digest_whether_windows_are_shared_or_not(tmp_path, monkeypatch):
    tokenizer = make_tokenizer(tmp_path)
    sources = make_dataset(tmp_path / "a", 40, "a"), make_dataset(tmp_path / "b", 24, "b", seed=1)
    settings = make_settings(*sources, pack_length=512, tile_size=64, tokens_per_tile=16, plan_window=16)

    def opened(ranks, workers=0):
        return lambda rank: PlannedStream(settings, tokenizer, rank=rank, world_size=ranks, batch=4, workers=workers)

    alone = read_digest(opened(1), 1, 40, 4)
    monkeypatch.setattr(plan_module, "SHARED_FROM", 1)
    monkeypatch.setattr(shared_windows.tempfile, "gettempdir", lambda: str(tmp_path))
    for ranks, workers in ((1, 0), (4, 0), (2, 1)):
        assert read_digest(opened(ranks, workers), ranks, 40, 4) == alone
    stream = opened(1)(0)
    for _ in range(30):
        next(stream)
    state, following = stream.state(), next(stream).sample_ids
    again = opened(1)(0)
    again.restore(state)
    assert next(again).sample_ids == following
    (folder,) = tmp_path.glob("megatron-eagle-windows-*")
    again.close()
    assert len([*folder.iterdir()]) == 1
    stream.close()
    assert [*folder.iterdir()] == []
