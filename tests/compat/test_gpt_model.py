"""compat/gpt_model.py."""

import pytest
import torch
from contracts import contract, megatron_groups, the, without_gpu
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_eagle.compat.gpt_model import HookedGPTModel


class Hooked(HookedGPTModel):
    """Turns nothing, and returns the sum of Megatron's losses with what it was made of."""

    def before_layers(self, position_ids):
        self.angles = torch.zeros(position_ids.shape[1], 1, 1, self.config.kv_channels)
        return self.angles

    def after_layers(self, hidden_states, labels, loss_mask, pack, predict):
        return predict(hidden_states), hidden_states, labels, loss_mask, pack


class OverPacks(torch.nn.Module):
    """Attends to nothing."""

    def forward(self, query, *args, **kwargs):
        return query.flatten(2)


@without_gpu
@contract(
    "Megatron's GPTModel.forward no longer passes the second result of _preprocess to its layers as rotary angles, "
    "or its layers' output with labels, loss_mask and packed_seq_params to _postprocess: model/qwen.py makes angles "
    "and loss there"
)
def test_contract_hooks_before_and_behind_the_layers():
    the("megatron.core.models.gpt:GPTModel._preprocess")
    the("megatron.core.models.gpt:GPTModel._postprocess")
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    with megatron_groups():
        model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, use_cpu_initialization=True)
        model = Hooked(
            config,
            get_gpt_layer_local_spec(),
            vocab_size=16,
            max_sequence_length=4,
            position_embedding_type="none",
        )
        model.decoder.layers[0].self_attention.core_attention = OverPacks()  # Megatron's own takes no packs
        given = []
        model.decoder.layers[0].register_forward_pre_hook(
            lambda layer, args, named: given.append(named["rotary_pos_emb"]), with_kwargs=True
        )
        tokens, mask = torch.arange(4)[None], torch.ones(1, 4)
        pack = PackedSeqParams(qkv_format="sbhd")
        losses, hidden, labels, loss_mask, passed = model(
            tokens, torch.arange(4)[None], None, labels=tokens, loss_mask=mask, packed_seq_params=pack
        )
        assert given and given[0] is model.angles
        assert (losses.shape, hidden.shape) == ((1, 4), (4, 1, 8))
        assert labels is tokens and loss_mask is mask and passed is pack


def test_a_model_without_its_hooks_is_not_built():
    with pytest.raises(TypeError, match="after_layers.*before_layers"):
        HookedGPTModel()
