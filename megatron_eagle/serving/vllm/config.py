"""Which folders the plug-in takes, decided where vLLM reads a config.json.

An export keeps the names of the released architectures, one of which vLLM has a model of its own for. So it is not the
name that decides: a folder is ours if its ``auto_map`` points to the code that our exports carry. vLLM is then told
another architecture; every other folder is read as if the plug-in were not there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from vllm.transformers_utils.config import HFConfigParser

from megatron_eagle.remote_code.configuration_eagle import Eagle2_5_VLConfig, Eagle2ChatConfig
from megatron_eagle.serving.vllm import ARCHITECTURE

_CONFIGS = {f"configuration_eagle.{own.__name__}": own for own in (Eagle2ChatConfig, Eagle2_5_VLConfig)}


def carried_config(said: Mapping[str, Any]) -> type[PreTrainedConfig] | None:
    """The config class of a folder that carries our code, from its config.json; None for any other folder."""
    pointed: str = (said.get("auto_map") or {}).get("AutoConfig", "")
    return _CONFIGS.get(pointed.split("--")[-1])  # a hub writes the repository before the name


class ExportParser(HFConfigParser):
    """vLLM's reader of config.json. The code of ours that a folder carries is the plug-in's, so it needs no trust."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], PreTrainedConfig]:
        reading = {name: value for name, value in kwargs.items() if name not in ("hf_overrides", "trust_remote_code")}
        said, _ = PreTrainedConfig.get_config_dict(model, revision=revision, **reading)
        own = carried_config(said)
        if own is not None:
            AutoConfig.register(own.model_type, own, exist_ok=True)
        said, config = super().parse(model, trust_remote_code, revision, code_revision, **kwargs)
        if own is not None:
            config.architectures = [ARCHITECTURE]
        return said, config
