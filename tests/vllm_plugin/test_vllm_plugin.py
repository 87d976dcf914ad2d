"""The vLLM plug-in on exports at reduced width: weights, encoders, tokens, tiles and answers, in vLLM itself.

Runs where vLLM is, without the trainer (``make test-vllm``). What vLLM is held against was written beforehand, by the
trainer and by the code that the exports carry (``write_exports.py``). vLLM's build for a CPU runs all of it, its own
language model too.
"""

import gc
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM has an environment of its own: make test-vllm", allow_module_level=True)

from safetensors.torch import load_file, save_file
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.config import LoadConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache import processor_only_cache_from_config
from vllm.multimodal.media.base import MediaWithBytes
from vllm.plugins import load_general_plugins
from vllm.transformers_utils.config import get_config, get_config_parser

from megatron_eagle.serving.vllm import ARCHITECTURE, register
from megatron_eagle.serving.vllm.config import ExportParser

EXPORTS = Path(__file__).parents[2] / ".vllm" / "exports"
NAMES = ("mixture", "mixture-tied", "siglip", "siglip-tied")
MEDIA = "<image>|<video>"

if not EXPORTS.is_dir():
    pytest.skip(f"no exports in {EXPORTS}: make test-vllm writes them", allow_module_level=True)


@dataclass(frozen=True)
class Served:
    """An export in vLLM. answers: what its own code says; processor: vLLM's multimodal processor for it."""

    name: str
    llm: LLM
    answers: Any
    processor: Any

    @property
    def folder(self) -> Path:
        return EXPORTS / self.name

    def call(self, function: Any) -> Any:
        """``function`` of the model."""
        (found,) = self.llm.apply_model(function)
        return found


def conversations() -> list[dict[str, Any]]:
    return json.loads((EXPORTS / "conversations.json").read_text(encoding="utf-8"))


def tiles_of(number: int) -> torch.Tensor:
    return torch.from_numpy(np.load(EXPORTS / "tiles.npz")[str(number)])


