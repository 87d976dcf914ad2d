"""Packing rules: which samples share a pack, a pure function of their sizes.

A rule is a file here with one function ``pack`` (``PackingRule``); recipes and reports know it by the name of its file,
and nothing else has to be edited. Rules import neither torch nor Megatron.
"""

from importlib import import_module
from typing import Protocol

from megatron_eagle.config.packing_rules import known_rule
from megatron_eagle.data.order.sample_sizes import SampleSizes


class PackingRule(Protocol):
    """What a rule's file calls ``pack``."""

    def __call__(self, samples: SampleSizes, spare: int) -> list[list[int]]:
        """Packs of ``samples.longest_first``, each sample in one of them, as indices into ``samples.lengths``.

        spare: packs to use beyond those that the samples need; a rule that wants the fewest ignores it.
        """


def packing_rule(name: str) -> PackingRule:
    """The rule of that name; ValueError names those there are."""
    rule: PackingRule = import_module(f"{__name__}.{known_rule(name)}").pack
    return rule
