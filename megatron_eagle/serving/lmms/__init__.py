"""lmms-eval plug-in: ``lmms_eval --model megatron_eagle --model_args model=runs/demo/export`` runs any of its tasks.

lmms-eval finds the entry point ``lmms_eval.models`` of this package where both are installed. The model
is loaded as ``megatron-eagle ask`` loads one, and asked through the code that its export carries.
"""

from typing import Any

NAME = "megatron_eagle"


def manifest() -> Any:
    """What the entry point gives: a ``ModelManifest`` of lmms-eval, which alone calls this."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, chat_class_path="megatron_eagle.serving.lmms.model.MegatronEagle")
