"""An exported folder as an ``Answerer``, by the code it carries, which is run only if it is this package's own."""

from pathlib import Path

import torch

from megatron_eagle.errors import UserError
from megatron_eagle.serving.answerer import Answerer
from megatron_eagle.serving.limits import Limits


def load_answerer(
    folder: Path,
    *,
    name: str | None = None,
    device: str | None = None,
    limits: Limits | None = None,
    trust: bool = False,
) -> Answerer:
    """The exported model in ``folder`` on ``device``, by default a GPU if there is one.

    trust: run the folder's code even if it is not what this package writes. Raises UserError if the folder is not one.
    """
    from transformers import AutoModelForCausalLM, AutoProcessor

    check_code(folder, trust=trust)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, local_files_only=True, dtype="auto"
        ).to(place)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:400]}") from error
    return Answerer(name or folder.resolve().name, model, processor, limits)


def check_code(folder: Path, *, trust: bool) -> None:
    """Refuse to run code that somebody else may have put into a folder: only what this package writes is run."""
    from megatron_eagle import remote_code

    if trust:
        return
    own = Path(remote_code.__file__).parent
    files = sorted(folder.glob("*.py"))
    if not files:
        raise UserError(f"{folder} brings no code to load it by; 'megatron-eagle convert' writes folders that do")
    for file in files:
        if not (own / file.name).is_file() or (own / file.name).read_bytes() != file.read_bytes():
            raise UserError(
                f"{file} is not the code that this version of megatron-eagle exports; export it again or, if you "
                f"trust whoever made {folder}, give --trust-code"
            )
