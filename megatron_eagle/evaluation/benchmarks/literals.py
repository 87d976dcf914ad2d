"""Lists that tables hold as text: ``['a', 'b']`` is two answers, anything else is one."""

import ast
from typing import Any


def list_of(value: Any) -> list[str]:
    """The texts that ``value`` is: those of a list or of a list written as text, else itself; none of None or ''."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            read = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            read = value
        value = read if isinstance(read, list) else value
    if isinstance(value, list | tuple):
        return [str(item) for item in value if item is not None]
    return [] if value is None or value == "" else [str(value)]
