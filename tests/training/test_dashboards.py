"""A dashboard that fails, hangs or comes late ends no run and holds none up: servers on loopback, asked over HTTP."""

import functools
import json
import sys
import threading
import time
import types
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_eagle.training import dashboards
from megatron_eagle.training.dashboards import Sender, mlflow_name
from megatron_eagle.training.log import StepRecord, TrainingLog

STEPS = 8


class Server(ThreadingHTTPServer):
    """Takes what is posted; ``mood`` says what becomes of it: taken, refused (500), or no answer until the end."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mood = "taken"
        self.taken: list[Any] = []
        self.answered: list[tuple[str, str]] = []  # call, mood
        self.over = threading.Event()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Any = self.server
        if server.mood == "hanging":
            server.over.wait(30)
            return
        if server.mood == "taken":
            server.taken.append(said)
        self.send_response(200 if server.mood == "taken" else 500)
        self.end_headers()
        server.answered.append((said[0], server.mood))

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture
def mlflow(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """In place of the package: the calls that are used, each posted to the server."""

    class Client:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                body = json.dumps([name, arguments, named]).encode()
                address = f"http://127.0.0.1:{server.server_port}"
                with urllib.request.urlopen(urllib.request.Request(address, body), timeout=20):
                    return SimpleNamespace(experiment_id="7", info=SimpleNamespace(run_id="one"))

            return call

    entities = SimpleNamespace(Metric=lambda *values: values)
    module = types.SimpleNamespace(MlflowClient=Client, entities=entities)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return server


def record(step: int, **changes: Any) -> StepRecord:
    numbers = {"loss": 1.0, "learning_rate": 1e-3, "grad_norm": 0.5, "useful_tokens": 9, "tokens": 10, "tiles": 1}
    times = {"seconds": 0.5, "data_wait": 0.0, "sample_digest": "0" * 16}
    return StepRecord(**{"stage": "stage1", "step": step, "steps": STEPS} | numbers | times | changes)


def open_log(folder: Path, **options: Any) -> TrainingLog:
    named = {"stage": "stage1", "total_steps": STEPS, "tensorboard": False, "wandb_project": None, "resumed_at": 0}
    return TrainingLog(folder, **named | {"mlflow_experiment": "eagle", "about": {"commit": "abc"}} | options)


def until(what: Any) -> None:
    ends = time.monotonic() + 20
    while not what():
        assert time.monotonic() < ends
        time.sleep(0.01)


def answered_since(server: Server, before: int) -> bool:
    """Whether a step's last call was answered since there were ``before`` answers."""
    return any(name == "log_batch" or mood == "refused" for name, mood in server.answered[before:])


def run(folder: Path, server: Server, moods: dict[int, str], **options: Any) -> list[int]:
    """Train, with the server's mood changed before some steps; the steps that reached it."""
    with open_log(folder, **options) as log:
        for step in range(1, STEPS + 1):
            server.mood = moods.get(step, server.mood)
            before = len(server.answered)
            log.step(record(step))
            if server.mood != "hanging":
                until(functools.partial(answered_since, server, before))
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == list(range(1, STEPS + 1))
    return [said[2]["metrics"][0][3] for said in server.taken if said[0] == "log_batch"]


def test_a_server_that_takes_everything_is_not_spoken_of(tmp_path: Path, mlflow: Server, capsys: Any) -> None:
    assert run(tmp_path, mlflow, {}) == list(range(1, STEPS + 1))
    assert "MLflow" not in capsys.readouterr().out
    assert [said[0] for said in mlflow.taken[:4]] == ["get_experiment_by_name", "create_run", "log_dict", "log_batch"]
    assert mlflow.taken[-1][0] == "set_terminated"


def test_errors_in_mid_run_are_said_once_and_counted_at_the_end(tmp_path: Path, mlflow: Server, capsys: Any) -> None:
    assert run(tmp_path, mlflow, {3: "refused", 6: "taken"}) == [1, 2, 6, 7, 8]
    said = [line for line in capsys.readouterr().out.splitlines() if "MLflow" in line]
    assert said == [
        "MLflow did not take step 3: HTTPError: HTTP Error 500: Internal Server Error; training goes on without it",
        "3 of 8 lines were not sent to MLflow; metrics.jsonl has them all",
    ]


def test_a_server_that_comes_late_gets_the_rest_in_one_run(tmp_path: Path, mlflow: Server, capsys: Any) -> None:
    assert run(tmp_path, mlflow, {1: "refused", 4: "taken"}) == [4, 5, 6, 7, 8]
    assert [said[0] for said in mlflow.taken].count("create_run") == 1
    assert "3 of 8 lines were not sent to MLflow" in capsys.readouterr().out


def test_a_server_that_hangs_holds_nothing_up(
    tmp_path: Path, mlflow: Server, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboards, "SECONDS_TO_FINISH", 0.3)
    started = time.monotonic()
    assert run(tmp_path, mlflow, {3: "hanging"}) == [1, 2]
    assert time.monotonic() - started < 5
    assert capsys.readouterr().out.splitlines()[-1] == (
        "6 of 8 lines were not sent to MLflow; metrics.jsonl has them all"
    )


def test_what_no_queue_holds_is_counted_too(server: Server, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboards, "ROOM", 2)
    answer = threading.Event()
    sender = Sender("W&B", lambda: SimpleNamespace(log=lambda *_: answer.wait(20), finish=lambda: None), patience=0.2)
    for step in range(1, 10):
        sender.log({}, step)
    sender.finish()
    answer.set()
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("2 steps before it wait for an answer; training goes on without it")
    assert last == "9 of 9 lines were not sent to W&B; metrics.jsonl has them all"


def test_wandb_that_cannot_begin_or_end_ends_no_run(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def init(**_: Any) -> Any:
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with open_log(tmp_path, mlflow_experiment=None, wandb_project="eagle") as log:
        log.step(record(1))
    said = [line for line in capsys.readouterr().out.splitlines() if "W&B" in line]
    assert said == [
        "W&B did not take step 1: ConnectionError: no route to host; training goes on without it",
        "1 of 1 lines were not sent to W&B; metrics.jsonl has them all",
    ]

    def finish() -> None:
        raise TimeoutError("W&B's own process is gone")

    Sender("W&B", lambda: SimpleNamespace(log=lambda *_: None, finish=finish)).finish()
    sender = Sender("W&B", lambda: SimpleNamespace(log=lambda *_: None, finish=finish))
    sender.log({}, 1)
    sender.finish()
    assert capsys.readouterr().out.startswith("W&B did not take the end of the run: TimeoutError")


def test_a_fresh_start_forgets_the_run_of_before(tmp_path: Path, mlflow: Server) -> None:
    (tmp_path / "mlflow-stage1.id").write_text("of before\n")
    run(tmp_path, mlflow, {1: "refused"})
    assert not (tmp_path / "mlflow-stage1.id").exists()


@pytest.mark.parametrize(
    ("name", "taken", "cleaned"),
    [
        ("score/docvqa", (), "score/docvqa"),
        ("loss über 2", (), "loss über 2"),
        ("score/a(b)=50%", (), "score/a_b__50_"),
        ("score//x", (), "score/x"),
        ("/score/x/", (), "score/x"),
        ("score/../../x", (), "_/x"),
        ("", (), "_"),
        ("a+b", ("a_b",), "a_b_2"),
        ("x" * 300, (), "x" * 250),
    ],
)
def test_names_that_mlflow_refuses_are_changed(name: str, taken: tuple[str, ...], cleaned: str) -> None:
    assert mlflow_name(name, taken) == cleaned
