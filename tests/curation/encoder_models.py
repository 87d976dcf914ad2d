"""Small random models with the interfaces of the real ones: SSCD's TorchScript, folders of CLIP and SigLIP, ..."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors


def write_torchscript(path: Path, dim: int = 24) -> Path:
    """Pixels of any size -> [pictures, dim]: a mean colour on a grid, mixed by a fixed matrix."""

    class Embed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed = torch.nn.Linear(3 * 16, dim, bias=False)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.mixed(torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1))

    torch.manual_seed(3)
    torch.jit.trace(Embed().eval(), torch.zeros(2, 3, 32, 32)).save(str(path))
    return path


def _tokenizer(folder: Path, words: list[str], length: int) -> None:
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    own = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*special, *words])}, "<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=length, **names).save_pretrained(folder)


WORDS = [
    "a",
    "dog",
    "cat",
    "red",
    "blue",
    "green",
    "chart",
    "of",
    "the",
    "what",
    "is",
    "this",
    "color",
    "in",
    "picture",
]


def write_pair(folder: Path, kind: str) -> Path:
    """A CLIP or SigLIP of a few thousand parameters. kind: clip or siglip."""
    import transformers

    torch.manual_seed(5)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "max_position_embeddings": 16, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0}  # fmt: skip
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model = transformers.CLIPModel(config)
        processor = transformers.models.clip.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    else:
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        model = transformers.SiglipModel(config)
        processor = transformers.models.siglip.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    _tokenizer(folder, WORDS, 16)
    return folder


def write_sentences(folder: Path) -> Path:
    """A sentence-transformers folder of a few thousand parameters."""
    import json

    import transformers

    torch.manual_seed(6)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=40, max_position_embeddings=64, **sizes))
    model.eval().save_pretrained(folder)
    _tokenizer(folder, WORDS, 64)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"idx": number, "path": path, "type": f"sentence_transformers.models.{kind}"}
               for number, (path, kind) in enumerate(kinds.items())]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48}))
    return folder
