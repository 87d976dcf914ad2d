"""``megatron-eagle convert``: Hugging Face checkpoints in and out, and comparing any two checkpoints."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eagle.cli.common import Verbs, count, positive_int, verb

if TYPE_CHECKING:
    from megatron_eagle.conversion.convert import Options


def add(verbs: Verbs) -> None:
    """Declare the verb, its actions and their arguments."""
    parser = verb(
        verbs,
        "convert",
        "convert checkpoints from and to Hugging Face, with a proof",
        "Converts tensor by tensor, without a GPU, from and to any layout. Every result holds proof.json and\n"
        "proof.md. Given again after an interruption, the same command continues.",
        "  megatron-eagle convert megatron-to-hf runs/my/checkpoints/stage2 released/my-eagle\n",
    )
    add_actions(parser)


def add_actions(parser: argparse.ArgumentParser) -> None:
    """The actions; also the whole command line of tools/convert_checkpoint.py."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    come = verb(
        actions,
        "hf-to-megatron",
        "a released Eagle, or the parts of a new one, to a checkpoint to train from",
        "One SOURCE is a released Eagle 2 or 2.5. Several are the parts of a new one, in any order: a Qwen2.5\n"
        "folder and its vision encoders as they are published (docs/encoders.md); each is a folder or a .safetensors\n"
        "file.\n"
        "A recipe names OUT as model.initial_weights and OUT/tokenizer as its tokenizer.",
        "  megatron-eagle convert hf-to-megatron hub/Eagle2-1B checkpoints/eagle2-1b\n"
        "  megatron-eagle convert hf-to-megatron hub/Qwen2.5-7B-Instruct hub/paligemma-3b-pt-448 \\\n"
        "      hub/convnext_xxlarge.safetensors checkpoints/eagle2-9b-start\n",
        progress=True,
    )
    come.add_argument("sources", type=Path, nargs="+", metavar="SOURCE")
    come.add_argument("out", type=Path, metavar="OUT")
    come.add_argument("--tile-size", type=positive_int, default=None, help="of a new Eagle, in pixels (default: 448)")
    come.add_argument(
        "--tokens",
        choices=("eagle2", "eagle2.5"),
        default=None,
        help="which tokens a new Eagle adds, in order (default: eagle2)",
    )
    come.add_argument(
        "--add-tokens", type=Path, default=None, metavar="FILE", help="add tokens of your own, one a line, as text"
    )
    come.add_argument("--seed", type=count, default=None, help="draws a new Eagle's connector (default: 1234)")
    _add_common(come)
    come.set_defaults(run=_import_hf, kept=_kept)
    go = verb(
        actions,
        "megatron-to-hf",
        "a checkpoint to the form in which Eagle models are published",
        "CHECKPOINT is a step's folder, or a stage's, of which the newest is taken. LoRA's adapters are merged with\n"
        "their base.",
        "  megatron-eagle convert megatron-to-hf runs/my/checkpoints/stage2 released/my\n",
        progress=True,
    )
    go.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    go.add_argument("out", type=Path, metavar="OUT")
    go.add_argument(
        "--format",
        choices=("A", "B"),
        default=None,
        help="B: Eagle 2.5, one encoder; A: Eagle 2, mixtures too (default: as it came, else B if it fits)",
    )
    go.add_argument("--tokenizer", type=Path, default=None, help="tokenizer folder (default: the checkpoint's own)")
    go.add_argument(
        "--code",
        choices=("own", "nvidia"),
        default="own",
        help="what computes OUT: code of ours, put into it; or NVIDIA's, from its repository (default: own)",
    )
    _add_base(go)
    _add_common(go)
    go.set_defaults(run=_export_hf, kept=_kept)
    _add_peft(actions)
    check = verb(
        actions,
        "check",
        "compare the weights of two checkpoints, bit by bit",
        "Each may be a released folder or a Megatron checkpoint of any layout. Exits 1 if they differ.",
        "  megatron-eagle convert check hub/Eagle2-1B runs/my/checkpoints/stage1\n",
        progress=True,
    )
    check.add_argument("first", type=Path, metavar="A")
    check.add_argument("second", type=Path, metavar="B")
    check.set_defaults(run=_check, kept=lambda options: "nothing is kept of the check")


def _kept(options: argparse.Namespace) -> str:
    return f"whole files are kept in {options.out}.partial"


