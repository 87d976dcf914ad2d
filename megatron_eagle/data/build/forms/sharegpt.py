"""LLaVA, ShareGPT, InternVL, Eagle: ``conversations``, a list of ``{"from", "value"}``."""

from collections.abc import Mapping
from typing import Any

from megatron_eagle.data.build.forms.draft import Said
from megatron_eagle.data.build.forms.keys import Ignored
from megatron_eagle.data.build.forms.turns import read_turns

NAME = "conversations"
KEYS = frozenset({"conversations"})


def read(record: Mapping[str, Any], ignored: Ignored) -> tuple[Said, ...]:
    """The turns of a record; raises BrokenSample."""
    return read_turns(record["conversations"], "conversations", ignored)
