"""How a layer's spec names its MLP, which is said in one way before megatron-core 0.19 and in another from then on.

Leaned on: before 0.19, ``ModuleSpec(MLP, submodules=...)``; from 0.19 on ``MLP.as_mlp_submodule``, which is public. The
older form still works there, with a warning for every layer.
"""

import functools
from typing import Any

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_eagle.compat.versions import is_before_0_19


def mlp_submodule(linear_fc1: Any, linear_fc2: Any, activation: Any = None) -> Any:
    """What stands in a layer's slot ``mlp``: Megatron's MLP of these two linear layers.

    activation: the module between them, taken if the config's ``use_te_activation_func`` says so.
    """
    submodules = MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2, activation_func=activation)
    if is_before_0_19():
        return ModuleSpec(module=MLP, submodules=submodules)
    return functools.partial(MLP.as_mlp_submodule, submodules=submodules)
