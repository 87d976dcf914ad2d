"""Models that make vectors of pictures and texts, from files and folders of the user's; nothing is downloaded.

Pictures: a TorchScript file with the interface of SSCD (pixels in, one vector a picture out), or a Hugging Face folder
of CLIP or SigLIP. Texts: the same folders, or one of sentence-transformers (a transformer, pooling, no more). All
vectors have length 1. A batch always has the same shape, filled up where need be, so that a content gets the same bits
whatever stands beside it; on a CPU they do not depend on the number of threads either (tests look).
"""

import hashlib
import json
import multiprocessing
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from megatron_eagle.curation.operator import Resources
from megatron_eagle.curation.vectors import Vectors, unit
from megatron_eagle.errors import UserError

Device = Literal["auto", "cpu", "cuda"]
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which SSCD was trained with
PADDED = 32  # lengths of texts are filled up to a multiple, in tokens


@dataclass(frozen=True)
class Encoder:
    """name: of the model, its weights and the kind of device, whose bits are its own, for the folder of its vectors.

    batch: contents that are worked on at once. tokens: texts are cut after as many; 0 for pictures.
    encode: any number of contents -> [contents, dim].
    """

    name: str
    batch: int
    tokens: int
    encode: Callable[[Sequence[Any]], Vectors]

    def __call__(self, contents: Sequence[Any]) -> Vectors:
        """[len(contents), dim] of length 1. contents: RGB pictures, or texts; at least one."""
        return unit(self.encode(contents))


def _in_batches(encode: Callable[[Sequence[Any]], Vectors], batch: int) -> Callable[[Sequence[Any]], Vectors]:
    """The same for any number of contents, with batches of one shape."""

    def every(contents: Sequence[Any]) -> Vectors:
        parts = [contents[start : start + batch] for start in range(0, len(contents), batch)]
        return np.concatenate([encode([*part, *[part[-1]] * (batch - len(part))])[: len(part)] for part in parts])

    return every


@lru_cache
def image_encoder(path: str, side: int, batch: int, device: Device) -> Encoder:
    """Loaded once a process. side: pixels of the square that a TorchScript file is given; UserError."""
    place = Path(path)
    if place.is_dir():
        return _image_tower(place, batch, _device(device))
    return _torchscript(place, side, batch, _device(device))


@lru_cache
def text_encoder(path: str, batch: int, device: Device) -> Encoder:
    """Loaded once a process; UserError."""
    place = Path(path)
    if (place / "modules.json").exists():
        return _sentences(place, batch, _device(device))
    return _text_tower(place, batch, _device(device))


def check_model(path: str, needs: Literal["pictures", "texts", "both"]) -> None:
    """UserError if there is no such model, or not of a kind that is known here; nothing is loaded."""
    place = Path(path)
    if not place.exists():
        raise UserError(f"model {path} does not exist; models are files and folders of yours, none is downloaded")
    if place.is_file():
        if needs != "pictures":
            raise UserError(f"model {path} is a file; texts need a folder of CLIP, SigLIP or sentence-transformers")
        if not zipfile.is_zipfile(place):  # which torch.jit.save writes
            raise UserError(f"model {path} is no TorchScript file (as torch.jit.save writes it)")
    elif needs == "texts" and (place / "modules.json").exists():
        _pooling(place)
        _most_tokens(place)
    else:
        kind = _json(place / "config.json").get("model_type")
        if kind not in ("clip", "siglip"):
            more = " and, for texts alone, sentence-transformers" if needs != "pictures" else ""
            raise UserError(f"model {path} is of the kind {kind!r}; known are clip, siglip{more}")


def resources_of(device: Device) -> Resources:
    """A GPU of its own for each process where one is asked for; with ``auto`` it is whatever is there."""
    return Resources(gpus=1 if device == "cuda" else 0)


def _device(device: Device) -> str:
    import torch

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # one of several workers; the others have the other cores
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is wanted for embeddings, and there is no GPU here")
    return device


def _digest(files: Sequence[Path], *settings: object) -> str:
    """Of all bytes that vectors depend on."""
    found = hashlib.sha256(repr(settings).encode())
    for file in files:
        with open(file, "rb") as data:
            found.update(hashlib.file_digest(data, "sha256").digest())
    return found.hexdigest()[:16]


def _name(place: Path, what: str, device: str, files: Sequence[Path], *settings: object) -> str:
    on = "" if device == "cpu" else f"-{device}"
    return f"{place.absolute().name}-{what}{on}-{_digest(files, what, *settings)}"


def _folder_files(place: Path) -> list[Path]:
    """Weights, settings and vocabulary."""
    return sorted(
        file for file in place.rglob("*") if file.suffix in (".safetensors", ".bin", ".json", ".txt", ".model")
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model {path.parent} has no readable {path.name} ({str(error)[:100]})") from None
    return found if isinstance(found, dict) else {"": found}


def _torchscript(place: Path, side: int, batch: int, device: str) -> Encoder:
    import torch

    try:
        model = torch.jit.load(str(place), map_location=device).eval()
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"model {place} cannot be loaded as TorchScript ({str(error).splitlines()[0][:100]})") from None
    mean, deviation = (np.array(one, np.float32) for one in (MEAN, DEVIATION))

    def encode(pictures: Sequence[Image.Image]) -> Vectors:
        squares = (one.resize((side, side), Image.Resampling.BILINEAR) for one in pictures)
        pixels = np.stack([(np.asarray(one, np.float32) / 255 - mean) / deviation for one in squares])
        with torch.inference_mode():
            found = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(device))
        return _flat(found, place, len(pictures))

    return Encoder(_name(place, "images", device, [place], side, batch), batch, 0, _in_batches(encode, batch))


