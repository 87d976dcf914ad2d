"""The versions of megatron-core whose private names ``compat`` knows, and the refusal of any other.

Two stacks are supported: Python 3.11 has megatron-core 0.16.1, the last one with wheels for it, and newer Pythons,
those of NVIDIA's containers, have 0.19.2. Where the two differ, a file of this package asks ``is_before_0_19``. The
tests below tests/compat say which of those names another version has changed.
"""

import importlib.metadata

from megatron_eagle.errors import UserError

KNOWN_MEGATRON = {"0.16.1": "Python 3.11", "0.19.2": "Python 3.12 and 3.13"}


def require_known_megatron() -> None:
    """Raise a UserError unless the installed megatron-core is a known one, with a GPU as without."""
    version = importlib.metadata.version("megatron-core")
    if version not in KNOWN_MEGATRON:
        known = " and ".join(f"{known} ({python})" for known, python in KNOWN_MEGATRON.items())
        raise UserError(
            f"megatron-core {version} is installed; private names are used as {known} have them, and every other "
            "version may have changed them: docs/install.md"
        )


def is_before_0_19() -> bool:
    """Whether the installed megatron-core is the older of the two."""
    return importlib.metadata.version("megatron-core").startswith("0.16.")
