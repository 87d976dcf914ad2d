"""The two directions of conversion, each with its proof."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch

from megatron_eagle.checkpoint.files import (
    DESCRIPTION,
    TOKENIZER,
    Description,
    effective_numbers,
    find_latest,
    model_of,
    read_description,
)
from megatron_eagle.checkpoint.safe_index import METADATA
from megatron_eagle.checkpoint.sharded_state import CONTENT, EMA
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.lora import LoraSettings
from megatron_eagle.config.model import EagleConfig, tokens_per_tile
from megatron_eagle.config.reading import ReadingSettings
from megatron_eagle.conversion import logits
from megatron_eagle.conversion.adapters import Merged, base_of, lora_of
from megatron_eagle.conversion.assemble import Assembled, assemble
from megatron_eagle.conversion.check import ORIGIN, dialect_of
from megatron_eagle.conversion.export import Code, check_code, write_configs
from megatron_eagle.conversion.new_tokens import WithNewRows
from megatron_eagle.conversion.processor_files import RELEASED
from megatron_eagle.conversion.proof import Proof, compare, digests
from megatron_eagle.conversion.reading_of import reading_of
from megatron_eagle.conversion.released import Dialect, read_config, recognise
from megatron_eagle.conversion.renamed_sources import AsHuggingFace, AsMegatron, Only, Weights
from megatron_eagle.conversion.resumable_output import JOURNAL, finish, start
from megatron_eagle.conversion.safetensors_folder import SafetensorsFolder, write_safetensors
from megatron_eagle.conversion.sentencepiece_files import write_as_tokenizer_json
from megatron_eagle.conversion.tensors import Finite, TensorSource, WithDtype
from megatron_eagle.conversion.tokenizer_files import TOKENS, Vocabulary, copy_tokenizer, own_tokenizer
from megatron_eagle.conversion.torch_dist import AveragedWeights, TensorAddress, TorchDist, stored_weights
from megatron_eagle.conversion.torch_dist_writer import write_torch_dist
from megatron_eagle.data.sample.tokenizer import IMAGE_CONTEXT, check_vocabulary
from megatron_eagle.errors import UserError

if TYPE_CHECKING:
    from megatron_eagle.verification.reference import Published

NEW: dict[str, Any] = {"tile_size": 448, "tokens": "eagle2", "seed": 1234}  # what a new Eagle has by default


@dataclass(frozen=True)
class Options:
    """What both directions can be told. dtype: round all weights to it; None keeps their types."""

    dtype: torch.dtype | None = None
    logits: bool = True


def hf_to_megatron(
    sources: Sequence[Path],
    out: Path,
    options: Options,
    *,
    tile_size: int | None = None,
    tokens: Literal["eagle2", "eagle2.5"] | None = None,
    seed: int | None = None,
    words: tuple[str, ...] = (),
) -> Proof:
    """One released Eagle, or the parts of a new one, as a checkpoint that ``initial_weights`` of a recipe can name.

    tile_size, tokens, seed: for a new one, by default ``NEW``; Eagle's tokens that the tokenizer lacks, and the
    connector's draw. UserError if one of them is given for a released one, which has its own. words: tokens of one's
    own to add, as text (``new_tokens.py``).
    """
    asked = {"tile_size": tile_size, "tokens": tokens, "seed": seed}
    given = {name: value for name, value in asked.items() if value is not None}
    if len(sources) == 1 and given:
        said = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{said} is for a new Eagle, made of several sources; {sources[0]} alone is a released one")
    new = NEW | given
    partial = start(out, sources, {**asdict(options), **new, **({"words": words} if words else {})})
    clock = _Clock()
    folder = sources[0] if len(sources) == 1 else _tokenizer_folder(sources)
    released: Finite | Assembled | WithNewRows
    if len(sources) == 1:
        released = Finite(SafetensorsFolder(folder))
        config, dialect = recognise(released.infos, read_config(folder), str(folder))
        if (folder / "tokenizer.json").is_file():
            copied = copy_tokenizer(folder, partial / TOKENIZER, (), words)
            if words:
                released = WithNewRows(released, dialect, copied)
                config = released.widened(config)
            check_vocabulary(copied, config.language.vocab_size, folder)
            _check_image_token(copied, folder)
        elif words:
            raise UserError(f"{folder} has no tokenizer.json to add tokens to")
        published = logits.published_by(folder, config)
        if words:
            wider = {**published.language, "vocab_size": config.language.vocab_size}
            published = replace(published, language=wider)
    else:
        vocabulary = copy_tokenizer(folder, partial / TOKENIZER, TOKENS[new["tokens"]], words)
        released, config, dialect = assemble(sources, vocabulary, tile_size=new["tile_size"], seed=new["seed"])
        published = logits.published_by_parts(folder, released.encoder_sources)
    rounded = WithDtype(released, options.dtype) if options.dtype else released
    theirs = AsMegatron(rounded, config, dialect)
    if options.logits:
        logits.check_memory(theirs.infos)
    write_torch_dist(theirs.infos, theirs.read, partial, content=CONTENT)
    description = Description("converted", 0, 0, asdict(config), asdict(Layout()), data_parallel_size=1)
    (partial / DESCRIPTION).write_text(json.dumps(asdict(description), indent=1), encoding="utf-8")
    (partial / ORIGIN).write_text(json.dumps(asdict(dialect), indent=1), encoding="utf-8")
    clock.lap("conversion")
    back = AsHuggingFace(TorchDist(partial), config, dialect)
    trip = compare(Only(rounded, theirs.used), back, "round trip")
    clock.lap("round trip")
    shared = _for_both_directions(options, partial, config, rounded, dialect, published)
    clock.lap("logits")
    files = [file for source in sources for file in SafetensorsFolder(source).files]
    proof = Proof(
        direction="Hugging Face to Megatron",
        source=", ".join(map(str, sources)) + (f" and {len(words)} tokens more" if words else ""),
        target=str(out),
        source_sha256=digests(files),
        target_sha256=digests(_weight_files(partial)),
        round_trip=trip,
        unused=_unused(released, theirs.used, config, dialect),
        dtype_changes=_dtype_changes(released, rounded),
        seconds=clock.finish("digests"),
        **shared,
    )
    return finish(proof, partial, out)


def megatron_to_hf(
    checkpoint: Path,
    out: Path,
    options: Options,
    *,
    kind: Literal["A", "B"] | None = None,
    tokenizer: Path | None = None,
    code: Code = "own",
    reading: ReadingSettings | None = None,
    base: Path | None = None,
    ema: bool = False,
) -> Proof:
    """A checkpoint of ours, of any layout, in a released form; LoRA's adapters are merged with their base.

    checkpoint: a step's folder, or a stage's, whose newest is taken. kind: None takes the form it came in, else B where
    it can hold the model, else A. tokenizer: folder of a Hugging Face tokenizer; None takes the checkpoint's own. code:
    our own goes into the folder, which then loads by itself; NVIDIA's is pointed to. reading: what it was trained
    with; None takes the checkpoint's own, of one that carries none the released models'. It goes into the folder. base:
    where adapters' base lies, by default what they were trained on. ema: the running mean instead of the weights.
    """
    checkpoint = find_latest(checkpoint) or checkpoint
    description = read_description(checkpoint)
    reading = reading or reading_of(checkpoint) or RELEASED
    config = model_of(checkpoint, description)
    whole = base_of(checkpoint, description, base) if description.base else checkpoint
    dialect = dialect_of(whole, config, kind)
    check_code(config, dialect, code)
    wanted = asdict(options) | {
        "dialect": asdict(dialect),
        "tokenizer": str(tokenizer),
        "code": code,
        "reading": asdict(reading),
        "ema": ema,
    }
    sources = [checkpoint, whole] if description.base else [checkpoint]
    partial = start(out, sources, wanted)
    clock = _Clock()
    lora = lora_of(checkpoint, description) if description.base else None
    stored = stored_weights(checkpoint, ema=ema)
    if lora:
        stored = Merged(whole, stored, lora, dialect.sources(config))
    renamed = Finite(AsHuggingFace(stored, config, dialect))
    rounded: TensorSource = WithDtype(renamed, options.dtype) if options.dtype else renamed
    if options.logits:
        logits.check_memory(renamed.infos)
    vocabulary = _export_tokenizer(tokenizer or own_tokenizer(checkpoint), partial, config)
    write_safetensors(rounded, partial)
    dtype = rounded.infos[dialect.embedding].dtype
    kind = dialect.format
    of_tile = tokens_per_tile(config)
    write_configs(
        partial, config, dialect, code, dtype=dtype, ids=vocabulary.ids, tokens_per_tile=of_tile, reading=reading
    )
    clock.lap("conversion")
    target = SafetensorsFolder(partial)
    found, found_dialect = recognise(target.infos, read_config(partial), str(partial))
    if effective_numbers(found) != effective_numbers(config):
        raise UserError(f"{partial} would be read back as another model: {found}")
    back = AsMegatron(target, found, found_dialect)
    ours = Weights(stored, config, list(back.infos), options.dtype)
    trip = compare(ours, Weights(back, config, list(back.infos), None), "round trip")
    clock.lap("round trip")
    theirs = renamed if options.dtype else target
    published = logits.published_by(partial, config)
    adapters = (checkpoint, lora) if lora else None
    shared = _for_both_directions(options, whole, config, theirs, dialect, published, adapters, ema=ema)
    clock.lap("logits")
    proof = Proof(
        direction=f"Megatron to Hugging Face, format {kind}",
        source=f"{checkpoint}{', its running mean' if ema else ''}",
        target=str(out),
        source_sha256=digests([file for source in sources for file in _weight_files(source)]),
        target_sha256=digests([file for file in partial.iterdir() if file.name != JOURNAL and file.is_file()]),
        round_trip=trip,
        unused=_unused_of_training(stored, config, dialect),
        dtype_changes=_dtype_changes(renamed, rounded),
        seconds=clock.finish("digests"),
        **shared,
    )
    return finish(proof, partial, out)


def _for_both_directions(
    options: Options,
    checkpoint: Path,
    config: EagleConfig,
    released: TensorSource,
    dialect: Dialect,
    published: "Published",
    adapters: tuple[Path, LoraSettings] | None = None,
    *,
    ema: bool = False,
) -> dict[str, Any]:
    """What a proof says of the model and of both sides' logits, whichever side was there first.

    adapters: of LoRA, which ``checkpoint`` is the base of. ema: by the running mean of what trained.
    """
    found: dict[str, Any] = {
        "model": asdict(config),
        "padding_rows": config.language.padded_vocab_size - config.language.vocab_size,
        "logits": None,
        "logits_largest": None,
        "logits_skipped": "--no-logits was given",
    }
    if options.logits:
        batch = logits.probe_batch(config)
        ours = logits.megatron_logits(checkpoint, config, Layout(), batch, adapters, ema=ema).double()
        theirs = logits.released_logits(released, config, dialect, batch, published)
        found |= {
            "logits": float((ours - theirs).abs().max()),
            "logits_largest": float(theirs.abs().max()),
            "logits_skipped": None,
        }
    return found


def _tokenizer_folder(sources: Sequence[Path]) -> Path:
    for path in sources:
        if path.is_dir() and (path / "tokenizer.json").is_file() and (path / "config.json").is_file():
            infos = SafetensorsFolder(path).infos
            if "model.embed_tokens.weight" in infos:
                return path
    raise UserError("none of the sources is a Qwen2.5 folder with config.json and tokenizer.json")


def _check_image_token(vocabulary: Vocabulary, folder: Path) -> None:
    """Features stand where config.json says; the data put them where the tokenizer says."""
    said, has = read_config(folder).get("image_token_index"), vocabulary.ids[IMAGE_CONTEXT]
    if said not in (None, has):
        raise UserError(f"{folder}/config.json has image_token_index={said!r}, its tokenizer {IMAGE_CONTEXT} at {has}")


def _export_tokenizer(source: Path, partial: Path, config: EagleConfig) -> Vocabulary:
    if source.is_file():  # a SentencePiece model, as small runs use
        with TemporaryDirectory() as folder:
            write_as_tokenizer_json(source, Path(folder))
            return _export_tokenizer(Path(folder), partial, config)
    vocabulary = copy_tokenizer(source, partial, TOKENS["eagle2"])
    check_vocabulary(vocabulary, config.language.vocab_size, source)
    return vocabulary


def _unused(released: TensorSource, used: set[str], config: EagleConfig, dialect: Dialect) -> dict[str, str | None]:
    found = {name: dialect.unused_reason(config, name) for name in released.infos if name not in used}
    return {**found, **released.left_out} if isinstance(released, Assembled) else found


def _unused_of_training(stored: TorchDist, config: EagleConfig, dialect: Dialect) -> dict[str, str | None]:
    """Every tensor that is no weight: the optimizer's and running means, a line each; nothing else has a reason."""
    weights = {TensorAddress.of(name).key for name in dialect.sources(config)}
    if isinstance(stored, AveragedWeights):  # which reads them by the weights' names
        weights |= {EMA + name for name in weights}
    rest = sorted(stored.names - weights)
    reasons = {
        "optimizer.": "the optimizer's state is not part of a released model",
        EMA: "the running mean of the weights goes out in their place, by --ema",
    }
    found: dict[str, str | None] = {name: None for name in rest if not name.startswith(tuple(reasons))}
    for prefix, reason in reasons.items():
        if count := sum(name.startswith(prefix) for name in rest):
            found[f"{prefix}* ({count} tensors)"] = reason
    return found


def _dtype_changes(before: TensorSource, after: TensorSource) -> dict[str, int]:
    changes = Counter(
        f"{info.dtype} -> {after.infos[name].dtype}".replace("torch.", "")
        for name, info in before.infos.items()
        if info.dtype != after.infos[name].dtype
    )
    return dict(changes)


def _weight_files(folder: Path) -> list[Path]:
    return [folder / METADATA, *folder.glob("*.distcp")]


class _Clock:
    def __init__(self) -> None:
        self._laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name], self._last = now - self._last, now

    def finish(self, name: str) -> dict[str, float]:
        self.lap(name)
        return self._laps