def _add_peft(actions: Verbs) -> None:
    out = verb(
        actions,
        "megatron-to-peft",
        "LoRA's adapters to a folder that PEFT loads on the exported base",
        "CHECKPOINT is a step's folder, or a stage's, of a run with LoRA.",
        "  megatron-eagle convert megatron-to-peft runs/my/checkpoints/stage2 released/my-adapter\n",
    )
    out.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    out.add_argument("out", type=Path, metavar="OUT")
    out.add_argument("--format", choices=("A", "B"), default=None, help="of the exported base, as in megatron-to-hf")
    _add_base(out)
    out.set_defaults(run=_export_peft, kept=lambda options: "nothing is kept")
    back = verb(
        actions,
        "peft-to-megatron",
        "a folder of PEFT to adapters that a recipe names as lora.initial",
        "BASE is the checkpoint that the adapters belong to.",
        "  megatron-eagle convert peft-to-megatron hub/my-adapter checkpoints/eagle2-1b checkpoints/my-adapter\n",
        progress=True,
    )
    back.add_argument("adapter", type=Path, metavar="ADAPTER")
    back.add_argument("base", type=Path, metavar="BASE")
    back.add_argument("out", type=Path, metavar="OUT")
    back.set_defaults(run=_import_peft, kept=lambda options: "nothing is kept")


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ema", action="store_true", help="the running mean (stage key ema) in place of the weights")
    parser.add_argument("--base", type=Path, default=None, help="of LoRA's adapters (default: what they trained on)")


def _export_peft(options: argparse.Namespace) -> None:
    from megatron_eagle.conversion.adapters import megatron_to_peft

    layers = megatron_to_peft(options.checkpoint, options.out, base=options.base, kind=options.format, ema=options.ema)
    print(f"{options.out}: adapters of {layers} layers; peft.PeftModel.from_pretrained(model, '{options.out}')")


def _import_peft(options: argparse.Namespace) -> None:
    from megatron_eagle.conversion.adapters import peft_to_megatron

    layers = peft_to_megatron(options.adapter, options.base, options.out)
    print(f"{options.out}: adapters of {layers} layers; a recipe names it as lora.initial")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=None, help="round weights (default: keep types)")
    parser.add_argument(
        "--no-logits", action="store_true", help="do not run the model on both sides; the proof says so"
    )


def _import_hf(options: argparse.Namespace) -> None:
    from megatron_eagle.checkpoint.files import read_description
    from megatron_eagle.conversion.convert import hf_to_megatron
    from megatron_eagle.conversion.new_tokens import read_tokens

    words = read_tokens(options.add_tokens) if options.add_tokens else ()
    proof = hf_to_megatron(
        options.sources,
        options.out,
        _options(options),
        tile_size=options.tile_size,
        tokens=options.tokens,
        seed=options.seed,
        words=words,
    )
    if words:
        rows = read_description(options.out).model["language"]["vocab_size"]
        ids = json.loads((options.out / "tokenizer" / "added_tokens.json").read_text(encoding="utf-8"))
        print(
            f"{len(words)} tokens added: a recipe needs model.language.vocab_size={rows}; a stage's "
            f"new_rows_from={min(ids[word] for word in words)} trains their rows alone"
        )
    print(f"{options.out}: {proof.round_trip.parameters:,} parameters, proof passed; see {options.out / 'proof.md'}")


def _export_hf(options: argparse.Namespace) -> None:
    from megatron_eagle.conversion.convert import megatron_to_hf

    proof = megatron_to_hf(
        options.checkpoint,
        options.out,
        _options(options),
        kind=options.format,
        tokenizer=options.tokenizer,
        code=options.code,
        base=options.base,
        ema=options.ema,
    )
    print(f"{options.out}: {proof.round_trip.parameters:,} parameters, proof passed; see {options.out / 'proof.md'}")


def _options(options: argparse.Namespace) -> "Options":
    import torch

    from megatron_eagle.conversion.convert import Options

    dtype = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    return Options(dtype=dtype, logits=not options.no_logits)


def _check(options: argparse.Namespace) -> None:
    from megatron_eagle.conversion.check import check

    comparison = check(options.first, options.second)
    for line in comparison.lines():
        print(line)
    print("equal, bit by bit" if comparison.equal else "different")
    if not comparison.equal:
        sys.exit(1)
