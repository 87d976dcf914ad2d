"""The class that lmms-eval makes of ``--model megatron_eagle``: its requests as questions to an ``Answerer``.

A request's messages hold words, pictures and videos in their order, and so they are asked. Answers are greedy unless
the task says otherwise. Likelihoods and dialogues over several rounds are refused.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lmms_eval.api.model import lmms
from PIL import Image

from megatron_eagle.errors import UserError
from megatron_eagle.progress import Progress
from megatron_eagle.serving.answerer import Answerer, Prompt
from megatron_eagle.serving.conversation import ROLES, Medium, Message, Options
from megatron_eagle.serving.limits import Limits
from megatron_eagle.serving.loading import load_answerer
from megatron_eagle.serving.model_folder import exported_folder

NEW_TOKENS = 512  # of an answer whose task does not say


class MegatronEagle(lmms):
    """model: exported folder, checkpoint, stage or run. batch_size: questions answered side by side.

    device: cpu, cuda, ... trust_code: run a folder's code that is not what this version exports.
    """

    is_simple = False

    def __init__(
        self,
        model: str,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        tokenizer: str | None = None,
        trust_code: bool = False,
    ) -> None:
        super().__init__()
        folder = exported_folder(Path(model), print, tokenizer=Path(tokenizer) if tokenizer else None)
        limits = Limits(images=1024, tiles=8192)  # questions of a benchmark, not of strangers
        self.answerer: Answerer = load_answerer(folder, device=device, limits=limits, trust=trust_code)
        self.together = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer for every request, in order."""
        answers: dict[int, str] = {}
        for options, places in _by_options(requests).items():
            batches = range(0, len(places), self.together)
            for start in Progress("answering", batches, unit="batches", shown=self.rank == 0):
                some = places[start : start + self.together]
                prompts = [self.prompt_of(requests[place], options) for place in some]
                said = self.answerer.answer_all(prompts, options)
                answers |= {place: answer.text for place, answer in zip(some, said, strict=True)}
        return [_until(answers[place], request.args[2]) for place, request in enumerate(requests)]

    def prompt_of(self, request: Any, options: Options) -> Prompt:
        """The question of a request as the model reads it."""
        _, to_messages, _, number, task, split = request.args
        doc = self.task_dict[task][split][number]
        return self.answerer.prepare(_messages(to_messages(doc)), options)

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refused."""
        raise UserError("megatron_eagle answers questions; tasks that compare likelihoods are not run")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refused."""
        raise UserError("megatron_eagle answers one question at a time; tasks of several rounds are not run")


def _by_options(requests: Sequence[Any]) -> dict[Options, list[int]]:
    """The places of the requests that are answered alike."""
    groups: dict[Options, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(_options(request.args[2]), []).append(place)
    return groups


def _options(wanted: Mapping[str, Any]) -> Options:
    if wanted.get("num_beams") not in (None, 1):
        raise UserError(f"num_beams={wanted['num_beams']}: there is no beam search")
    temperature = float(wanted.get("temperature") or 0) if wanted.get("do_sample", True) else 0.0
    return Options(
        max_new_tokens=int(wanted.get("max_new_tokens", NEW_TOKENS)),
        temperature=temperature,
        top_p=float(wanted.get("top_p") or 1),
        seed=0,
    )


def _until(text: str, wanted: Mapping[str, Any]) -> str:
    """The text up to the first of the task's stops."""
    stops = wanted.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text


def _messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    return [Message(_role(message["role"]), tuple(_part(part) for part in message["content"])) for message in messages]


def _role(name: str) -> Any:
    if name not in ROLES:
        raise UserError(f"a task's message is from {name!r}; known are {', '.join(ROLES)}")
    return name


def _part(part: Mapping[str, Any]) -> str | Medium:
    kind = part["type"]
    if kind == "text":
        return str(part["text"])
    if kind not in ("image", "video"):
        raise UserError(f"a task shows {kind}; there are images and videos")
    return Medium(kind, f"the task's {kind}", _bytes(part["url"]))


def _bytes(given: Any) -> bytes:
    """A file's bytes; a picture in memory becomes a PNG, of which nothing is lost."""
    if not isinstance(given, Image.Image):
        return Path(given).read_bytes()
    data = io.BytesIO()
    given.save(data, "PNG")
    return data.getvalue()
