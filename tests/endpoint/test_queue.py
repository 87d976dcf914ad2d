"""Questions to a real HTTP server on loopback that answers slowly, wrongly, with errors, and cuts connections."""

import json
import os
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import KEY, Act, Server, asked_text, endpoint_server
from samples import image_bytes

from megatron_eagle.endpoint.cache import ANSWERS_FILE
from megatron_eagle.endpoint.client import ChatClient
from megatron_eagle.endpoint.question import Question, Reply, ask_about
from megatron_eagle.endpoint.queue import Counts, Queue
from megatron_eagle.endpoint.settings import Endpoint
from megatron_eagle.errors import UserError

PROCESS = """
import sys
from pathlib import Path
from megatron_eagle.endpoint.client import ChatClient
from megatron_eagle.endpoint.question import Question, ask_about
from megatron_eagle.endpoint.queue import Queue
from megatron_eagle.endpoint.settings import Endpoint
with Queue(Endpoint(sys.argv[1], "m", first_wait=0.01, at_once=4), Path(sys.argv[2]), sys.argv[3]) as queue:
    for tag, reply in queue.ask((n, Question(ask_about(f"question {n}"))) for n in range(int(sys.argv[4]))):
        print(tag, reply.text, flush=True)
"""


def endpoint(server: Server, **settings: Any) -> Endpoint:
    return Endpoint(server.url, "m", **{"first_wait": 0.01, "timeout": 5.0, **settings})


def question(number: int, **settings: Any) -> Question:
    return Question(ask_about(f"question {number}"), **settings)


def run(
    where: Endpoint, folder: Path, many: int, key: str | None = KEY, **settings: Any
) -> tuple[list[tuple[int, Reply]], Counts]:
    with Queue(where, folder, key) as queue:
        return list(queue.ask((number, question(number, **settings)) for number in range(many))), queue.counts


def echo(body: dict[str, Any], before: int) -> Act:
    return Act(asked_text(body).upper())


def test_answers_come_in_order_and_are_not_asked_again(tmp_path: Path) -> None:
    with endpoint_server(lambda body, before: Act(asked_text(body).upper(), wait=0.02)) as server:
        got, counts = run(endpoint(server, at_once=4), tmp_path, 30)
        again, later = run(endpoint(server, at_once=4), tmp_path, 30)
    assert (
        [(tag, reply.text) for tag, reply in got]
        == [(n, f"QUESTION {n}") for n in range(30)]
        == [(tag, reply.text) for tag, reply in again]
    )
    assert 1 < server.most_at_once <= 4 and set(server.asked.values()) == {1} and len(server.asked) == 30
    assert (counts.asked, counts.known, later.asked, later.known) == (30, 0, 0, 30)


def test_the_same_question_in_flight_is_asked_once(tmp_path: Path) -> None:
    with (
        endpoint_server(lambda body, before: Act("one", wait=0.1)) as server,
        Queue(endpoint(server), tmp_path, KEY) as queue,
    ):
        assert [reply.text for _, reply in queue.ask((n, question(0)) for n in range(20))] == ["one"] * 20
    assert sum(server.asked.values()) == 1


