"""What an operator is: a frozen dataclass of typed settings, one file of ``curation/operators/``, called ``Operator``.

There are two shapes. A ``SampleOperator`` looks at one sample at a time; ``ExchangeRule`` is the common case of one
that looks at questions with their answers. A ``SetOperator`` needs all samples: it takes a small value of each, decides
over them, and its findings are applied like any other's. Each says what it needs of earlier ones and what it costs.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import TypeAdapter, ValidationError

from megatron_eagle.config.findings import Refused, findings_of
from megatron_eagle.config.numbers import shown
from megatron_eagle.config.schema import meant
from megatron_eagle.curation.sample import Exchange, Finding, Sample, Unit, apply_findings
from megatron_eagle.errors import BrokenSample

PACKAGE = "megatron_eagle.curation.operators"
UNREADABLE = "a medium cannot be read"


@dataclass(frozen=True)
class Row:
    """A value of one sample, for a decision over all of them. key: its source and its number there.

    benchmark: whether its source is one.
    """

    key: tuple[str, int]
    id: str
    category: str
    value: Any
    benchmark: bool = False


@dataclass(frozen=True)
class Verdict:
    """What a decision over all samples says of one of them (``key``), or of a source (``key[1]`` is None)."""

    key: tuple[str, int | None]
    finding: Finding


@dataclass(frozen=True)
class Resources:
    """What one process that applies an operator takes up. gpus: parts of one are shared. Both 0: it waits, say for an
    endpoint."""

    cpus: float = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        if self.cpus < 0 or self.gpus < 0:
            raise ValueError(f"an operator cannot take up cpus={self.cpus:g}, gpus={self.gpus:g}")


class BaseOperator(ABC):  # noqa: B024  its two shapes have the abstract methods
    """needs: operators that must come earlier, whose notes are read.

    on_benchmarks: whether it is also applied to sources that are benchmarks, which rules are not.
    """

    on_benchmarks: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()

    def reads(self) -> tuple[str, ...]:
        """``needs``, where settings have no say in it."""
        return self.needs

    def check(self, categories: Mapping[str, str], benchmarks: Sequence[str]) -> None:  # noqa: B027
        """When a plan is read: ValueError if settings do not fit its sources.

        categories: of the sources it is applied to, by name. benchmarks: names of those that are only compared with.
        """

    def check_earlier(self, earlier: Mapping[str, "Step"]) -> None:  # noqa: B027
        """When a plan is read: ValueError if what it ``reads`` will not note what it needs.

        earlier: the steps before it, by the names of their operators; all that it reads are there.
        """

    @property
    def resources(self) -> Resources:
        """Of each process that applies it, by its settings; a plan is divided where they differ."""
        return Resources()

    @property
    def name(self) -> str:
        """The file's name, which plans and ledgers use."""
        return type(self).__module__.rpartition(".")[2]

    def prepare(self, folder: Path) -> None:  # noqa: B027  most need nothing
        """Once, before anything runs: look for what the settings name; UserError if it is not there.

        folder: of the run, for what is made once and read by every process.
        """


class SampleOperator(BaseOperator):
    """Looks at one sample at a time."""

    @abstractmethod
    def findings(self, sample: Sample) -> Iterable[Finding]:
        """All there is to say of a sample; may raise BrokenSample, which rejects it."""

    def all_findings(self, samples: Sequence[Sample]) -> list[list[Finding]]:
        """The findings of each sample of a block; one that works on many at once has its own."""
        return [found_in(self, sample) for sample in samples]

    def run(
        self, samples: Iterable[Sample], reject: Unit = "exchange"
    ) -> Iterator[tuple[Sample, list[Finding], Sample | None]]:
        """Each sample, what was found in it, and what it became, None if it is gone: the operator on its own."""
        for sample in samples:
            found = found_in(self, sample)
            yield sample, found, apply_findings(sample, found, self.name, reject)


class ExchangeRule(SampleOperator):
    """Looks at each question with its answer, and rejects what is faulty."""

    @abstractmethod
    def fault(self, exchange: Exchange) -> tuple[str, str] | None:
        """(reason, detail) of what is wrong, None if nothing is."""

    def findings(self, sample: Sample) -> Iterable[Finding]:
        """A rejection of each faulty answer."""
        for exchange in sample.exchanges:
            found = self.fault(exchange)
            if found is not None:
                yield Finding("rejected", found[0], found[1][:200], exchange.turn)


class SetOperator(BaseOperator):
    """Needs all samples. holds: bytes a sample in memory while it decides; 'curate operators' says it."""

    holds: ClassVar[int]

    @abstractmethod
    def value(self, sample: Sample) -> Any:
        """A small JSON value of a sample, None if it takes no part; may raise BrokenSample."""

    @abstractmethod
    def decide(self, rows: Iterator[Row]) -> Iterator[Verdict]:
        """Findings over all values, which come in the order of the plan's sources and of their samples."""

    def run(self, samples: Iterable[Sample]) -> list[Verdict]:
        """The operator on its own."""
        rows = ((sample, self.value(sample)) for sample in samples)
        return list(
            self.decide(
                Row((sample.source, sample.number), sample.conversation.id, sample.category, value)
                for sample, value in rows
                if value is not None
            )
        )


@dataclass(frozen=True)
class Step:
    """An operator in its place. sources: those it is applied to. reject: what goes with a faulty answer."""

    operator: BaseOperator
    sources: frozenset[str]
    reject: Unit


def found_in(operator: SampleOperator, sample: Sample) -> list[Finding]:
    """The findings of an operator; media that cannot be read reject the sample."""
    try:
        return list(operator.findings(sample))
    except BrokenSample as error:
        return [Finding("rejected", UNREADABLE, str(error)[:200])]


@lru_cache
def operator_names() -> tuple[str, ...]:
    """All operators there are."""
    folder = Path(__file__).parent / "operators"
    return tuple(sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_")))


def operator_class(name: Any) -> type[BaseOperator]:
    """The operator of this name; ValueError with those there are."""
    if not isinstance(name, str) or name not in operator_names():
        names = f"{', '.join(operator_names())}{meant(name, operator_names())}"
        raise ValueError(f"operator {shown(name)} does not exist; there are {names}")
    found: type[BaseOperator] = importlib.import_module(f"{PACKAGE}.{name}").Operator
    return found


def make_operator(name: Any, settings: dict[str, Any]) -> BaseOperator:
    """The operator with its settings checked; ValueError."""
    kind = operator_class(name)
    try:
        return TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        raise Refused(findings_of(error, kind), f"operator '{name}'") from None


def describe_operators() -> list[str]:
    """Every operator with what it is for, its settings and their defaults, for people."""
    lines = []
    for name in operator_names():
        kind = operator_class(name)
        what = (importlib.import_module(kind.__module__).__doc__ or "").split("\n")[0]
        held = f" Holds {kind.holds} bytes a sample." if issubclass(kind, SetOperator) and kind.holds else ""
        lines.append(f"{name}: {what}{held}")
        lines += [f"    {one.name}: {_default(one)}" for one in fields(kind)]  # type: ignore[arg-type]
    return lines


def _default(field: Field[Any]) -> str:
    if field.default_factory is not MISSING:
        return shown(field.default_factory())
    return "needed" if field.default is MISSING else shown(field.default)
