"""precision: fp8 over the stub: what of the model gets it, and the very context that Megatron enters around layers.

Nothing is computed: Transformer Engine's check of the device is answered for it.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import stub
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.transformer.transformer_layer import TransformerLayer
from small_run import ENCODERS, LANGUAGE, SmallRun
from test_over_the_stub import start

from megatron_eagle.checkpoint import sharded_state
from megatron_eagle.config.fp8 import FORMATS
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.errors import UserError
from megatron_eagle.model.eagle import EagleModel, build_eagle
from megatron_eagle.model.fp8 import require_fp8

pytestmark = pytest.mark.slow
RECIPES = {"tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling"}
WIDE = LANGUAGE | {"hidden_size": 512, "intermediate_size": 256}


def model_of(recipe: str) -> EagleModel:
    """The model of a recipe, over the stub."""
    settings = load_recipe(Path(recipe))
    return build_eagle(
        settings.model.eagle(),
        settings.layout,
        transformer_impl="transformer_engine",
        precision=settings.weight_precision,
        fp8=settings.fp8,
        pre_process=True,
        post_process=True,
    )


def write(folder: Path, scaling: str, **changes: Any) -> str:
    """A recipe in fp8 with layers that are wide enough."""
    model = {"preset": "tiny", "encoders": ENCODERS, "language": WIDE, "transformer_impl": "transformer_engine"}
    settings = {"model": model, "precision": "fp8", "fp8_recipe": scaling}
    return str(SmallRun(folder).write_recipe(folder / "recipe.yaml", **settings, **changes))


def built(recipe: str) -> dict[str, Any]:
    """What is in fp8, and how Megatron's own context for a layer turns out, on this process."""
    from megatron.core.fp8_utils import get_fp8_context
    from transformer_engine.pytorch import quantization

    start(recipe)
    with stub.building():
        model = model_of(recipe)
    language = model.language.decoder.config
    entered: dict[str, Any] = {}

    def enter(**given: Any) -> None:
        entered.update(given)

    with (
        mock.patch.object(quantization, "check_recipe_support", lambda recipe: None),
        mock.patch.object(quantization.FP8GlobalStateManager, "autocast_enter", enter),
        mock.patch.object(quantization.FP8GlobalStateManager, "autocast_exit", lambda *args, **named: None),
        get_fp8_context(language, 0),
    ):
        pass
    scaling = entered.get("fp8_recipe") or entered["recipe"]
    return {
        "language": (language.fp8, language.fp8_recipe, language.fp8_param),
        "vision": {m.config.fp8 for m in model.vision.modules() if isinstance(m, TransformerLayer)},
        "scaling": type(scaling).__name__,
        "format": scaling.fp8_format.name.lower(),
        "output": type(model.language.output_layer).__name__,
        "layers": {type(m).__name__ for m in model.language.decoder.modules() if "Linear" in type(m).__name__},
        "dtypes": {parameter.dtype for parameter in model.parameters()},
    }


@pytest.mark.parametrize("scaling", RECIPES)
@pytest.mark.parametrize("processes", [1, 2])
def test_the_language_models_linear_layers_and_nothing_else(stubbed, tmp_path, scaling, processes) -> None:
    layout = {"tp": 2, "sequence_parallel": True} if processes == 2 else {}
    for found in stubbed(processes).run(built, write(tmp_path, scaling, layout=layout)):
        assert found["language"] == (FORMATS[scaling], scaling, False)
        assert found["vision"] == {None}
        assert (found["scaling"], found["format"]) == (RECIPES[scaling], FORMATS[scaling])
        assert found["output"] == "ColumnParallelLinear", "Megatron's, outside the context"
        assert found["layers"] == {"TELayerNormColumnParallelLinear", "TERowParallelLinear"}
        assert found["dtypes"] == {torch.bfloat16}


def saved_after_a_pass(recipe: str) -> tuple[int, int, list[str], bool]:
    """Extra states with something in them as a forward pass in fp8 leaves them: how many, their largest number of
    bytes; those that a checkpoint holds; whether loading it leaves the modules as they are."""
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    start(recipe)
    with stub.building(), mock.patch("torch.cuda.synchronize"):
        model = model_of(recipe)
        scaling = get_fp8_recipe(model.language.decoder.config)
        linear = [m for m in model.language.decoder.modules() if isinstance(m, TransformerEngineBaseModule)]
        for module in linear:
            module.fp8, module.fp8_meta["recipe"] = True, scaling
        sizes = [module.get_extra_state().numel() for module in linear if hasattr(module, "weight")]
        state = sharded_state.sharded_weights([model])
    stored = [
        entry.key for entry in nested_values(state) if isinstance(entry, ShardedBase) and "extra_state" in entry.key
    ]
    loaded = {
        name: entry.unwrap() if isinstance(entry, LocalNonpersistentObject) else entry.data
        for name, entry in state["model0"].items()
    }
    set_up = mock.patch.object(TransformerEngineBaseModule, "init_fp8_meta_tensors", lambda *args: None)
    with set_up, mock.patch("torch.cuda.synchronize"):
        sharded_state.load_modules([model], {"model0": loaded}, "base")
    return len(sizes), min(sizes), stored, all(m.fp8_meta["recipe"].__class__ is scaling.__class__ for m in linear)


@pytest.mark.parametrize("scaling", RECIPES)
def test_a_checkpoint_is_what_it_is_without(stubbed, tmp_path, scaling) -> None:
    """Transformer Engine pickles its recipe into each layer's extra state; it is neither stored nor an error."""
    ((count, smallest, stored, kept),) = stubbed(1).run(saved_after_a_pass, write(tmp_path, scaling))
    assert count == 2 * 4 and smallest > 0 and stored == [] and kept


def refused(recipe: str) -> list[str]:
    """Transformer Engine's own words on a device of an older kind."""
    from transformer_engine.pytorch import quantization

    said = []
    for scaling in RECIPES:
        with (
            mock.patch.object(quantization, "get_device_compute_capability", return_value=(8, 0)),
            pytest.raises(UserError) as refusal,
        ):
            require_fp8(scaling, "cuda")
        said.append(str(refusal.value))
    return said


def test_an_older_gpu_is_refused_with_the_reason(stubbed) -> None:
    (said,) = stubbed(1).run(refused, "")
    assert [line.split(" cannot run here: ")[0] for line in said] == [
        f"precision: fp8 with fp8_recipe: {scaling}" for scaling in RECIPES
    ]
    assert all("apability" in line for line in said)
