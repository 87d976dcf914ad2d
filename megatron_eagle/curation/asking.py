"""Operators that ask a model: what they have in common, from the samples' questions to findings.

They need all samples, so that one queue in one process asks, whatever number of processes works on the blocks: limits
hold for the whole run, and its output does not depend on who asked when. A sample's value is what will be asked, with
places of pictures instead of pictures. What the model says is checked by rule, and by a second model if there is one,
before it becomes a finding.
"""

import hashlib
import itertools
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic.dataclasses import dataclass

from megatron_eagle.config.findings import checked
from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.yaml_file import read_yaml
from megatron_eagle.curation.clips import frames_of
from megatron_eagle.curation.operator import Row, SetOperator, Step, Verdict
from megatron_eagle.curation.sample import Exchange, Finding, Sample, added_exchanges, plain_text
from megatron_eagle.curation.tasks import Task, task_of
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.sample.conversation import Turn
from megatron_eagle.data.sample.markers import MARKERS, count_markers
from megatron_eagle.endpoint.client import ChatClient, check_installed
from megatron_eagle.endpoint.question import Question, Reply, ask_about
from megatron_eagle.endpoint.queue import Queue
from megatron_eagle.endpoint.settings import Endpoint
from megatron_eagle.errors import BrokenSample
from megatron_eagle.progress import Progress

JUDGE = (
    "Judge this about all that stands above: pictures, if there are any, and text.\nQuestion: {question}\n"
    "Answer: {answer}\nIs the answer right, and does it follow from that and the question alone? Reply with JSON "
    'alone: {{"good": true or false, "why": "a few words"}}'
)
MOST_PICTURES = 8
Tag = TypeVar("Tag")


@plain_dataclass(frozen=True)
class Ask:
    """What is asked about a sample. turn: that it is about, 0 for none. words: of the prompt.

    context: text that stands before the words, and before those of the judge. refused: why nothing is asked, which is
        noted; empty otherwise.
    pictures: path, offset and size of each. times: seconds of frames that are shown instead, the only picture being a
        film. about: what is needed to make use of the answer.
    """

    turn: int
    words: str
    pictures: tuple[tuple[str, int, int], ...] = ()
    about: dict[str, Any] | None = None
    times: tuple[float, ...] = ()
    context: str = ""
    refused: str = ""


@plain_dataclass(frozen=True)
class Draft:
    """What a model's answer would do: change a turn, add exchanges, reject one, be noted, or nothing, for a reason.

    changes: new words by turn. question, answer: what is judged, and added by ``add``, with those of ``also``.
    note: for later operators, in a list with those of the sample's other answers. A rejection stands if the judge finds
    the answer wrong, too.
    """

    does: Literal["change", "add", "reject", "note", "nothing"]
    reason: str
    detail: str = ""
    turn: int | None = None
    question: str = ""
    answer: str = ""
    changes: tuple[tuple[int, str], ...] = ()
    also: tuple[tuple[str, str], ...] = ()
    note: Any = None
    scores: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, config=STRICT)