FAULTS: dict[str, Act] = {
    "status 500": Act(status=500),
    "status 429": Act(status=429, headers={"retry-after": "0.01"}),
    "the connection failed": Act(status=0, cut=20),
    "no answer within 0.3 s": Act(wait=0.6),
    "the body is not JSON": Act(body=b'{"choices": [{"mess'),
    "the body is no chat completion": Act(body=b'{"choices": []}'),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_what_fails_is_asked_again_and_counted(reason: str, tmp_path: Path) -> None:
    def act(body: dict[str, Any], before: int) -> Act:
        return FAULTS[reason] if before < 2 else echo(body, before)

    with endpoint_server(act) as server:
        got, counts = run(endpoint(server, timeout=0.3), tmp_path, 5)
    assert [reply.text for _, reply in got] == [f"QUESTION {n}" for n in range(5)]
    assert counts.failed == {reason: 10} and set(server.asked.values()) == {3}


def test_a_body_that_is_not_even_declared_json_is_asked_again(tmp_path: Path) -> None:
    page = Act(body=b"<html>gateway</html>", headers={"Content-Type": "text/html"})
    with endpoint_server(lambda body, before: page if not before else echo(body, before)) as server:
        got, counts = run(endpoint(server), tmp_path, 1)
    assert got[0][1].text == "QUESTION 0" and counts.failed.total() == 1


def test_answers_of_a_wrong_form_are_counted_by_reason_kept_and_not_asked_again(tmp_path: Path) -> None:
    answers = [
        Act('{"good": true}'), Act('```json\n{"good": 1}\n```'), Act("yes"), Act('{"bad": 1}'), Act(""), Act(None),
        Act('{"good"', finish="length"), Act("", finish="content_filter"), Act("[1]"), Act(status=400),
    ]  # fmt: skip

    def act(body: dict[str, Any], before: int) -> Act:
        return answers[int(asked_text(body).split()[1])]

    with endpoint_server(act) as server:
        got, counts = run(endpoint(server), tmp_path, len(answers), keys=("good",))
        again, later = run(endpoint(server), tmp_path, len(answers), keys=("good",))
    assert [reply.fault(("good",)) for _, reply in got] == [
        "", "", "not the JSON asked for", "JSON without 'good'", "empty", "empty", "cut off",
        "withheld by the endpoint", "not the JSON asked for", "refused by the endpoint (400): told so",
    ]  # fmt: skip
    assert counts.faults == later.faults == {
        "not the JSON asked for": 2, "JSON without 'good'": 1, "empty": 2, "cut off": 1, "withheld by the endpoint": 1,
        "refused by the endpoint (400)": 1,
    }  # fmt: skip
    assert [reply for _, reply in got] == [reply for _, reply in again]
    assert sorted(server.asked.values()) == [1] * 9 + [2], "only what was refused, which costs nothing, is asked again"


@pytest.mark.parametrize(
    ("key", "words"), [("wrong", "refuses the key (401)"), (None, "refuses the key (401)")], ids=["wrong", "none"]
)
def test_a_refused_key_is_one_line_at_once(key: str | None, words: str, tmp_path: Path) -> None:
    with endpoint_server(echo) as server:
        begun = time.monotonic()
        with pytest.raises(UserError) as error:
            run(endpoint(server, first_wait=30.0), tmp_path, 100, key)
        with pytest.raises(UserError) as early:
            ChatClient(endpoint(server), key or "none").check()
    assert time.monotonic() - begun < 5 and not server.asked
    for one in (error, early):
        assert words in str(one.value) and "\n" not in str(one.value) and server.url in str(one.value)


def test_an_endpoint_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    nowhere = Endpoint("http://127.0.0.1:9/v1", "m", attempts=2, first_wait=0.01)
    with pytest.raises(UserError, match=r"^no endpoint at http://127.0.0.1:9/v1: "):
        ChatClient(nowhere, "none").check()
    with pytest.raises(UserError, match=r"answers nothing: 2 attempts, the last: the connection failed.*0 answers"):
        run(nowhere, tmp_path, 50)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (Act(status=404), "has no model 'm' (404)"),
        (Act(status=503), "answers nothing: 3 attempts, the last: status 503"),
        (Act(status=400), "none of 20 questions was answered; refused by the endpoint (400)"),
    ],
)
def test_an_endpoint_that_answers_nothing_ends_the_run(act: Act, words: str, tmp_path: Path) -> None:
    with endpoint_server(lambda body, before: act) as server, pytest.raises(UserError) as error:
        run(endpoint(server, attempts=3), tmp_path, 40)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_one_question_that_always_fails_is_unanswered_and_the_others_go_on(tmp_path: Path) -> None:
    def act(body: dict[str, Any], before: int) -> Act:
        return Act(status=500) if asked_text(body) == "question 3" else Act("fine", wait=0.03)

    with endpoint_server(act) as server:
        got, counts = run(endpoint(server, attempts=3, at_once=2), tmp_path, 20)
    assert [tag for tag, reply in got if reply.unanswered] == [3] and counts.asked == 19
    assert counts.faults == {"unanswered after 3 attempts": 1}


