"""Answers with a key/value cache are those without one and those of transformers, token by token, in every layout."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import checkpoint_cases as cases
import pytest
import torch
from generation_cases import (
    PACK,
    TOKENS_PER_TILE,
    Said,
    by_transformers,
    draw_prompts,
    load_exported,
    until,
    with_cache,
    without_cache,
)
from safetensors.torch import save_file
from samples import make_settings, write_video
from tokenizer_folder import QWEN_TOKENS, write_qwen_like

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import EagleConfig
from megatron_eagle.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from megatron_eagle.conversion.processor_files import RELEASED
from megatron_eagle.conversion.released import Dialect
from megatron_eagle.data.sample.conversation import parse_record
from megatron_eagle.data.sample.tokenizer import EAGLE_TOKENS, HuggingFaceTokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.shards import StoredSample
from megatron_eagle.evaluation.prompt import Prompt, prompts_of
from megatron_eagle.evaluation.questions import questions_of
from megatron_eagle.evaluation.sampling import Sampling
from megatron_eagle.model.encoders.siglip.module import normalise

MODELS = {"mixture": ("eagle2-9b", "A"), "single encoder, tied": ("eagle2-2b", "B")}
NEW_TOKENS = 12
LAYOUTS = {
    "one process": Layout(),
    "tp": Layout(tp=2),
    "tp, sequence parallel": Layout(tp=2, sequence_parallel=True),
    "pp": Layout(pp=2),
    "pp, uneven, spread": Layout(pp=2, layers_per_stage=(1, 3), encoder="spread"),
    "tp, spread": Layout(tp=2, encoder="spread"),
    "ring of two": Layout(cp=2),
    "ulysses": Layout(cp=2, ulysses=2),
}
LARGER = {
    "tp x pp": Layout(tp=2, pp=2, sequence_parallel=True),
    "tp x pp, spread": Layout(tp=2, pp=2, encoder="spread"),
    "cp x pp": Layout(cp=2, pp=2),
}


@dataclass(frozen=True)
class Case:
    """stop: the token that ends answers, chosen so that they end at different places. expected: by transformers."""

    checkpoint: str
    config: EagleConfig
    prompts: list[Prompt]
    stop: int
    expected: Said
    uncached: Said


def make_case(folder: Path, worlds, shape: str, kind: str, count: int) -> Case:
    config = cases.reduced(shape)
    (folder / "tokenizer").mkdir()
    tokenizer = write_qwen_like(folder / "tokenizer", tokens=[*QWEN_TOKENS[:3], *EAGLE_TOKENS, QWEN_TOKENS[3]])
    released = cases.write_released(folder / "hf", config, Dialect.published(config, kind), seed=3)
    # Larger weights in the layers, or a model of random ones says one word for ever.
    matrices = {name: 4 * weight for name, weight in released.items() if ".layers." in name and weight.ndim == 2}
    save_file(released | matrices, folder / "hf" / "model.safetensors", {"format": "pt"})
    hf_to_megatron([folder / "hf"], folder / "in", Options(logits=False))
    megatron_to_hf(folder / "in", folder / "out", Options(logits=False), kind=kind, tokenizer=tokenizer)
    image_token = json.loads((folder / "out" / "config.json").read_text())["image_token_index"]
    prompts = draw_prompts(count, config.language.vocab_size, image_token)
    whole = by_transformers(load_exported(folder / "out"), prompts, NEW_TOKENS)
    stop = best_stop(whole)
    (uncached,) = worlds(1).run(without_cache, str(folder / "in"), config, prompts, NEW_TOKENS, timeout=1200)
    return Case(str(folder / "in"), config, prompts, stop, until(whole, stop), until(uncached, stop))


def best_stop(whole: Said) -> int:
    """The token that ends answers at as many different lengths as one can."""
    lengths: dict[int, set[int]] = {}
    for answer in whole.values():
        for token in answer:
            lengths.setdefault(token, set()).add(answer.index(token))
    return max(lengths, key=lambda token: (len(lengths[token]), token))


@pytest.fixture(scope="module")
def case(worlds, tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp("generation"), worlds, *MODELS["mixture"], count=16)


@pytest.fixture(scope="module")
def single(worlds, tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp("single"), worlds, *MODELS["single encoder, tied"], count=16)


def answers(worlds, case: Case, layout: Layout, **options) -> Said:
    """The same on every process."""
    arguments = {"answer_tokens": NEW_TOKENS, **options}
    world = worlds(layout.model_parallel_size)
    asked = (case.checkpoint, case.config, layout, case.prompts, case.stop, arguments)
    first, *others = world.run(with_cache, *asked, timeout=1200)
    assert all(other == first for other in others)
    return first


def test_without_a_cache_it_is_what_transformers_says(case: Case) -> None:
    assert case.uncached == case.expected
    lengths = Counter(map(len, case.expected.values()))
    assert len(lengths) > 3 and len({tuple(one) for one in case.expected.values()}) > len(case.expected) // 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_a_cache_it_is_the_same_in_every_layout(worlds, case: Case, layout: str) -> None:
    assert answers(worlds, case, LAYOUTS[layout]) == case.expected


@pytest.mark.parametrize("layout", ["one process", "tp, sequence parallel", "pp, uneven, spread"])
def test_of_a_single_encoder_and_tied_embeddings_too(worlds, single: Case, layout: str) -> None:
    assert single.uncached == single.expected
    assert answers(worlds, single, LAYOUTS[layout]) == single.expected


@pytest.mark.parametrize("in_flight", [0, 260, 1000], ids=["one at a time", "some", "half of them"])
def test_who_is_in_flight_together_changes_nothing(worlds, case: Case, in_flight: int) -> None:
    assert answers(worlds, case, Layout(), in_flight=in_flight) == case.expected


def test_drawn_answers_hang_on_seed_and_question_alone(worlds, case: Case) -> None:
    def draw(layout: Layout = LAYOUTS["one process"], in_flight: int | None = None, **sampling) -> Said:
        return answers(worlds, case, layout, in_flight=in_flight, sampling=Sampling(temperature=0.8, **sampling))

    drawn = draw(seed=1, top_p=0.9)
    assert drawn == draw(Layout(pp=2), seed=1, top_p=0.9) == draw(in_flight=0, seed=1, top_p=0.9)
    assert drawn == draw(Layout(tp=2), seed=1, top_p=0.9)
    assert drawn != draw(seed=2, top_p=0.9) and drawn != case.expected
    assert draw(seed=1, top_p=1e-9) == case.expected, "the likeliest alone"


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """A video of 1.5 seconds, whose frames differ."""
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", 15)


def asked_of_film(film: Path, export: Path) -> Prompt:
    """A question about ``film``, whose frames are decoded and cut as in training."""
    turns = [{"from": "human", "value": "<video>What is it?"}, {"from": "gpt", "value": "It is red."}]
    record = parse_record({"id": "film", "video": [str(film)], "conversations": turns})
    values = {name: getattr(RELEASED, name) for name in ("tiling_rule", "min_tiles", "max_tiles", "video", "system")}
    settings = make_settings("nowhere", pack_length=PACK, tile_size=32, tokens_per_tile=TOKENS_PER_TILE, **values)
    questions, refused = questions_of([StoredSample(record, (), (film.read_bytes(),))])
    (prompt,), broken = prompts_of(questions, VisualPlanner(settings, HuggingFaceTokenizer(export)))
    assert not refused and not broken and len(prompt.tiles) > 2
    return prompt


def test_a_decoded_video_is_answered_as_without_a_cache_and_by_the_export(worlds, case: Case, film: Path) -> None:
    """The export's own processor decodes the file; a stop would be the tokenizer's, so answers run to their limit."""
    from transformers import AutoProcessor

    export = Path(case.checkpoint).parent / "out"
    prompt = asked_of_film(film, export)
    parts = [{"type": "video", "path": str(film)}, {"type": "text", "text": "What is it?"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    read = processor.apply_chat_template([{"role": "user", "content": parts}], **options)
    assert read["input_ids"][0].tolist() == list(prompt.tokens)
    assert torch.equal(read["pixel_values"], normalise(prompt.tiles))
    with torch.no_grad():
        whole = load_exported(export).generate(**read, max_new_tokens=NEW_TOKENS, do_sample=False)
    said = {"film": whole[0, len(prompt.tokens) :].tolist()}
    asked = replace(case, prompts=[prompt], stop=-1)
    assert worlds(1).run(without_cache, case.checkpoint, case.config, [prompt], NEW_TOKENS) == [said]
    for layout in ("one process", "pp, uneven, spread"):
        assert answers(worlds, asked, LAYOUTS[layout]) == said, layout
    still = replace(prompt, tiles=prompt.tiles[:1].expand_as(prompt.tiles))
    assert answers(worlds, replace(asked, prompts=[still]), Layout()) != said, "frames that change nothing"


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_two_hundred_questions(worlds, tmp_path: Path, model: str) -> None:
    case = make_case(tmp_path, worlds, *MODELS[model], count=200)
    assert case.uncached == case.expected
    for name, layout in (LAYOUTS | LARGER).items():
        assert answers(worlds, case, layout) == case.expected, name
        print(f"{model}: {name}: equal", flush=True)
    print(f"{model}: {len(case.expected)} answers, {sum(map(len, case.expected.values()))} tokens equal")


def test_top_p_keeps_the_likeliest_that_reach_it() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log().repeat(2000, 1)
    places = [(str(number), 0) for number in range(2000)]
    drawn = Counter(Sampling(temperature=1.0, top_p=0.75).choose(logits, places).tolist())
    assert set(drawn) == {1, 3} and abs(drawn[1] / 2000 - 2 / 3) < 0.04
    drawn = Counter(Sampling(temperature=0.5).choose(logits, places).tolist())
    weights = torch.tensor([0.1, 0.5, 0.15, 0.25]).square()
    assert max(abs(drawn[n] / 2000 - float(weights[n] / weights.sum())) for n in range(4)) < 0.04


@pytest.mark.parametrize("name, value", [("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0)])
def test_what_cannot_be_drawn_from_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}, it must be"):
        Sampling(**{name: value})
