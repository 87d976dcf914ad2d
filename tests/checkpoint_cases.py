"""Small models of the five published shapes, released checkpoints of random numbers, and saving them in a layout."""

import json
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from safetensors.torch import save_file

from megatron_eagle.checkpoint.files import DESCRIPTION, Description, load_weights
from megatron_eagle.checkpoint.sharded_state import CONTENT, sharded_weights
from megatron_eagle.compat.checkpoint_saving import collect_results_here
from megatron_eagle.compat.platform import install
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import EagleConfig, QwenConfig
from megatron_eagle.config.presets import PRESETS
from megatron_eagle.conversion.export import write_configs
from megatron_eagle.conversion.released import Dialect
from megatron_eagle.model.eagle import build_eagle
from megatron_eagle.model.tile_encoder import build_tile_encoder
from megatron_eagle.parallel.groups import initialise

SIGLIP = {
    "kind": "siglip",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
DINOV2 = {**SIGLIP, "kind": "dinov2"}
CONVNEXT = {"kind": "convnext", "depths": (1, 2, 1, 1), "hidden_sizes": (8, 8, 16, 24), "image_size": 64}
SHAPES = ("eagle2-1b", "eagle2-2b", "eagle2-9b", "eagle2-34b", "eagle2.5-8b")
LAYERS = 4
# Eight query heads and as many groups as the published model has at tp=2; odd vocabularies, so that there is padding.
GROUPS = {"eagle2-1b": 2, "eagle2-2b": 2, "eagle2-9b": 4, "eagle2-34b": 8, "eagle2.5-8b": 4}


def reduced(shape: str) -> EagleConfig:
    """A published model at a fraction of its width: same encoders, same tying, same way of padding."""
    whole = PRESETS[shape]
    encoders = tuple({"siglip": SIGLIP, "convnext": CONVNEXT}[settings["kind"]] for settings in whole.encoders)
    language = QwenConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=GROUPS[shape],
        vocab_size=460 + SHAPES.index(shape),
        tie_word_embeddings=whole.language.tie_word_embeddings,
        initializer_range=0.1,
    )
    return EagleConfig(tile_size=32, encoders=encoders, language=language)


def write_released(
    folder: Path, config: EagleConfig, dialect: Dialect, seed: int = 1, dtype=torch.float32, ours: bool = False
) -> dict:
    """A released checkpoint of random numbers, written by the safetensors library; returns its tensors.

    ours: config.json describes the model as we do when we export one; NVIDIA's have no such key.
    """
    from megatron_eagle.model.eagle import parameter_shapes

    generator = torch.Generator().manual_seed(seed)
    shapes, state = parameter_shapes(config), {}
    for parameter, source in dialect.sources(config).items():
        for name, part in zip(source.names, source.split(torch.empty(shapes[parameter], device="meta")), strict=True):
            std = part[0].numel() ** -0.5 if part.ndim > 1 else 0.2
            state[name] = (torch.randn(part.shape, generator=generator) * std).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    write_configs(folder, config, dialect, "own", dtype=dtype, ids={"<IMG_CONTEXT>": 5}, tokens_per_tile=4)
    if not ours:
        config_file = json.loads((folder / "config.json").read_text())
        del config_file["megatron_eagle"]
        (folder / "config.json").write_text(json.dumps(config_file))
    return state


def resave(source: str, config: EagleConfig, layout: Layout, folder: str, precision: str = "fp32") -> None:
    """In every process of a world: load ``source`` in ``layout`` as training does, and save it again."""
    platform = install()
    groups = initialise(layout, platform, timeout=timedelta(seconds=60))
    modules = []
    for number in range(layout.vpp or 1):
        stage = number if layout.vpp else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        options = {"precision": precision, "pre_process": first, "post_process": last, "vp_stage": stage, "seed": 99}
        modules.append(build_eagle(config, layout, **options))
    if layout.encoder == "spread":
        copy = {"self_group": groups.self_group, "copies": groups.world_group, "precision": precision, "seed": 99}
        modules.append(build_tile_encoder(config, **copy))
    load_weights(Path(source), modules)
    state = sharded_weights(modules)
    if groups.rank == 0:
        Path(folder).mkdir()
        description = Description("test", 3, 3, asdict(config), asdict(layout), groups.dp_size)
        (Path(folder) / DESCRIPTION).write_text(json.dumps(asdict(description)))
    torch.distributed.barrier()
    collect_results_here()
    dist_checkpointing.save(state, folder, content_metadata=CONTENT)