class AskingOperator(SetOperator):
    """endpoint: YAML file with where the model is and how much may be asked. judge: the same of a second model, which
    must agree before anything is done. answers: folder in which both models' answers are kept."""

    holds: ClassVar[int] = 3000  # an answer of 2 000 characters, the texts before and after
    keys: ClassVar[tuple[str, ...] | None] = None  # of the JSON that is asked for
    most_tokens: ClassVar[int] = 1024

    endpoint: str
    judge: str | None = None
    answers: str = "answers"

    @abstractmethod
    def asks(self, sample: Sample) -> Iterator[Ask]:
        """What to ask about a sample."""

    @abstractmethod
    def draft(self, ask: Ask, reply: Reply) -> Draft | tuple[Draft, ...]:
        """What an answer in the right form would do; each of several is judged on its own. May raise NoText."""

    def prepare(self, folder: Path) -> None:
        """UserError if openai or a settings file is missing, nobody listens, or a key is refused."""
        check_installed()
        for endpoint, _ in self._models():
            client = ChatClient(endpoint, endpoint.key(self._key()))
            try:
                client.check()
            finally:
                client.close()

    def value(self, sample: Sample) -> Any:
        """Number of turns, and what to ask."""
        asks = [asdict(one) for one in self.asks(sample)]
        return [len(sample.conversation.turns), asks] if asks else None

    def decide(self, rows: Iterator[Row]) -> Iterator[Verdict]:
        """Asks everything, in order, a sample's findings together."""
        models = self._models()
        with Queue(*models[0], self._key()) as queue:
            asked = _shown(queue, queue.ask(((row, ask), self._question(ask)) for row, ask in _each(rows)))
            drafts = ((*tag, one) for tag, reply in asked for one in self._drafted(tag[1], reply))
            if len(models) == 1:
                yield from _verdicts(drafts, models[0][0].model)
                return
            with Queue(*models[1], self._key()) as judge:
                judged = judge.ask((draft, self._judging(draft[1], draft[2])) for draft in drafts)
                drafts = ((row, ask, _judgement(draft, reply)) for (row, ask, draft), reply in judged)
                yield from _verdicts(drafts, models[0][0].model)

    def __getstate__(self) -> dict[str, Any]:
        """Settings alone: the key stays in the process that asks."""
        return {name: value for name, value in self.__dict__.items() if name != "given_key"}

    def _models(self) -> list[tuple[Endpoint, Path]]:
        folder = Path(self.answers)
        given = [(self.endpoint, folder), *([(self.judge, folder / "judge")] if self.judge else [])]
        return [(checked(Endpoint, read_yaml(Path(file), "endpoint"), file), place) for file, place in given]

    def _key(self) -> str | None:
        key: str | None = getattr(self, "given_key", None)
        return key

    def _question(self, ask: Ask) -> Question | Reply:
        return Reply("") if ask.refused else _asked(ask, ask.words, self.keys, self.most_tokens)

    def _judging(self, ask: Ask, draft: Draft) -> Question | Reply:
        if draft.does == "nothing":
            return Reply("")
        words = JUDGE.format(question=draft.question, answer=draft.answer)
        return _asked(ask, words, ("good",), 200)

    def _drafted(self, ask: Ask, reply: Reply) -> tuple[Draft, ...]:
        if ask.refused:
            return (Draft("nothing", f"not asked: {ask.refused}", "", ask.turn or None),)
        fault = reply.fault(self.keys)
        if fault:
            reason, _, detail = fault.partition(": ")
            return (Draft("nothing", f"no use of the answer: {reason}", detail, ask.turn or None),)
        try:
            found = self.draft(ask, reply)
        except NoText as error:
            return (Draft("nothing", f"no use of the answer: {error}", reply.text[:150], ask.turn or None),)
        return found if isinstance(found, tuple) else (found,)


def give_key(steps: tuple[Step, ...], key: str) -> None:
    """Who asks uses this key where their endpoint has no file of its own. It is no setting, nor written down."""
    for step in steps:
        if isinstance(step.operator, AskingOperator):
            object.__setattr__(step.operator, "given_key", key)


def pictures_of(sample: Sample) -> tuple[tuple[str, int, int], ...]:
    """Where the sample's images lie."""
    return tuple((str(one.path), one.offset, one.size) for one in sample.images)


def ask_of(sample: Sample, one: Exchange, words: str, about: dict[str, Any]) -> Ask:
    """What is asked about an exchange: with the turns before it, and the pictures that are shown up to it.

    words: of the prompt; ``{picture}`` in them becomes what there is to see. Refused if a video, or more pictures than
    a model is shown, belong to it.
    """
    turns = sample.conversation.turns[: one.turn]
    images, videos = (sum(count_markers(turn.text, kind) for turn in turns) for kind in MARKERS)
    if videos:
        return Ask(one.turn, "", refused="a video belongs to it")
    if images > MOST_PICTURES:
        return Ask(one.turn, "", refused=f"more than {MOST_PICTURES} pictures belong to it")
    seen = {0: "conversation", 1: "picture"}.get(images, "pictures")
    return Ask(one.turn, words.format(picture=seen, **about), pictures_of(sample)[:images], about, (), _before(turns))


def _before(turns: Sequence[Turn]) -> str:
    """The conversation before the last answer and its question, as text; empty if there is none."""
    first = len(turns) - 1
    while first and turns[first - 1].role != "assistant":
        first -= 1
    before = [*turns[:first], *(turn for turn in turns[first:] if turn.role == "system")]
    lines = [f"{turn.role.capitalize()}: {plain_text(turn.text)}" for turn in before]
    return "The conversation before:\n" + "\n".join(lines) + "\n\n" if lines else ""


