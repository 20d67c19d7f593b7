"""The engine's exact attention backend with a row's attention replaced, for ideas_flash_attention.py: pages and rows stay as
they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch

from engine.attention.base import LayerSpec
from engine.attention.sdpa import RowStep, SdpaBackend
from engine.kernels.tiled_attention import standard_attention, tiled_attention


class _ReplacedBackend(SdpaBackend):
    attention: ClassVar[Callable[..., torch.Tensor]]

    def attend_row(
        self,
        layer: LayerSpec,
        row: RowStep,
        q_KGQD: torch.Tensor,
        k_KLD: torch.Tensor,
        v_KLD: torch.Tensor,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """See SdpaBackend."""
        out_QHD: torch.Tensor = type(self).attention(
            q_KGQD.permute(2, 0, 1, 3).flatten(1, 2),
            k_KLD.transpose(0, 1),
            v_KLD.transpose(0, 1),
            scaling=layer.scaling,
            window=layer.window,
            softcap=layer.softcap,
            sinks_H=sinks_H,
        )
        out_QKGD = out_QHD.view(-1, *q_KGQD.shape[:2], layer.head_dim)
        return out_QKGD.permute(1, 2, 0, 3)


class StandardBackend(_ReplacedBackend):
    """All scores of a row at once."""

    attention = staticmethod(standard_attention)


class TiledBackend(_ReplacedBackend):
    """By tiles, in plain torch."""

    attention = staticmethod(tiled_attention)
