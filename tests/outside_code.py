"""Runs exported folders in a process that has torch and transformers and nothing of this project, and no network.

Started as ``python -I -S outside_code.py JOB RESULT PATH...``: JOB and RESULT files of ``torch.save``, PATH where
packages are found (-S reads no .pth file, so no editable install either). Beside that, imports of this project and of
Megatron are refused, and so is every connection.
"""

import importlib.abc
import os
import socket
import sys
from pathlib import Path

OURS = ("megatron_eagle", "eagle_kernels", "megatron")


class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in OURS:
            raise ImportError(f"{name} is not to be had here")
        return None


def main(job, result, *paths):
    sys.path.extend(paths)
    sys.meta_path.insert(0, Refuse())
    socket.socket.connect = lambda *_: (_ for _ in ()).throw(OSError("no network here"))
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{result}.home"}
    import torch

    torch.set_num_threads(1)
    work = torch.load(job, weights_only=True)
    found = {"imports": sorted(name for name in OURS if importable(name)), "models": {}}
    for name, case in work["models"].items():
        found["models"][name] = answers(Path(case["folder"]), case["rows"], work["new_tokens"])
    found["more"] = more(Path(work["models"][work["more"]]["folder"]), work["models"][work["more"]]["rows"], result)
    torch.save(found, result)


def importable(name):
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def load(folder, auto="AutoModelForCausalLM", **options):
    import transformers

    cls = getattr(transformers, auto)
    loaded, info = cls.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **options)
    assert not any(info.values()), info
    return loaded.eval()


def batch_of(rows, side, pad=0):
    """Rows of one batch, padded on ``side``."""
    import torch

    length = max(len(row["tokens"]) for row in rows)
    ids, mask = torch.full((len(rows), length), pad), torch.zeros(len(rows), length, dtype=torch.int64)
    for number, row in enumerate(rows):
        size = len(row["tokens"])
        place = slice(length - size, length) if side == "left" else slice(0, size)
        ids[number, place], mask[number, place] = row["tokens"], 1
    pixels = torch.cat([row["tiles"] for row in rows]) / 127.5 - 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def generated(model, rows, new_tokens, **options):
    """New tokens of every row, up to the end."""
    inputs = batch_of(rows, "left")
    out = model.generate(**inputs, max_new_tokens=new_tokens, **{"do_sample": False, **options})
    stop = model.generation_config.eos_token_id
    told = [row.tolist() for row in out[:, inputs["input_ids"].shape[1] :]]
    return [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in told]


def answers(folder, rows, new_tokens):
    """Logits of every row in a batch padded on the right, and greedy answers in one padded on the left."""
    import torch

    model = load(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(**batch_of(rows, "right")).logits
    pieces = [row_logits[: len(row["tokens"])] for row, row_logits in zip(rows, logits, strict=True)]
    return {"logits": pieces, "answers": generated(model, rows, new_tokens)}


def more(folder, rows, scratch):
    """What else a model of transformers does, on one model."""
    import torch

    model = load(folder, dtype=torch.float32)
    inputs = batch_of(rows, "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    found = {"inputs": inputs, "labels": labels}
    with torch.no_grad():
        plain = model(**inputs, labels=labels)
        found |= {"loss": plain.loss, "logits": plain.logits}
        found["eager"] = load(folder, dtype=torch.float32, attn_implementation="eager")(**inputs).logits
        half = load(folder, "AutoModelForImageTextToText", dtype=torch.bfloat16)
        found |= {"bf16": half(**inputs).logits, "bf16 answers": generated(half, rows, 4)}
        found["auto"] = load(folder, "AutoModel").dtype
        found["kept"] = model(**inputs, logits_to_keep=2).logits
        model.save_pretrained(f"{scratch}.saved")
        found["saved"] = load(Path(f"{scratch}.saved"), dtype=torch.float32)(**inputs).logits
    found["saved folder"] = f"{scratch}.saved"
    found["uncached"] = generated(model, rows, 6, use_cache=False)
    found["beams"] = generated(model, rows, 6, num_beams=3)
    found["beams alone"] = [answer for row in rows for answer in generated(model, [row], 6, num_beams=3)]
    found["twice"] = generated(model, rows, 6, do_sample=True, top_k=1, num_return_sequences=2)
    found["gradients"] = gradients(model, inputs, labels)
    model.gradient_checkpointing_enable()
    found["recomputed gradients"] = gradients(model, inputs, labels)
    model.set_attn_implementation("eager")
    configured = [module for module in model.modules() if hasattr(module, "config")]
    found["attention"] = {type(m).__name__: m.config._attn_implementation for m in configured}
    found["errors"] = [error_of(model, inputs, change) for change in (drop_tile, drop_tiles, add_embeddings)]
    return found


def gradients(model, inputs, labels):
    model.train().zero_grad()
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    model.eval()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def drop_tile(inputs):
    return {**inputs, "pixel_values": inputs["pixel_values"][1:]}


def drop_tiles(inputs):
    return {**inputs, "pixel_values": None}


def add_embeddings(inputs):
    import torch

    return {**inputs, "input_ids": None, "inputs_embeds": torch.zeros(*inputs["input_ids"].shape, 64)}


def error_of(model, inputs, change):
    try:
        model(**change(inputs))
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
