"""Vectors: of the real text model, of small models with the interfaces of the others; by content, whatever happens."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from copy_table import draw
from encoder_models import write_pair, write_sentences, write_torchscript
from PIL import Image

from megatron_eagle.curation import embedding, encoders, vectors
from megatron_eagle.curation.embedding import Embedder
from megatron_eagle.curation.encoders import check_model, image_encoder, text_encoder
from megatron_eagle.curation.engine import curate
from megatron_eagle.curation.operator import Resources, make_operator
from megatron_eagle.curation.operators.alignment import stretches
from megatron_eagle.curation.plan import Plan
from megatron_eagle.curation.vectors import StoredRows, VectorStore, key_of, unit
from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.errors import BrokenSample, UserError

TEXTS = ["a dog", "what is the color of the chart", "a cat in this picture " * 6, "red", "blue chart of the dog"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_torchscript(folder / "copies.pt")
    write_sentences(folder / "sentences")
    for kind in ("clip", "siglip"):
        write_pair(folder / kind, kind)
    return folder


def pictures(many: int) -> list[Image.Image]:
    return [draw(seed).convert("RGB") for seed in range(many)]


@pytest.mark.parametrize("name", ["copies.pt", "clip", "siglip"])
def test_a_picture_gets_the_same_bits_whatever_stands_beside_it(models: Path, name: str) -> None:
    encoder = image_encoder(str(models / name), 32, 4, "cpu")
    given = pictures(7)
    whole = encoder(given)
    assert whole.dtype == np.float32 and np.allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            assert np.array_equal(encoder(given[::-1])[::-1], whole)
            assert np.array_equal(np.concatenate([encoder([one]) for one in given]), whole)
    finally:
        torch.set_num_threads(threads)
    assert len({tuple(row) for row in whole.tolist()}) == 7


@pytest.mark.parametrize("name", ["sentences", "clip", "siglip"])
def test_a_text_gets_the_same_bits_whatever_stands_beside_it(models: Path, name: str) -> None:
    encoder = text_encoder(str(models / name), 4, "cpu")
    whole = encoder(TEXTS)
    assert np.allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    assert np.array_equal(encoder(TEXTS[::-1])[::-1], whole)
    assert np.array_equal(np.concatenate([encoder([one]) for one in TEXTS]), whole)


def test_pooling_and_towers_are_those_of_the_libraries(models: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "sentences")
    model = transformers.AutoModel.from_pretrained(models / "sentences").eval()
    own = text_encoder(str(models / "sentences"), 4, "cpu")(TEXTS)
    for text, vector in zip(TEXTS, own, strict=True):
        with torch.inference_mode():
            states = model(**tokenizer([text], truncation=True, max_length=48, return_tensors="pt")).last_hidden_state
        assert np.allclose(unit(states.mean(1).numpy())[0], vector, atol=1e-5)
    clip = transformers.CLIPModel.from_pretrained(models / "clip").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "clip")
    given = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    processor = transformers.AutoImageProcessor.from_pretrained(models / "clip")
    pixels = processor(images=pictures(2), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        out = clip(input_ids=given["input_ids"], attention_mask=given["attention_mask"], pixel_values=pixels)
    assert np.allclose(out.text_embeds.numpy(), text_encoder(str(models / "clip"), 4, "cpu")(TEXTS[:2]), atol=1e-5)
    own = image_encoder(str(models / "clip"), 0, 4, "cpu")(pictures(2))
    assert np.allclose(out.image_embeds.numpy(), own, atol=1e-5)


def test_a_store_gives_back_what_any_process_has_added(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    every = rng.normal(size=(50, 8)).astype(np.float32)
    keys = [key_of(str(number).encode()) for number in range(50)]
    first, second = VectorStore(tmp_path / "s"), VectorStore(tmp_path / "s")
    assert first.missing([*keys, keys[0]]) == keys
    first.add(keys[:20], every[:20])
    second.add(keys[20:30], every[20:30])
    assert second.missing(keys) == keys[30:] == first.missing(keys)
    first.add(keys[15:50], every[15:50])  # some of them twice
    order = rng.permutation(50)
    assert np.array_equal(second.read([keys[one] for one in order]), every[order])
    rows = StoredRows(second, [[keys[3]], [keys[1], keys[2]]])
    assert np.allclose(rows[0:2][1], unit((every[1:2] + every[2:3]) / 2)[0], atol=1e-6)
    (next((tmp_path / "s").glob("*.keys.npy"))).unlink()
    with pytest.raises(UserError, match="has no vectors of"):
        VectorStore(tmp_path / "s").read(keys)


def test_means_are_made_of_a_few_vectors_at_a_time(tmp_path: Path, monkeypatch: Any) -> None:
    every = np.random.default_rng(2).normal(size=(60, 8)).astype(np.float32)
    store = VectorStore(tmp_path)
    store.add(range(60), every)
    sizes = [1, 3, 2, 9, 1, 1, 20, 3, 2, 18]
    ends = np.cumsum(sizes).tolist()
    rows = StoredRows(store, [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)])
    whole = rows[0:10]
    assert all(np.allclose(one, unit(every[end - size : end].mean(0)[None])[0], atol=1e-6)
               for one, end, size in zip(whole, ends, sizes, strict=True))  # fmt: skip
    read: list[int] = []
    real = VectorStore.read
    monkeypatch.setattr(VectorStore, "read", lambda self, keys: (read.append(len(keys)), real(self, keys))[1])
    monkeypatch.setattr(vectors, "READ", 8)
    assert np.array_equal(rows[0:10], whole) and max(read) <= 8 + max(sizes) and sum(read) == 60


def test_a_process_reads_the_keys_of_a_part_once(models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    encoder = text_encoder(str(models / "sentences"), 4, "cpu")
    opened: list[str] = []
    real = np.load
    monkeypatch.setattr(np, "load", lambda file, **more: (opened.append(Path(file).name), real(file, **more))[1])
    for number in range(4):  # blocks
        Embedder.of(encoder, str(tmp_path / "v")).texts([f"dog {number}", "cat"])
    assert len(opened) == len(set(opened)) == 3
    shutil.rmtree(tmp_path / "v")
    own = Embedder.of(encoder, str(tmp_path / "v"))
    assert own.store.read(own.texts(["cat"])).shape == (1, 32), "what was deleted meanwhile is made again"


@pytest.mark.parametrize("name", ["embeddings", "alignment", "novelty"])
def test_a_model_on_a_gpu_takes_one_up(name: str) -> None:
    settings = {"embeddings": {"images": "m"}, "alignment": {"model": "m", "least": 0.2}, "novelty": {"images": "m"}}
    assert make_operator(name, {**settings[name], "device": "cuda"}).resources == Resources(cpus=1, gpus=1)
    assert make_operator(name, {**settings[name], "device": "cpu"}).resources == Resources()


def test_vectors_of_another_kind_of_device_are_others(models: Path, monkeypatch: Any) -> None:
    """A device that can be had without a GPU stands in for one."""
    loads = {"copies.pt": lambda path, device: encoders._torchscript(path, 32, 2, device),
             "clip": lambda path, device: encoders._image_tower(path, 2, device),
             "siglip": lambda path, device: encoders._text_tower(path, 2, device),
             "sentences": lambda path, device: encoders._sentences(path, 2, device)}  # fmt: skip
    for name, load in loads.items():
        names = [load(models / name, device).name for device in ("cpu", "meta")]
        assert names[0] != names[1] and "meta" in names[1], name


def written(folder: Path, source: str, seeds: range, questions: dict[int, str] | None = None) -> dict[str, Any]:
    place = folder / source
    place.mkdir(parents=True)
    with open(place / "samples.jsonl", "w", encoding="utf-8") as file:
        for seed in seeds:
            draw(seed).save(place / f"{seed}.png")
            asked = (questions or {}).get(seed, f"what is in this picture {WORDS[seed % len(WORDS)]}")
            turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "a dog in the picture"}]
            file.write(json.dumps({"id": f"{source}{seed}", "image": f"{seed}.png", "conversations": turns}) + "\n")
    return {"name": source, "path": str(place / "samples.jsonl"), "category": "chart"}


WORDS = ["red", "blue", "green", "dog", "cat"]


def test_what_was_made_is_not_made_again_and_a_kill_loses_little(
    models: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    source = written(tmp_path, "a", range(30))
    settings = {"images": str(models / "copies.pt"), "texts": str(models / "sentences"), "side": 32, "batch": 2}
    plan = Plan("p", (source,), ({"use": "embeddings", **settings, "cache": str(tmp_path / "v")},), block=20)  # type: ignore[arg-type]
    monkeypatch.setattr(embedding, "AT_ONCE", 2)
    real, made = VectorStore.add, 0

    def add(self: VectorStore, keys: Any, vectors: Any) -> None:
        nonlocal made
        if made >= 12:
            raise KeyboardInterrupt
        made += len(keys)
        real(self, keys, vectors)

    monkeypatch.setattr(VectorStore, "add", add)
    with pytest.raises(KeyboardInterrupt):
        curate(plan, tmp_path / "out")
    assert made == 12
    counted: list[int] = []
    monkeypatch.setattr(
        VectorStore, "add", lambda self, keys, vectors: (counted.append(len(keys)), real(self, keys, vectors))
    )
    curate(plan, tmp_path / "out")
    assert sum(counted) == 30 - 12 + 5  # the pictures that were left, and five different texts
    shutil.rmtree(tmp_path / "out")
    counted.clear()
    curate(plan, tmp_path / "out")
    assert not counted


def test_a_broken_picture_is_rejected_and_the_others_are_not(models: Path, tmp_path: Path) -> None:
    source = written(tmp_path, "a", range(4))
    data = (tmp_path / "a" / "2.png").read_bytes()
    (tmp_path / "a" / "2.png").write_bytes(data[: len(data) // 2])
    own = Embedder.of(image_encoder(str(models / "copies.pt"), 32, 2, "cpu"), str(tmp_path / "v"))
    keys = own.pictures([FileSlice.whole(tmp_path / "a" / f"{number}.png") for number in (0, 2, 3, 0)])
    assert isinstance(keys[1], BrokenSample) and keys[0] == keys[3] != keys[2]
    operator = {"use": "embeddings", "images": str(models / "copies.pt"), "side": 32, "cache": str(tmp_path / "v")}
    (summary,) = curate(Plan("p", (source,), (operator,)), tmp_path / "out").sources  # type: ignore[arg-type]
    assert (summary.used, summary.rejected) == (3, 1)


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes(models: Path, tmp_path: Path) -> None:
    sources = (written(tmp_path, "a", range(12)), written(tmp_path, "b", range(8, 20)))
    outputs = []
    for workers in (1, 2):
        settings = {
            "images": str(models / "siglip"),
            "texts": str(models / "sentences"),
            "cache": str(tmp_path / str(workers)),
        }
        plan = Plan("p", sources, ({"use": "embeddings", "batch": 4, **settings}, {"use": "similarity"}), block=5)  # type: ignore[arg-type]
        out = tmp_path / f"out{workers}"
        curate(plan, out, workers=workers)
        outputs.append(
            {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
        )
    assert outputs[0] == outputs[1] and "report.html" in outputs[0]


def test_pictures_that_do_not_fit_their_words_go(models: Path, tmp_path: Path) -> None:
    asked = {seed: f"what is {WORDS[seed % 5]}" for seed in range(20)}
    source = written(tmp_path, "a", range(20), asked)
    model = str(models / "clip")
    seen = image_encoder(model, 0, 4, "cpu")([draw(seed).convert("RGB") for seed in range(20)])
    said = text_encoder(model, 4, "cpu")([f"{question} a dog in the picture" for question in asked.values()])
    cosines = np.einsum("ij,ij->i", seen.astype(float), said.astype(float))
    least = float(np.sort(cosines)[7])
    operator = {"use": "alignment", "model": model, "least": round(least, 3), "cache": str(tmp_path / "v")}
    (summary,) = curate(Plan("p", (source,), (operator,)), tmp_path / "out").sources  # type: ignore[arg-type]
    expected = {f"a{number}" for number in range(20) if round(cosines[number], 4) < round(least, 3)}
    rows = pq.read_table(tmp_path / "out" / "ledger.parquet").to_pylist()
    assert {row["sample"] for row in rows if row["reason"] == "picture and words do not fit"} == expected
    assert 0 < summary.rejected == len(expected) < 20


def test_several_pictures_and_turns_are_judged_together_or_each(tmp_path: Path, models: Path, monkeypatch: Any) -> None:
    """Vectors put in by hand: the first picture fits the first answer, the second nothing."""
    from megatron_eagle.curation.operators import alignment
    from megatron_eagle.curation.sample import Sample
    from megatron_eagle.data.sample.conversation import parse_record

    for number in (0, 1):
        draw(number).save(tmp_path / f"{number}.png")
    vectors = {"first words that fit it": [1.0, 0.0], "second words that do not fit": [0.0, -1.0]}
    by_bytes = {0: [1.0, 0.0], 1: [-1.0, 0.0]}

    class Fixed:
        tokens = 1000

        def __init__(self, kind: str) -> None:
            self.kind = kind
            self.store = self

        def pictures(self, parts: Any) -> list[int]:
            return [int(Path(part.path).stem) for part in parts]

        def texts(self, texts: Any) -> list[Any]:
            return [next(10 + n for n, key in enumerate(vectors) if key in text) for text in texts]

        def read(self, keys: Any) -> Any:
            rows = list(vectors.values())
            return np.array([by_bytes[key] if key < 10 else rows[key - 10] for key in keys], np.float32)

    monkeypatch.setattr(alignment, "image_encoder", lambda *_: "pictures")
    monkeypatch.setattr(alignment, "text_encoder", lambda *_: Fixed("texts"))
    monkeypatch.setattr(
        alignment, "Embedder", type("E", (), {"of": staticmethod(lambda encoder, _: Fixed(str(encoder)))})
    )
    turns = [
        {"from": "human", "value": "<image>\nAsk one:"}, {"from": "gpt", "value": "first words that fit it"},
        {"from": "human", "value": "<image>\nAsk two:"}, {"from": "gpt", "value": "second words that do not fit"},
    ]  # fmt: skip
    record = {"id": "x", "image": ["0.png", "1.png"], "conversations": turns}
    images = tuple(FileSlice.whole(tmp_path / f"{number}.png") for number in (0, 1))
    sample = Sample("s", "c", 0, parse_record(record), images)

    def found(**settings: Any) -> list[tuple[int | None, float]]:
        operator = make_operator("alignment", {"model": "m", "least": 0.5, **settings})
        return [(one.turn, one.scores["alignment"]) for one in operator.findings(sample)]  # type: ignore[attr-defined]

    assert found() == []
    assert found(images="worst") == [(None, 0.0)]
    assert found(turns="each") == [(4, 0.0)]
    assert found(turns="each", images="worst") == [(4, 0.0)]
    assert found(words=100) == []


def test_long_texts_are_cut_into_what_a_model_reads() -> None:
    assert stretches("one two three four five six seven", 5) == ["one two three", "four five six", "seven"]


def refusal(path: Path, needs: Any) -> str:
    with pytest.raises(UserError) as refused:
        check_model(str(path), needs)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_model_that_is_missing_or_of_another_kind_is_refused_in_a_line(models: Path, tmp_path: Path) -> None:
    assert "no.pt does not exist; models are files and folders of yours" in refusal(tmp_path / "no.pt", "pictures")
    assert "texts need a folder" in refusal(models / "copies.pt", "texts")
    assert "is of the kind 'bert'; known are clip, siglip" in refusal(models / "sentences", "pictures")
    shutil.copytree(models / "sentences", tmp_path / "other")
    (tmp_path / "other" / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    assert "pools by pooling_mode_max_tokens; known are mean_tokens and cls_token" in refusal(
        tmp_path / "other", "texts"
    )
    modules = json.loads((tmp_path / "other" / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (tmp_path / "other" / "modules.json").write_text(json.dumps(modules))
    assert "has the modules Transformer, Pooling, Dense" in refusal(tmp_path / "other", "texts")
    (tmp_path / "other" / "modules.json").write_text((models / "sentences" / "modules.json").read_text())
    shutil.copytree(models / "sentences" / "1_Pooling", tmp_path / "other" / "1_Pooling", dirs_exist_ok=True)
    (tmp_path / "other" / "sentence_bert_config.json").write_text("{}")
    assert "has max_seq_length None in sentence_bert_config.json" in refusal(tmp_path / "other", "texts")
    (tmp_path / "other" / "sentence_bert_config.json").unlink()
    assert "has no readable sentence_bert_config.json" in refusal(tmp_path / "other", "texts")
    (tmp_path / "no.pt").write_bytes(b"nothing")
    assert "no.pt is no TorchScript file" in refusal(tmp_path / "no.pt", "pictures")
    with pytest.raises(UserError, match="cannot be loaded as TorchScript"):
        image_encoder(str(tmp_path / "no.pt"), 32, 2, "cpu")
    plan = Plan("p", (written(tmp_path, "a", range(1)),), ({"use": "embeddings", "texts": str(tmp_path / "none")},))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="none does not exist"):
        curate(plan, tmp_path / "out")
    with pytest.raises(ValueError, match="a model is needed for one of them"):
        make_operator("embeddings", {})
