"""SplitModel: a loaded causal model in two halves, so that logits are made of the rows that want them alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from engine.attention.hf import StepAttention
from engine.fused_decoder import FusedDecoder
from engine.native_decoder import NativeDecoder


class _GivenHiddenStates(nn.Module):
    """Stands where a causal model has its decoder, and hands back what it is given."""

    def forward(self, *, inputs_embeds: torch.Tensor, **_ignored: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)  # the output class with every field a head may pass on


class SplitModel:
    """A Hugging Face causal model in two halves: decoder, then head, each callable for any number of rows.

    The head half is a shallow copy of the model (same weights) whose decoder hands its input through, so that the class's own
    forward makes the logits, with its soft cap or scaling if it has one. Replace modules of the model before, not after.
    fused: stands for the decoder where there is one.
    """

    def __init__(self, model: nn.Module, vocab_size: int, fused: FusedDecoder | NativeDecoder | None = None) -> None:
        prefix = str(model.base_model_prefix)
        self._decoder = getattr(model, prefix)
        self._head = copy.copy(model)
        self._head._modules = {**model._modules, prefix: _GivenHiddenStates()}
        self._vocab_size = vocab_size
        self.fused = fused
        self._plain_head = _plain_head(model, self._head)

    def hidden_states(
        self, input_ids_1T: torch.Tensor, position_ids_1T: torch.Tensor, attention: StepAttention
    ) -> torch.Tensor:
        """Final hidden states [T, hidden size]."""
        if self.fused is not None:
            return self.fused(input_ids_1T[0], attention)
        output = self._decoder(input_ids=input_ids_1T, position_ids=position_ids_1T, use_cache=False, paged_attention=attention)
        return output.last_hidden_state[0]  # type: ignore[no-any-return]

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[N, vocab_size] of hidden states [N, hidden size], in the dtype that the head makes them."""
        if self._plain_head is not None:
            return self._plain_head(hidden_states)[:, : self._vocab_size]  # type: ignore[no-any-return]
        logits = self._head(inputs_embeds=hidden_states[None], use_cache=False).logits
        return logits[0, :, : self._vocab_size]  # type: ignore[no-any-return]


@torch.inference_mode()
def _plain_head(model: nn.Module, head: nn.Module) -> nn.Module | None:
    """The model's `lm_head` where logits are its output and nothing more, seen on random input. For a CPU, where the way
    through the class's forward takes longer than all else around a step's products."""
    linear = getattr(model, "lm_head", None)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(linear, nn.Module) or embeddings.weight.device.type != "cpu":
        return None
    hidden = torch.randn(2, embeddings.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(embeddings.weight.dtype)
    return linear if torch.equal(linear(hidden), head(inputs_embeds=hidden[None], use_cache=False).logits[0]) else None
