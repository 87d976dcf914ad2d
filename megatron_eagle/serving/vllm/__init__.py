"""vLLM plug-in: exported Eagles in ``vllm serve``, with the tiles, frames and words that they were trained on.

vLLM itself has no mixture of encoders, and reads Eagle 2.5 otherwise than it was trained (docs/vllm.md). The package is
installed beside vLLM in an environment of its own, so it imports vLLM, what vLLM brings, and the code that exports
carry: nothing of the trainer.
"""

from collections.abc import Collection, Sequence

ARCHITECTURE = "MegatronEagleForConditionalGeneration"


def register() -> None:
    """Entry point of ``vllm.general_plugins``: called in every process of vLLM, and harmless when called again."""
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import get_config_parser, register_config_parser

    from megatron_eagle.serving.vllm.config import ExportParser

    ModelRegistry.register_model(ARCHITECTURE, "megatron_eagle.serving.vllm.model:ServedEagle")
    if not isinstance(get_config_parser("hf"), ExportParser):
        register_config_parser("hf")(ExportParser)


def check_encoders(kinds: Sequence[str], known: Collection[str]) -> None:
    """ValueError if a folder's model has encoders that this plug-in's code does not make: those of other packages."""
    if strange := [kind for kind in kinds if kind not in known]:
        raise ValueError(
            f"the model has the encoders {', '.join(strange)}, which the vLLM plug-in does not have; it has "
            f"{', '.join(known)}. 'megatron-eagle serve' serves it by the code that its folder carries"
        )
