"""The plan of a curation: one YAML file with its sources and the operators that they go through, in their order.

It is read as recipes are: into typed dataclasses, so that a wrong key or number, an operator that does not exist or one
that needs another's notes is refused before a sample is read, in one line that says what was meant.
"""

import hashlib
import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_eagle.config.findings import Refused, Where, checked
from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Flag, Positive, shown
from megatron_eagle.config.schema import meant
from megatron_eagle.config.yaml_file import read_yaml
from megatron_eagle.curation.operator import BaseOperator, SetOperator, Step, make_operator
from megatron_eagle.data.build.sources import DEFAULT_PROMPT, RecordSource

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


@dataclass(frozen=True, config=STRICT)
class PlannedSource:
    """One input, as ``data build`` reads it.

    path: of a file of records, a tar or a folder, such as a data set that was built; relative to the folder a command
        is started in, as media_root: folder of its media, its own by default.
    category: what it teaches; operators that compare samples of one category only need it.
    benchmark: its samples are compared with and never kept.
    prompt: the question that a mere caption answers. ignore_keys: keys left out though they are not understood.
    """

    name: Name
    path: str
    category: Name = "general"
    media_root: str | None = None
    prompt: str = DEFAULT_PROMPT
    ignore_keys: tuple[str, ...] = ()
    benchmark: Flag = False

    @cached_property
    def records(self) -> RecordSource:
        root = None if self.media_root is None else Path(self.media_root)
        return RecordSource(Path(self.path), root, self.prompt, frozenset(self.ignore_keys))


@dataclass(frozen=True, config=STRICT)
class Plan:
    """name: of the curation. block: samples that are worked on, and lost, together.

    operators: each an operator's name under ``use``, its settings beside it; ``sources``: only these, all by default;
    ``reject``: what goes with a faulty answer: its ``exchange`` (it and its question, the default) or the ``sample``.
    """

    name: Name
    sources: tuple[PlannedSource, ...]
    operators: tuple[dict[str, Any], ...] = ()
    block: Positive = 1000

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if all(source.benchmark for source in self.sources):
            raise ValueError(f"the plan has no sources{' but benchmarks' * bool(names)}")
        if len(set(names)) != len(names):
            raise ValueError(f"names of sources must differ, got {', '.join(names)}")
        compares = any(isinstance(one.operator, SetOperator) and one.operator.on_benchmarks for one in self.steps)
        benchmarks = [source.name for source in self.sources if source.benchmark]
        if benchmarks and not compares:
            raise ValueError(f"source '{benchmarks[0]}' is a benchmark, and no operator compares with it")

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The operators; Refused says which of them is wrong."""
        findings: list[tuple[Where, str]] = []
        steps: list[Step] = []
        for number, entry in enumerate(self.operators):
            where: Where = ("operators", number)
            try:
                steps.append(self._step(entry, {step.operator.name: step for step in steps}))
            except Refused as refused:
                findings += [((*where, *place), words) for place, words in refused.findings]
            except ValueError as error:
                findings.append((where, str(error)))
        if findings:
            raise Refused(findings)
        return tuple(steps)

    def _step(self, entry: dict[str, Any], earlier: dict[str, Step]) -> Step:
        settings = dict(entry)
        names = [source.name for source in self.sources if not source.benchmark]
        if "use" not in settings:
            raise ValueError(
                f"an operator needs its name under 'use', got the keys {', '.join(map(str, entry)) or 'none'}"
            )
        operator_name = settings.pop("use")
        reject = settings.pop("reject", "exchange")
        if reject not in ("exchange", "sample"):
            raise Refused([(("reject",), f"one of exchange, sample is wanted (got {shown(reject)})")])
        given = settings.pop("sources", names)
        if not isinstance(given, list | tuple) or not given:
            raise Refused([(("sources",), f"a list of names is wanted (got {shown(given)})")])
        for one in given:
            if one not in names:
                hint = meant(one, names)
                raise Refused(
                    [(("sources",), f"source {shown(one)} does not exist; there are {', '.join(names)}{hint}")]
                )
        operator = make_operator(operator_name, settings)
        missing = [name for name in operator.reads() if name not in earlier]
        if missing:
            raise ValueError(f"operator '{operator.name}' reads what '{missing[0]}' notes, which must come before it")
        if operator.name in earlier:
            raise ValueError(f"operator '{operator.name}' is given twice")
        benchmarks = [source.name for source in self.sources if source.benchmark and operator.on_benchmarks]
        operator.check({source.name: source.category for source in self.sources if source.name in given}, benchmarks)
        operator.check_earlier(earlier)
        return Step(operator, frozenset([*given, *benchmarks]), reject)

    def source(self, name: str) -> PlannedSource:
        """The source of this name."""
        return next(source for source in self.sources if source.name == name)

    def begun_with(self) -> dict[str, Any]:
        """What must be the same when a curation is continued; raises OSError or UserError if a source is not there."""
        return {
            "plan": {**asdict(self), "sources": [asdict(source) for source in self.sources]},
            "settings": [[step.operator.name, _settings(step.operator)] for step in self.steps],
            "sources": [source.records.describe() for source in self.sources],
        }


def _settings(operator: BaseOperator) -> str:
    """A digest of all settings, defaults included, and of what it takes up here, by which a plan is divided."""
    settings = {**asdict(operator), "resources": asdict(operator.resources)}  # type: ignore[call-overload]
    text = json.dumps(settings, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_plan(path: Path) -> Plan:
    """Reads and checks a plan; UserError is one line."""
    raw = read_yaml(path, "plan")
    return checked(Plan, raw, path)