@pytest.mark.parametrize("at_once", [1, 8])
@pytest.mark.parametrize("poison", [(0,), (4,), (1, 2, 3, 5, 6)], ids=["first", "last", "five"])
def test_questions_that_always_fail_end_no_run_for_ever(poison: tuple[int, ...], at_once: int, tmp_path: Path) -> None:
    """Alone in flight, in every run after the first, and several in a row: after some runs at the latest it is done."""
    many = max(5, max(poison) + 1)

    def act(body: dict[str, Any], before: int) -> Act:
        return Act(status=500) if int(asked_text(body).split()[1]) in poison else Act("fine")

    with endpoint_server(act) as server:
        where = endpoint(server, attempts=2, at_once=at_once)
        for number in range(3):
            try:
                got, counts = run(where, tmp_path, many)
            except UserError:
                assert len(poison) > 1 and number == 0
            else:
                assert [tag for tag, reply in got if reply.unanswered] == list(poison)
        assert counts.known == many - len(poison), "and what failed was tried again"
        server.act = lambda body, before: Act("at last")
        got, counts = run(where, tmp_path, many)
    assert counts.asked == len(poison) and not any(reply.unanswered for _, reply in got)


def test_no_minute_has_more_requests_or_tokens_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By when the server got them: a busy machine delays some, so half a second of the window is given away."""
    monkeypatch.setattr("megatron_eagle.endpoint.rate.WINDOW", 1.5)
    with endpoint_server(echo) as server:
        run(endpoint(server, requests_a_minute=5), tmp_path / "requests", 16)
        times = sorted(server.times)
        assert all(later - sooner > 1.0 for sooner, later in zip(times, times[5:], strict=False))
        server.times.clear()
        time.sleep(1.5)  # the window is the key's: what it holds would count
        # about 7 tokens are read and at most 93 written until the answer says 15
        run(endpoint(server, tokens_a_minute=230, at_once=1), tmp_path / "tokens", 24, most_tokens=93)
    spread = max(server.times) - min(server.times)
    assert 1.0 < spread < 6.0, "24 answers of 15 tokens are 360: one window of 230 has to pass"


def test_retry_after_holds_everyone_back(tmp_path: Path) -> None:
    def act(body: dict[str, Any], before: int) -> Act:
        first = asked_text(body) == "question 0" and not before
        return Act(status=429, headers={"retry-after": "0.5"}) if first else Act("fine", wait=0.02)

    with endpoint_server(act) as server:
        run(endpoint(server, at_once=2), tmp_path, 12)
    gaps = [later - sooner for sooner, later in zip(server.times, server.times[1:], strict=False)]
    assert max(gaps) > 0.4


def test_a_question_that_may_cost_too_much_is_not_asked(tmp_path: Path) -> None:
    prices = {"cost_in": 1000.0, "cost_out": 10000.0, "at_once": 1}  # 10 and 5 tokens are 0.06
    with endpoint_server(echo) as server:
        with pytest.raises(UserError, match=r"most_cost is 1: 0.\d+ is spent, 0 on its way.*answers are kept"):
            run(endpoint(server, most_cost=1.0, **prices), tmp_path, 30, most_tokens=10)
        kept = len(server.asked)
        assert 14 <= kept <= 16  # the last may have cost 0.107
        with pytest.raises(UserError, match="most_cost"):
            run(endpoint(server, most_cost=1.0, **prices), tmp_path, 30, most_tokens=10)
        assert len(server.asked) == kept, "what a run before spent counts"
        _, counts = run(endpoint(server, most_cost=9.0, **prices), tmp_path, 30, most_tokens=10)
    assert counts.known == kept and counts.asked == 30 - kept and counts.cost == pytest.approx(1.8)
    assert set(server.asked.values()) == {1}


def test_kills_lose_only_what_is_in_flight_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    """The server counts: what it answered before a kill is asked again only if the answer was on its way."""
    many, kills = 100, 3

    def act(body: dict[str, Any], before: int) -> Act:
        number = int(asked_text(body).split()[1])
        if before == 0 and number % 7 == 3:
            return [Act(status=500), Act(status=0), Act(status=429)][number % 3]
        return Act(f"answer {number}", wait=0.02)

    with endpoint_server(act) as server:
        command = [sys.executable, "-c", PROCESS, server.url, str(tmp_path), KEY, str(many)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        for number in range(kills):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
            assert process.stdout is not None
            for _ in range(20 * (number + 1)):  # so many answers, then it dies
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        done = subprocess.run(command, capture_output=True, env=environment, text=True, check=True).stdout
    assert done.splitlines() == [f"{n} answer {n}" for n in range(many)]
    assert len(server.answered) == many
    again = sum(times - 1 for times in server.answered.values())
    assert again <= kills * 4, f"{again} answers were asked for twice; four are in flight at each of {kills} kills"
    lines = [json.loads(line) for line in (tmp_path / ANSWERS_FILE).read_text().splitlines() if line.strip()]
    assert len(lines) == many == len({line["digest"] for line in lines})


def test_a_torn_line_is_asked_again_and_harms_no_other(tmp_path: Path) -> None:
    with endpoint_server(echo) as server:
        run(endpoint(server, at_once=1), tmp_path, 3)
        file = tmp_path / ANSWERS_FILE
        file.write_bytes(file.read_bytes()[:-20])
        got, counts = run(endpoint(server), tmp_path, 5)
        assert counts.known == 2 and counts.asked == 3
        _, later = run(endpoint(server), tmp_path, 5)
    assert later.known == 5 and [reply.text for _, reply in got] == [f"QUESTION {n}" for n in range(5)]


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    words = "another process is asking with the answers in"
    with endpoint_server(echo) as server, Queue(endpoint(server), tmp_path, KEY), pytest.raises(UserError, match=words):
        run(endpoint(server), tmp_path, 1)


def test_keys_come_from_a_file_and_are_never_written(tmp_path: Path) -> None:
    file = tmp_path / "key"
    with endpoint_server(echo) as server:
        for content, words in ((None, "cannot be read"), ("", "holds 0 words"), ("a b", "holds 2 words")):
            if content is not None:
                file.write_text(content)
            with pytest.raises(UserError, match=words):
                Queue(endpoint(server, key_file=str(file)), tmp_path)
        file.write_text(f"{KEY}\n")
        run(endpoint(server, key_file=str(file)), tmp_path / "answers", 2, key="unused")
    assert KEY not in (tmp_path / "answers" / ANSWERS_FILE).read_text()


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="neither cost_in nor cost_out"):
        Endpoint("http://x/v1", "m", most_cost=1.0)
    with pytest.raises(ValueError, match="an endpoint has a url"):
        Endpoint("localhost:8000", "m")


def test_a_key_that_an_endpoint_repeats_is_not_kept(tmp_path: Path) -> None:
    said = json.dumps({"error": {"message": f"bad: Authorization: Bearer {KEY} \ud83d"}}).encode()
    for act in (Act(status=400, body=said), Act(status=500, body=said), Act(body=json.dumps({"id": KEY}).encode())):
        with endpoint_server(lambda body, before, act=act: act) as server:
            ((_, reply),), _ = run(endpoint(server, attempts=2), tmp_path / str(act.status), 1)
        assert KEY not in reply.unanswered and "***" in reply.unanswered, reply.unanswered
        reply.unanswered.encode()


def test_tokens_are_not_guessed_too_few() -> None:
    """Of Chinese there is about a token a character, and of a picture one for 750 pixels in some models."""
    assert Question(ask_about("河流早晨" * 150)).tokens >= 600
    assert Question(ask_about("river " * 100)).tokens == 204
    sizes = {size: Question(ask_about("", image_bytes(size, "red"))).tokens for size in ((80, 60), (3000, 2000))}
    assert 1500 <= sizes[80, 60] < 1600 and 8000 <= sizes[3000, 2000] < 8100
    assert 1500 <= Question(ask_about("", b"none")).tokens < 1600


def test_queues_of_one_key_share_its_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator after another, or a model and its judge, may not ask twice as much."""
    monkeypatch.setattr("megatron_eagle.endpoint.rate.WINDOW", 1.5)
    with endpoint_server(echo) as server:
        for name in ("one", "two", "three"):
            run(endpoint(server, requests_a_minute=5), tmp_path / name, 4)
    times = sorted(server.times)
    assert len(times) == 12 and all(later - sooner > 1.0 for sooner, later in zip(times, times[5:], strict=False))


def test_retry_after_is_kept_to_whatever_its_form(tmp_path: Path) -> None:
    def act(body: dict[str, Any], before: int) -> Act:
        date = formatdate(time.time() + 2, usegmt=True)
        return Act(status=503, headers={"retry-after": date}) if not before else Act("fine")

    with endpoint_server(act) as server:
        run(endpoint(server, attempts=2, longest_wait=0.02), tmp_path, 1)
    assert server.times[1] - server.times[0] > 0.9, "a date has whole seconds; longest_wait is of our own waits"
