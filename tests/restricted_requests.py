"""What a device path must do with requests whose tokens are restricted, or that want a vector; on a GPU and elsewhere."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import torch
from torch import nn

from engine.messages import AddRequest, RequestOutput
from engine.sampling_params import SamplingParams, StructuredSpec
from engine.tokenizer import Tokenizer
from tests.device_harness import Engine

LONGEST = 80
NAMES = {"enum": ["ab", "ba"]}
OBJECT = {
    "type": "object",
    "properties": {"name": NAMES, "on": {"type": "boolean"}, "n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["name", "on", "n"],
    "additionalProperties": False,
}


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def check_schemas_among_free_text(
    engine: Engine, folder: Path, prompts: list[list[int]], schema: dict[str, Any], num_free: int = 8
) -> None:
    """Answers that follow a schema, greedy and drawn, one choice and several, while others say what they like."""
    # Without a bound of white space, which the frontend adds, a random model fills its answer with it.
    spec = StructuredSpec("json_schema", json.dumps({**schema, "x-guidance": {"whitespace_flexible": False}}))
    messages = [
        AddRequest(
            request_id=f"schema {i}",
            prompt_token_ids=prompt,
            sampling=SamplingParams(
                temperature=float(i % 2), seed=i, n=1 + i % 3, max_tokens=LONGEST, structured=spec, ignore_eos=True
            ),
        )
        for i, prompt in enumerate(prompts)
    ]
    free = SamplingParams(temperature=0.0, max_tokens=num_free, ignore_eos=True)
    messages += [AddRequest(request_id=f"free {i}", prompt_token_ids=prompt, sampling=free) for i, prompt in enumerate(prompts)]
    outputs = engine.run(messages)
    tokenizer = Tokenizer.load(folder)
    for i in range(len(prompts)):
        assert len(tokens_of(outputs[f"free {i}"])) == num_free
        for choice in range(1 + i % 3):
            mine = [output for output in outputs[f"schema {i}"] if output.choice_index == choice]
            assert mine[-1].finish_reason == "stop"
            jsonschema.validate(json.loads(tokenizer.decode(tokens_of(mine))), schema)


def check_bad_words(engine: Engine, prompt: list[int]) -> None:
    """What a model says by itself, it does not say once the words are banned: of one token and of two."""

    def say(**changes: object) -> list[int]:
        sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **changes})
        return engine.generate([prompt], sampling)[0]

    said = say()
    pair = tuple(said[2:4])
    without_pair = say(bad_words=(pair,))
    assert pair not in list(itertools.pairwise(without_pair))
    first = list(itertools.pairwise(said)).index(pair)
    assert without_pair[: first + 1] == said[: first + 1]
    assert said[0] not in say(bad_words=((said[0],),))
    allowed = (said[0] + 1, said[0] + 2)
    assert set(say(allowed_token_ids=allowed)) <= set(allowed)


def check_embeddings(engine: Engine, model: nn.Module, prompts: list[list[int]], tolerance: float) -> None:
    """Vectors by our way against a model's own last hidden states."""
    for pooling in ("mean", "last"):
        messages = [
            AddRequest(
                request_id=f"{pooling} {i}", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=0), pooling=pooling
            )
            for i, prompt in enumerate(prompts)
        ]
        outputs = engine.run(messages)
        for message in messages:
            (output,) = outputs[message.request_id]
            assert output.embedding is not None
            ours = torch.from_numpy(np.frombuffer(output.embedding, dtype="<f4").copy())
            ids = torch.tensor([message.prompt_token_ids], device=next(model.parameters()).device)
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][0].float().cpu()
            expected = hidden.mean(dim=0) if pooling == "mean" else hidden[-1]
            assert torch.nn.functional.cosine_similarity(ours, expected, dim=0) > 1 - tolerance
            assert float((ours.norm() / expected.norm() - 1).abs()) < max(tolerance, 1e-4) ** 0.5