class NoText(ValueError):
    """What a model gives under a key is not what can become text."""


def text_of(data: Mapping[str, Any] | None, key: str, *, lines: bool = False, number: bool = False) -> str:
    """The text under a key of a model's JSON. lines: a list of texts will do, too, one a line; number: a number.

    Raises NoText if it is anything else: what Python calls it is no text to learn.
    """
    found = (data or {}).get(key)
    if lines and isinstance(found, list) and found and all(isinstance(one, str) for one in found):
        found = "\n".join(one.strip() for one in found)
    if number and isinstance(found, int | float) and not isinstance(found, bool):
        found = str(found)
    if not isinstance(found, str):
        raise NoText(f"'{key}' is no text")
    return found.strip()


def drawn(share: float, *names: Any) -> bool:
    """Whether something is among a share of all, by its names alone."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def drawn_exchanges(sample: Sample, operator: str, tasks: Collection[Task], share: float) -> Iterator[Exchange]:
    """Exchanges of these tasks that have a question and an answer; a share of them, each operator its own."""
    for one in sample.exchanges:
        wanted = one.question and one.answer and task_of(one.question, one.answer) in tasks
        if wanted and drawn(share, operator, sample.conversation.id, one.turn):
            yield one


def _asked(ask: Ask, words: str, keys: tuple[str, ...] | None, most: int) -> Question | Reply:
    files = [FileSlice(Path(path), offset, size) for path, offset, size in ask.pictures]
    try:
        pictures = frames_of(files[0], ask.times) if ask.times else [file.read() for file in files]
    except (OSError, BrokenSample) as error:
        return Reply("", unanswered=f"a picture cannot be read: {error}"[:200])
    return Question(ask_about(ask.context + words, *pictures), keys, most)


def _each(rows: Iterator[Row]) -> Iterator[tuple[Row, Ask]]:
    """Each ask, with its sample's key and number of turns alone."""
    for row in rows:
        turns, asks = row.value
        for one in asks:
            places, times = tuple(map(tuple, one["pictures"])), tuple(one["times"])
            yield replace(row, value=turns), Ask(**{**one, "pictures": places, "times": times})


def _shown(queue: Queue, answers: Iterable[tuple[Tag, Reply]]) -> Iterator[tuple[Tag, Reply]]:
    """The answers, with a line on a terminal that counts them."""
    title = f"asking {queue.endpoint.model}"
    with Progress(title, unit="answers") as bar:
        for answer in answers:
            bar.update()
            bar.set_postfix_str(str(queue.counts), refresh=False)
            yield answer


def _judgement(draft: Draft, reply: Reply) -> Draft:
    """The draft, or nothing if the judge does not agree or says nothing of use."""
    if draft.does == "nothing":
        return draft
    fault = reply.fault(("good",))
    if fault:
        return replace(draft, does="nothing", reason="the judge says nothing of use", detail=fault)
    data = reply.data or {}
    if data["good"] is (draft.does != "reject"):
        return draft
    return replace(draft, does="nothing", reason="refused by the judge", detail=str(data.get("why", ""))[:200])


def _verdicts(drafts: Iterator[tuple[Row, Ask, Draft]], model: str) -> Iterator[Verdict]:
    for _, group in itertools.groupby(drafts, key=lambda one: one[0].key):
        own = list(group)
        row = own[0][0]
        new: list[tuple[str, str, Finding]] = []
        notes: list[Any] = []
        noted = Finding("noted", "")
        for _, _, draft in own:
            detail = f"{model}{': ' * bool(draft.detail)}{draft.detail}"[:200]
            finding = Finding("noted", draft.reason, detail, draft.turn, scores=dict(draft.scores))
            if draft.does == "nothing":
                yield Verdict(row.key, finding)
            elif draft.does == "reject":
                yield Verdict(row.key, replace(finding, decision="rejected"))
            elif draft.does == "add":
                new += [(*words, finding) for words in ((draft.question, draft.answer), *draft.also)]
            elif draft.does == "note":
                notes.append(draft.note)
                noted = finding
            for turn, text in draft.changes if draft.does == "change" else ():
                yield Verdict(row.key, replace(finding, decision="changed", turn=turn, text=text))
        for finding in added_exchanges(row.value, new):
            yield Verdict(row.key, finding)
        if notes:
            yield Verdict(row.key, replace(noted, note=notes))