def _flat(found: Any, place: Path, rows: int) -> Vectors:
    """A model's output as vectors; UserError if it is none."""
    shape = tuple(getattr(found, "shape", ()))
    if len(shape) != 2 or shape[0] != rows:
        given = shape or type(found).__name__
        raise UserError(f"model {place} gives {given} for {rows} contents, one vector each is wanted")
    vectors: Vectors = found.float().cpu().numpy()
    return vectors


def _load(what: str, place: Path, **settings: Any) -> Any:
    """A model or a tokenizer of a folder, in float32."""
    import transformers

    try:
        return getattr(transformers, what).from_pretrained(place, local_files_only=True, **settings)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"model {place} cannot be loaded ({str(error).strip().splitlines()[0][:150]})") from None


@lru_cache
def _pair_model(place: Path, device: str) -> Any:
    """CLIP or SigLIP, both towers, loaded once for both."""
    import torch

    check_model(str(place), "pictures")
    return _load("AutoModel", place, dtype=torch.float32).eval().to(device)


def _image_tower(place: Path, batch: int, device: str) -> Encoder:
    import torch

    model, processor = _pair_model(place, device), _load("AutoImageProcessor", place)

    def encode(pictures: Sequence[Image.Image]) -> Vectors:
        pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(device)
        with torch.inference_mode():
            found = model.get_image_features(pixel_values=pixels)
        return _flat(found.pooler_output, place, len(pictures))

    return Encoder(_name(place, "images", device, _folder_files(place), batch), batch, 0, _in_batches(encode, batch))


def _text_tower(place: Path, batch: int, device: str) -> Encoder:
    import torch

    model, tokenizer = _pair_model(place, device), _load("AutoTokenizer", place)
    tokens = int(model.config.text_config.max_position_embeddings)

    def encode(texts: Sequence[str]) -> Vectors:
        given = tokenizer(list(texts), padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
        # SigLIP was trained without a mask of what is filled up
        masked = {"attention_mask": given["attention_mask"].to(device)} if model.config.model_type == "clip" else {}
        with torch.inference_mode():
            found = model.get_text_features(input_ids=given["input_ids"].to(device), **masked)
        return _flat(found.pooler_output, place, len(texts))

    return Encoder(
        _name(place, "texts", device, _folder_files(place), batch), batch, tokens, _in_batches(encode, batch)
    )


def _pooling(place: Path) -> Literal["mean", "cls"]:
    """How a sentence-transformers folder makes one vector of those of the tokens; UserError if it is not known here."""
    modules = _json(place / "modules.json").get("", [])
    kinds = [str(one.get("type", "")).rpartition(".")[2] for one in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UserError(f"model {place} has the modules {', '.join(kinds)}; known are Transformer, Pooling, Normalize")
    settings = _json(place / modules[1]["path"] / "config.json")
    chosen = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    if chosen == ["pooling_mode_mean_tokens"]:
        return "mean"
    if chosen == ["pooling_mode_cls_token"]:
        return "cls"
    raise UserError(f"model {place} pools by {', '.join(chosen) or 'nothing'}; known are mean_tokens and cls_token")


def _most_tokens(place: Path) -> int:
    """How much of a text a sentence-transformers folder reads; UserError if it does not say."""
    found = _json(place / "sentence_bert_config.json").get("max_seq_length")
    if type(found) is not int or found < 1:
        raise UserError(f"model {place} has max_seq_length {found!r} in sentence_bert_config.json; 1 or more is wanted")
    return found


def _sentences(place: Path, batch: int, device: str) -> Encoder:
    import torch

    pooling = _pooling(place)
    below = place / str(_json(place / "modules.json")[""][0].get("path", ""))
    model = _load("AutoModel", below, dtype=torch.float32).eval().to(device)
    tokenizer = _load("AutoTokenizer", below)
    tokens = _most_tokens(place)

    def encode(texts: Sequence[str], length: int) -> Vectors:
        given = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        given = given.to(device)
        with torch.inference_mode():
            states = model(**given).last_hidden_state
        if pooling == "mean":
            mask = given["attention_mask"][..., None].to(states.dtype)
            return _flat((states * mask).sum(1) / mask.sum(1), place, len(texts))
        return _flat(states[:, 0], place, len(texts))

    def by_length(texts: Sequence[str]) -> Vectors:
        """Batches of texts that are filled up to one length: what a text gets depends on it alone."""
        groups: dict[int, list[int]] = {}
        for number, one in enumerate(tokenizer(list(texts), truncation=True, max_length=tokens)["input_ids"]):
            groups.setdefault(min(tokens, -(-len(one) // PADDED) * PADDED), []).append(number)
        parts: dict[int, Vectors] = {}
        for length, group in groups.items():
            found = _in_batches(partial(encode, length=length), batch)([texts[one] for one in group])
            parts |= dict(zip(group, found, strict=True))
        return np.stack([parts[number] for number in range(len(texts))])

    return Encoder(_name(place, "texts", device, _folder_files(place), batch), batch, tokens, by_length)
