"""The published Eagle models, and a tiny one with the same parts.

Sources: language models, the config.json of Qwen2.5-{0.5B,1.5B,7B,32B}-Instruct; SigLIP, google/paligemma-3b-pt-448's
vision tower; ConvNeXt, timm's convnext_xxlarge.clip_laion2b_soup; which goes with which, the table in NVlabs/Eagle's
README. ``vocab_size`` is the length of the tokenizer after Eagle's special tokens were added (Qwen2.5's 151665, and 9
for Eagle 2, 11 for Eagle 2.5), to which the released models shrink their embeddings.
"""

from megatron_eagle.config.model import EagleConfig, QwenConfig

EAGLE2_VOCABULARY = 151674
EAGLE25_VOCABULARY = 151676

_SIGLIP = {"kind": "siglip"}  # the encoders' defaults are the published numbers
_CONVNEXT = {"kind": "convnext"}


def _qwen_0_5b(vocabulary: int) -> QwenConfig:
    return QwenConfig(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )


def _qwen_1_5b(vocabulary: int) -> QwenConfig:
    return QwenConfig(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )


def _qwen_7b(vocabulary: int) -> QwenConfig:
    return QwenConfig(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )


def _qwen_32b(vocabulary: int) -> QwenConfig:
    return QwenConfig(
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )


_TINY = EagleConfig(
    tile_size=64,
    encoders=(
        {
            "kind": "siglip",
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
        },
        {
            "kind": "convnext",
            "depths": (1, 1, 2, 1),
            "hidden_sizes": (16, 32, 64, 128),
            "image_size": 128,
            "layer_scale_init_value": 1.0,  # 1e-6 is for long training; these blocks would not wake up in a demo
        },
    ),
    language=QwenConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=640,
        tie_word_embeddings=True,
        initializer_range=0.1,
    ),
)

SMALLEST = EagleConfig(
    tile_size=32,
    encoders=(
        {
            "kind": "siglip",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        {"kind": "convnext", "depths": (1, 1, 1, 1), "hidden_sizes": (8, 8, 16, 16), "image_size": 64},
    ),
    language=QwenConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        tie_word_embeddings=True,
        initializer_range=0.1,
    ),
)
"""The model of ``verify``'s tables: all parts, tied embeddings, fewer key/value heads than the largest tp."""

PRESETS: dict[str, EagleConfig] = {
    "eagle2-1b": EagleConfig(tile_size=448, encoders=(_SIGLIP,), language=_qwen_0_5b(EAGLE2_VOCABULARY)),
    "eagle2-2b": EagleConfig(tile_size=448, encoders=(_SIGLIP,), language=_qwen_1_5b(EAGLE2_VOCABULARY)),
    "eagle2-9b": EagleConfig(tile_size=448, encoders=(_SIGLIP, _CONVNEXT), language=_qwen_7b(EAGLE2_VOCABULARY)),
    "eagle2-34b": EagleConfig(tile_size=448, encoders=(_SIGLIP, _CONVNEXT), language=_qwen_32b(EAGLE2_VOCABULARY)),
    "eagle2.5-8b": EagleConfig(tile_size=448, encoders=(_SIGLIP,), language=_qwen_7b(EAGLE25_VOCABULARY)),
    "tiny": _TINY,
}
