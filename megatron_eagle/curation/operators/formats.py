"""One answer format for one task, stated in the question; Eagle 2: same task, similar format, others distinct ones.

Only answers that are the bare answer already, or say it in a set phrase, are rewritten; one that explains goes on
explaining, and its question does not ask it to be short.
"""

import re
from collections.abc import Iterable
from dataclasses import field
from typing import get_args

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.curation.operator import SampleOperator
from megatron_eagle.curation.questions import NUMBER_WORDS, chosen_letter, normal, options_of
from megatron_eagle.curation.sample import Exchange, Finding, Sample
from megatron_eagle.curation.tasks import Task, task_of
from megatron_eagle.data.sample.markers import escape_marks

INSTRUCTIONS: dict[Task, str] = {
    "choice": "Answer with the option's letter from the given choices directly.",
    "yes_no": "Answer yes or no.",
    "number": "Answer with a number.",
    "short": "Answer the question using a single word or phrase.",
}
_STATED = re.compile(
    r"\banswer (?:with|using|in|the question (?:with|using)|yes or no|directly)\b|\bsay unanswerable\b", re.I
)
_COUNTED = re.compile(r"(?:there (?:are|is)|i (?:count|see)|it is)\s+(\d+|" + "|".join(NUMBER_WORDS) + r")", re.I)


@dataclass(frozen=True, config=STRICT)
class Operator(SampleOperator):
    """instructions: what is stated for a task; tasks that are not named stay as they are. (LLaVA-1.5's wordings.)"""

    instructions: dict[Task, str] = field(default_factory=lambda: dict(INSTRUCTIONS))

    def findings(self, sample: Sample) -> Iterable[Finding]:
        """Changed answers, and questions that now say how to answer."""
        for exchange in sample.exchanges:
            task = task_of(exchange.question, exchange.answer)
            bare = bare_answer(task, exchange) if task in self.instructions else None
            if bare is None:
                continue
            if bare != exchange.answer:
                yield Finding("changed", f"answer to {task} unified", turn=exchange.turn, text=escape_marks(bare))
            if not states_format(exchange.question) and exchange.question:
                asked = sample.conversation.turns[exchange.turn - 2].text
                text = f"{asked}\n{self.instructions[task]}"
                yield Finding("changed", f"answer format of {task} stated", turn=exchange.turn - 1, text=text)


def states_format(question: str) -> bool:
    """Whether a question says how it is to be answered."""
    return _STATED.search(question) is not None


def bare_answer(task: Task, exchange: Exchange) -> str | None:
    """The answer in the format of its task; None if it says more than that, or the task has none."""
    said, options = normal(exchange.answer), options_of(exchange.question)
    if task == "choice":
        letter = chosen_letter(exchange.answer, options)
        if letter is None:
            found = [key for key, text in options.items() if normal(text) == said]
            return found[0] if len(found) == 1 else None
        plain = {letter.lower(), f"{letter.lower()} {normal(options.get(letter, letter))}"}
        return letter if re.sub(r"^(?:the )?(?:correct )?(?:answer|option)(?: is)? ", "", said) in plain else None
    if task == "yes_no":
        return said.capitalize() if said in ("yes", "no") else None
    if task == "number":
        counted = _COUNTED.fullmatch(said)
        value = counted[1].lower() if counted else said
        if value in NUMBER_WORDS:
            return str(NUMBER_WORDS.index(value))
        number = exchange.answer.strip().rstrip(".")
        return value if counted else number if re.fullmatch(r"[-+]?[$€£]?\d[\d,]*(?:\.\d+)?\s*%?", number) else None
    if task == "short":
        one_sentence = exchange.answer.count(".") == 1 and exchange.answer.endswith(".")
        return exchange.answer.rstrip(".") if one_sentence else exchange.answer
    return None


assert set(INSTRUCTIONS) <= set(get_args(Task))
