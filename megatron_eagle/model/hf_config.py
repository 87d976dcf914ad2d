"""Reading what a config.json says of one part of a model: by transformers' own class, and nothing passed over.

What a key is left out to mean is for transformers to say, so values are those of its config class. A key is read, or it
is known to change nothing, or it has the value that transformers gives it anyway; every other one is refused by name.
"""

import copy
from collections.abc import Collection, Mapping
from typing import Any

from megatron_eagle.errors import UserError

# Names, types, heads of other tasks, output formats and, as transformers 4 wrote it into every config, generation.
_HARMLESS_NAMES = """
    architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label initializer_factor initializer_range label2id length_penalty
    max_length min_length model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache
"""
HARMLESS = frozenset((*_HARMLESS_NAMES.split(), "transformers.js_config"))
# What does nothing as long as it is off.
_OFF = ("add_cross_attention", "is_decoder", "is_encoder_decoder", "tf_legacy_loss", "tie_encoder_decoder", "use_mrope")


def read_part(
    said: Mapping[str, Any],
    config_class: Any,
    where: str,
    *,
    model_types: Collection[str],
    read: Collection[str],
    harmless: Collection[str] = (),
    sizes: Mapping[str, int] | None = None,
) -> Any:
    """``said`` as transformers' ``config_class`` reads it.

    where: begins the message. model_types: which there may be. read: keys whose values the caller takes. harmless: keys
    of this part that change nothing that is used of it. sizes: what the shapes of the tensors say; keys that are there
    have to say the same. Raises UserError that names every other key, with its value.
    """
    kind = said.get("model_type")
    if kind not in (None, *model_types):
        raise UserError(f"{where} is of model_type={kind!r}; {' or '.join(model_types)} is understood")
    refuse_unknown(said, where, {*read, *harmless, *(sizes or ())}, config_class().to_dict())
    for name, size in (sizes or {}).items():
        value = said.get(name, size)
        if value not in (size, [size, size]):
            raise UserError(f"{where} says {name}={value!r}, the tensors have {size}")
    try:
        return config_class.from_dict(copy.deepcopy(dict(said)))
    except Exception as error:  # transformers raises several kinds, its own among them, for a value of a wrong type
        raise UserError(f"{where} is not what {config_class.__name__} reads: {' '.join(str(error).split())}") from None


def refuse_unknown(said: Mapping[str, Any], where: str, known: Collection[str], usual: Mapping[str, Any]) -> None:
    """Refuse the keys of ``said`` that are not ``known``, harmless, empty, or of the value that ``usual`` has."""
    wrong = []
    for name, value in said.items():
        if name in known or name in HARMLESS or name.startswith("_") or (name in _OFF and not value):
            continue
        if name in usual:
            if value != usual[name]:
                wrong.append(f"{name}={_short(value)}, only {_short(usual[name])} is supported")
        elif value not in (None, {}, []):
            wrong.append(f"{name}={_short(value)}")
    if wrong:
        raise UserError(f"{where} has keys that may change what the model computes: {'; '.join(wrong)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
