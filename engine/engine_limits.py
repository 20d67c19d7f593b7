"""EngineLimits: on which device an engine runs, and how much of a step's work at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.config import EngineConfig, check_quantization
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the configuration leaves to the device: its defaults, resolved."""

    device: torch.device
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_mixed_tokens: int | None
    pipeline_depth: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @classmethod
    def of(cls, config: EngineConfig) -> EngineLimits:
        """Raises ConfigError where a device is asked for that is not there, or the limits contradict each other."""
        has_cuda = torch.cuda.is_available()
        if config.device == "cuda" and not has_cuda:
            raise ConfigError("device is cuda, but torch finds no usable CUDA device; use --device cpu or auto", param="device")
        on_gpu = has_cuda if config.device == "auto" else config.device == "cuda"
        check_quantization(config.model.quantization, on_gpu=on_gpu)
        scheduler = config.scheduler
        max_num_seqs = scheduler.max_num_seqs or (256 if on_gpu else 32)
        max_num_batched_tokens = scheduler.max_num_batched_tokens or max(8192 if on_gpu else 512, max_num_seqs)
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs ({max_num_seqs}), "
                "so that every running sequence can get a token in each step",
                param="max_num_batched_tokens",
            )
        max_num_mixed_tokens = scheduler.max_num_mixed_tokens
        if max_num_mixed_tokens is None and on_gpu:
            max_num_mixed_tokens = min(max(1024, max_num_seqs), max_num_batched_tokens)
        if max_num_mixed_tokens is not None and not max_num_seqs <= max_num_mixed_tokens <= max_num_batched_tokens:
            raise ConfigError(
                f"max_num_mixed_tokens must be between max_num_seqs ({max_num_seqs}) and max_num_batched_tokens "
                f"({max_num_batched_tokens}), got {max_num_mixed_tokens}",
                param="max_num_mixed_tokens",
            )
        depth = scheduler.pipeline_depth
        return cls(
            device=torch.device("cuda" if on_gpu else "cpu"),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_mixed_tokens=max_num_mixed_tokens,
            pipeline_depth=depth if depth is not None else int(on_gpu),
        )
