"""The version of megatron-core whose private names ``compat`` knows, and the refusal of any other.

The tests below tests/compat say which of those names another version has changed.
"""

import importlib.metadata

from megatron_eagle.errors import UserError

MEGATRON_CORE = "0.16.1"


def require_known_megatron(reason: str) -> None:
    """Raise a UserError, which begins with ``reason``, unless the installed megatron-core is the known one."""
    version = importlib.metadata.version("megatron-core")
    if version != MEGATRON_CORE:
        raise UserError(f"{reason} of megatron-core {MEGATRON_CORE}; this installation has {version}")
