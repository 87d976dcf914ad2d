r"""Takes decorations off answers: LaTeX environments around plain words, boxes, bold and fences around a whole answer.

Eagle 2 removes them because they leak: a model trained on ``\begin{align*}`` writes it where there is no equation.
"""

import re
from collections.abc import Iterable

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.curation.operator import SampleOperator
from megatron_eagle.curation.sample import Finding, Sample
from megatron_eagle.data.sample.markers import escape_marks

_ENVIRONMENT = re.compile(
    r"\\begin\{(align|equation|gather|displaymath|math|center|document)(\*?)\}(.*?)\\end\{\1\2\}", re.DOTALL
)
_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|textrm|operatorname)\{([^{}]*)\}")
_BOXED = re.compile(r"\$?\\(?:boxed|fbox)\{((?:[^{}]|\{[^{}]*\})*)\}\$?")
_MATHS = re.compile(r"[=^_+<>]|\\(?!\\)[a-zA-Z]+|\d\s*[-*/]\s*\d")
_WHOLE = (
    re.compile(r"\*\*([^*]+)\*\*\Z"),
    re.compile(r"```(?:text|plaintext)?\n([^`\n]+)\n```\Z"),
    re.compile(r"\$\$?([\w\s.,%]+)\$\$?\Z"),
    re.compile(r"\\\(([\w\s.,%]+)\\\)\Z"),
)


@dataclass(frozen=True, config=STRICT)
class Operator(SampleOperator):
    """No settings. What holds an equation keeps its environment."""

    def findings(self, sample: Sample) -> Iterable[Finding]:
        """Changed answers."""
        for exchange in sample.exchanges:
            plain = undecorated(exchange.answer)
            if plain != exchange.answer and plain:
                yield Finding("changed", "decorations removed", turn=exchange.turn, text=escape_marks(plain))


def undecorated(answer: str) -> str:
    """The answer without what only decorates it."""
    text = _BOXED.sub(lambda match: _boxed(match[1], match[0]), answer)
    text = _ENVIRONMENT.sub(_plain_words, text).strip()
    for whole in _WHOLE:
        if match := whole.match(text):
            text = match[1].strip()
    return text


def _boxed(inside: str, whole: str) -> str:
    """What a box holds, as a formula if it is one."""
    words = _COMMAND.sub(r"\1", inside)
    return f"${inside}$" if _MATHS.search(words) else words


def _plain_words(match: re.Match[str]) -> str:
    """What an environment holds, if it is plain words; otherwise the environment as it stands."""
    words = _COMMAND.sub(r"\1", match[3])
    if _MATHS.search(words):
        return match[0]
    return "\n".join(line.strip().strip("&").strip() for line in words.split("\\\\")).strip()
