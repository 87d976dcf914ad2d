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
_BOX = re.compile(r"\\(?:boxed|fbox)\{(?P<box>(?:[^{}]|\{[^{}]*\})*)\}")
_DOLLAR = r"(?<!\\)\$"
# As Pandoc tells formulas from prices: no space inside of the dollars, and no digit behind the last.
_FORMULA = (
    rf"{_DOLLAR}\$(?P<display>.+?){_DOLLAR}\$|{_DOLLAR}(?=[^\s$])(?P<line>(?:\\.|[^$\\])+)(?<!\s)\$(?!\d)"
    r"|(?<!\\)\\\((?P<round>.+?)\\\)|(?<!\\)\\\[(?P<square>.+?)\\\]"
    r"|\\begin\{(?P<name>(?:align|equation|gather|displaymath|math)\*?)\}.*?\\end\{(?P=name)\}"
)
_FORMULA_OR_BOX = re.compile(f"{_FORMULA}|{_BOX.pattern}", re.DOTALL)
_MATHS = re.compile(r"[=^_+<>]|\\(?!\\)[a-zA-Z]+|\d\s*[-*/]\s*\d")
# A number or words: one letter, two or capitals may be variables.
_NO_MATHS = r"\s*(\d[\d.,]*\s*%?|[A-Za-z][a-z]{2,}(?:\s+[A-Za-z]?[a-z]+)*)\s*"
_WHOLE = (
    re.compile(r"\*\*([^*]+)\*\*\Z"),
    re.compile(r"```(?:text|plaintext)?\n([^`\n]+)\n```\Z"),
    re.compile(rf"\$\$?{_NO_MATHS}\$\$?\Z"),
    re.compile(rf"\\\({_NO_MATHS}\\\)\Z"),
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
    text = _FORMULA_OR_BOX.sub(_unboxed, answer)
    text = _ENVIRONMENT.sub(_plain_words, text).strip()
    for whole in _WHOLE:
        if match := whole.match(text):
            text = match[1].strip()
    return text


def _unboxed(match: re.Match[str]) -> str:
    """A box outside of formulas, or a formula that is nothing but a box, as what it holds; others lose their boxes."""
    formula = next((match[name] for name in ("display", "line", "round", "square") if match[name]), "")
    alone = _BOX.fullmatch(formula.strip())
    inside = alone["box"] if alone else match["box"]
    if inside is None:
        return _BOX.sub(_bare, match[0])
    words = _COMMAND.sub(r"\1", inside)
    if not _MATHS.search(words) or re.search(_DOLLAR, inside):
        return words
    whole = len(re.findall(_DOLLAR, match.string)) % 2 == 0  # otherwise it may be in a formula that does not end
    return f"${inside}$" if whole else match[0]


def _bare(box: re.Match[str]) -> str:
    """What a box inside of a formula holds; spaces, which do not count there, keep it from what stands beside it."""
    before, after = box.string[: box.start()][-1:], box.string[box.end() :][:1]
    return " " * before.isalnum() + box["box"] + " " * after.isalnum()


def _plain_words(match: re.Match[str]) -> str:
    """What an environment holds, if it is plain words; otherwise the environment as it stands."""
    words = _COMMAND.sub(r"\1", match[3])
    if _MATHS.search(words):
        return match[0]
    return "\n".join(line.strip().strip("&").strip() for line in words.split("\\\\")).strip()