def messages_of(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    """As a client sends them: parts of text, and URLs of files."""
    files = {kind: iter(conversation[kind]) for kind in ("image", "video")}
    return [{**one, "content": list(parts(one["content"], files))} for one in conversation["messages"]]


def parts(text: str, files: dict[str, Iterator[str]]) -> Iterator[dict[str, Any]]:
    for part in filter(None, re.split(f"({MEDIA})", text)):
        kind = part.strip("<>")
        if re.fullmatch(MEDIA, part):
            yield {"type": f"{kind}_url", f"{kind}_url": {"url": f"file://{EXPORTS}/media/{next(files[kind])}"}}
        else:
            yield {"type": "text", "text": part}


def prompt_of(served: Served, conversation: dict[str, Any]) -> list[int]:
    """Tokens of the text with its marks, as vLLM makes them before it looks at the media."""
    tokenizer = served.llm.get_tokenizer()
    text = tokenizer.apply_chat_template(conversation["messages"], tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text)


def media_of(conversation: dict[str, Any]) -> dict[str, list[Any]]:
    """As vLLM hands on what it fetched: decoded in its own way (here, to nothing right), and the bytes."""
    wrong = {"image": Image.new("RGB", (8, 8)), "video": (np.zeros((1, 8, 8, 3), np.uint8), {"fps": 1.0})}
    return {
        kind: [MediaWithBytes(wrong[kind], (EXPORTS / "media" / name).read_bytes()) for name in conversation[kind]]
        for kind in ("image", "video")
        if conversation[kind]
    }


def process(served: Served, prompt: list[int], media: dict[str, list[Any]], cache: Any = None) -> Any:
    items = served.processor.info.parse_mm_data(media)
    return served.processor(prompt, items, cache=cache)


@pytest.fixture(scope="module", params=NAMES)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    llm = LLM(
        str(EXPORTS / request.param),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=4,
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        limit_mm_per_prompt={"image": 4, "video": 3},
        allowed_local_media_path=str(EXPORTS),
    )
    processor = MULTIMODAL_REGISTRY.create_processor(llm.llm_engine.model_config)
    yield Served(request.param, llm, np.load(EXPORTS / f"{request.param}.npz"), processor)
    del llm, processor
    gc.collect()
    cleanup_dist_env_and_memory()


def test_the_plugin_is_found_registers_again_and_needs_nothing_of_the_trainer() -> None:
    load_general_plugins()  # by the entry point of the installed package
    assert ARCHITECTURE in ModelRegistry.get_supported_archs()
    for _ in range(2):
        register()
    assert type(get_config_parser("hf")) is ExportParser
    assert importlib.util.find_spec("megatron") is None and "megatron_eagle.training" not in sys.modules


@pytest.mark.parametrize("pointed", [None, "nvidia/Eagle2.5-8B--configuration_eagle2_5_vl.Eagle2_5_VLConfig"])
def test_other_folders_are_read_as_without_the_plugin(tmp_path: Path, pointed: str | None) -> None:
    register()
    said = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    config = said if pointed is None else {**said, "auto_map": {"AutoConfig": pointed}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert get_config(tmp_path, trust_remote_code=False).architectures == ["Qwen2ForCausalLM"]
    theirs = ModelRegistry.models["Eagle2_5_VLForConditionalGeneration"]
    assert theirs.module_name == "vllm.model_executor.models.eagle2_5_vl"


def test_an_export_is_recognised_and_its_weights_are_those_of_the_folder(served: Served) -> None:
    config = served.llm.llm_engine.model_config
    assert config.architectures == [ARCHITECTURE] and not config.trust_remote_code and config.is_multimodal_model
    stored = load_file(served.folder / "model.safetensors")
    own = served.call(lambda model: {name: p.detach().clone() for name, p in model.named_parameters()})
    vision = {name: tensor for name, tensor in stored.items() if not name.startswith("language_model.")}
    assert len(vision) > 40 and all(torch.equal(own[name], tensor) for name, tensor in vision.items())
    language = {name for name in stored.keys() - vision.keys() if name not in own}  # vLLM arranges the language model
    assert {name.split(".")[-2] for name in language} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_folder_of_other_weights_is_refused_by_name(served: Served, tmp_path: Path, change: str) -> None:
    stored = load_file(served.folder / "model.safetensors")
    name = "mlp1.3.bias"
    if change == "missing":
        del stored[name]
    else:
        name = "mlp1.4.bias"
        stored[name] = torch.zeros(1)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    config = copy(served.llm.llm_engine.model_config)
    config.model = str(tmp_path)
    loader, whole = DefaultModelLoader(LoadConfig()), served.llm.llm_engine.vllm_config
    others = mock.patch.dict(whole.compilation_config.static_forward_context, clear=True)  # the engine's own layers
    with others, set_current_vllm_config(whole), torch.device("meta"):
        model = initialize_model(whole)
        with pytest.raises(ValueError, match=re.escape("mlp1.4" if change == "unexpected" else name)):
            loader.load_weights(model, config)


def test_encoders_and_connector_give_what_the_exports_own_code_gives(served: Served) -> None:
    tiles = tiles_of(3)
    with torch.inference_mode():
        features = served.call(lambda model: model.features(tiles))
    theirs = torch.from_numpy(served.answers["features"])
    assert features.shape == theirs.shape == (len(tiles), 4, 64) and float(theirs.std()) > 0.1
    difference = float((features - theirs).abs().max())
    print(f"{served.name}: features differ by {difference:.1e}, the largest is {float(theirs.abs().max()):.2f}")
    assert difference <= 1e-5


def test_tokens_and_tiles_are_those_of_training(served: Served) -> None:
    for number, conversation in enumerate(conversations()):
        found = process(served, prompt_of(served, conversation), media_of(conversation))
        assert found["prompt_token_ids"] == conversation["ids"], number
        check_places(served, found, tiles_of(number))


def check_places(served: Served, found: Any, expected: torch.Tensor) -> None:
    """Placeholders hold each tile's tokens once and no others, and their media the tiles, in the prompt's order."""
    ids = torch.tensor(found["prompt_token_ids"])
    image = served.processor.info.processor.image_token_id
    placed = sorted(
        ((place, kind, number) for kind, own in found["mm_placeholders"].items() for number, place in enumerate(own)),
        key=lambda one: one[0].offset,
    )
    covered = torch.zeros(len(ids), dtype=torch.int64)
    tiles = []
    for place, kind, number in placed:
        mask = torch.ones(place.length, dtype=torch.bool) if place.is_embed is None else place.is_embed
        covered[place.offset : place.offset + place.length] += mask
        own = found["mm_kwargs"][kind][number].get_data()[f"{kind}_tiles"]
        assert own.dtype == torch.uint8 and int(mask.sum()) == 4 * len(own)
        tiles.append(own)
    assert torch.equal(covered, (ids == image).long()) and torch.equal(torch.cat(tiles), expected)


def test_a_remembered_video_gets_the_words_of_its_new_place(served: Served) -> None:
    cache = processor_only_cache_from_config(served.llm.llm_engine.vllm_config)
    assert cache is not None
    one, several = conversations()[4:6]
    first = media_of(one)["video"][0]
    process(served, prompt_of(served, one), {"video": [first]}, cache)
    for _ in range(2):  # new and remembered media together, and all remembered
        found = process(served, prompt_of(served, several), media_of(several), cache)
        assert found["prompt_token_ids"] == several["ids"]


def test_options_of_a_request_show_less(served: Served) -> None:
    conversation = conversations()[3]
    items = served.processor.info.parse_mm_data(media_of(conversation))
    options = {"max_dynamic_tiles": 1}
    found = served.processor(prompt_of(served, conversation), items, hf_processor_mm_kwargs=options)
    assert [len(one.get_data()["image_tiles"]) for one in found["mm_kwargs"]["image"]] == [1, 1, 1]
    with pytest.raises(TypeError, match="does not know crop_to_patches"):
        served.processor(prompt_of(served, conversation), items, hf_processor_mm_kwargs={"crop_to_patches": True})


def test_prompts_that_do_not_show_each_medium_once_are_refused(served: Served) -> None:
    tokenizer, conversation = served.llm.get_tokenizer(), conversations()[0]
    media = media_of(conversation)
    for text, reason in {
        "What shape is it?": "says <image> 0 times, 1 were given",
        "<image> or <image>?": "says <image> 2 times, 1 were given",
        "<image> <video>": "says <video> 1 times, 0 were given",
        "<image> and <IMG_CONTEXT>": "<IMG_CONTEXT> outside of its pictures",
        "<IMG_CONTEXT> and <image>": "<IMG_CONTEXT> outside of its pictures",
    }.items():
        with pytest.raises(ValueError, match=reason):
            process(served, tokenizer.encode(text), media)
    with pytest.raises(ValueError, match="metadata is required"):
        process(served, tokenizer.encode("<video>"), {"video": [np.zeros((2, 32, 32, 3), np.uint8)]})


def test_answers_are_those_of_the_exports_own_code(served: Served) -> None:
    """Whole requests through vLLM's engine: chat template, files, encoders, its own Qwen2, greedy decoding."""
    settings = SamplingParams(temperature=0, max_tokens=12, logprobs=0)
    said = conversations()
    differences = []
    for number, result in enumerate(served.llm.chat([messages_of(one) for one in said], settings, use_tqdm=False)):
        assert list(result.prompt_token_ids) == said[number]["ids"], number
        (output,) = result.outputs
        assert list(output.token_ids) == served.answers[f"answer{number}"].tolist(), number
        logprobs = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
        differences.append(np.abs(np.array(logprobs) - served.answers[f"logprobs{number}"]).max())
    print(f"{served.name}: log probabilities of {len(said)} answers differ by at most {max(differences):.1e}")
    assert max(differences) <= 1e-4


def test_other_statistics_than_those_of_the_weights_are_refused(served: Served, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(served.folder, tmp_path / "export"))
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": [0.485, 0.456, 0.406]}))
    config = copy(served.llm.llm_engine.model_config)
    config.model = str(folder)
    processor = MULTIMODAL_REGISTRY.create_processor(config, tokenizer=served.llm.get_tokenizer())
    with pytest.raises(ValueError, match=r"image_mean=\[0.485, 0.456, 0.406\]"):
        processor.info.get_hf_processor()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and vLLM's build for it")
def test_answers_on_a_gpu_in_bf16_are_likely_by_the_exports_own_code(served: Served) -> None:
    """With CUDA, every test above runs on the GPU in fp32; this adds the usual type, and vLLM's compiled graphs."""
    llm = LLM(
        str(served.folder),
        dtype="bfloat16",
        max_model_len=1024,
        gpu_memory_utilization=0.3,
        limit_mm_per_prompt={"image": 4, "video": 3},
        allowed_local_media_path=str(EXPORTS),
    )
    settings = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
    for number, result in enumerate(llm.chat([messages_of(one) for one in conversations()], settings)):
        (step,) = result.outputs[0].logprobs
        assert step[result.outputs[0].token_ids[0]].logprob >= served.answers[f"logprobs{number}"][0] - 0.1
