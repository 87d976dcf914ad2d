"""The Python files that an exported folder carries: written by the exporter, and compared with before they are run.

Without torch or Megatron, which whoever only asks a model need not have.
"""

from collections.abc import Collection
from pathlib import Path

from megatron_eagle.config.encoders import encoder_spec

REMOTE_CODE = Path(__file__).parents[1] / "remote_code"
ENCODERS = "encoders_eagle.py"


def carried_code(outside: Collection[str]) -> dict[str, bytes]:
    """File name -> content: our code, and that of encoders of other packages, which some lines each add to ours.

    outside: kinds of those encoders; ValueError or UserError if one does not exist or has no ``exported.py``.
    """
    files = {file.name: file.read_bytes() for file in sorted(REMOTE_CODE.glob("*_eagle.py"))}
    for kind in sorted(set(outside)):
        files[f"{kind}_eagle.py"] = Path(str(encoder_spec(kind).part("exported").__file__)).read_bytes()
        files[ENCODERS] += (
            f"\n\nfrom .{kind}_eagle import build, channels, features  # noqa: E402, F811\n\n"
            f'KINDS["{kind}"] = Kind(build, features, channels)\n'
        ).encode()
    return files
