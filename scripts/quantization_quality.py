"""What quantization costs: logits and perplexity of a real model in int8, and with FP8 weights, FP8 keys and values, and both.

    .venv/bin/python scripts/quantization_quality.py             # the demo model; eight minutes on one CPU core
    .venv/bin/python scripts/quantization_quality.py --variants bf16 int8 --tokens 16384 --context 1024
    .venv/bin/python scripts/quantization_quality.py --model FOLDER --tokens 16384 --context 2048 --out figures.json  # on a GPU

int8: all linears, the head among them, as `--quantization int8` has them on a CPU; by the compiled kernels where they are, else
by torch, which is the same arithmetic. FP8: the layers' weights as `--quantization fp8` has them (a scale for each output row,
activations quantized anew for each token; embeddings, head and norms stay), and keys and values rounded as
`--kv-cache-dtype fp8` stores them (scale 1, computed in bfloat16). A number rounded to e4m3 is the same on every device, so a
CPU tells what a GPU would, but for the order of sums and for the shorter accumulator of some GPUs' FP8 products. The layers run
as transformers has them, over the exact attention.

The text is the README's prose, younger than most models, then that of Python's language reference as `pydoc` ships it. It is
cut into windows of --context tokens, each begun without memory of the one before; every token with one before it counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from engine import fusion
from engine.attention.base import RaggedBatch, group_layers
from engine.attention.hf import StepAttention
from engine.attention.sdpa import SdpaBackend
from engine.config import ModelConfig
from engine.kernels.cpu_library import cpu_kernels, unavailable_reason
from engine.kernels.fp8 import FP8, FP8_MAX
from engine.model_loader import LoadedModel, load_model, resolve_model
from engine.tokenizer import Tokenizer

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK_SIZE = 16
SLICE = 256
"""Positions compared at once: their logits in float32 take 200 kB each at a vocabulary of 50,000."""


@dataclass(frozen=True, slots=True)
class Variant:
    label: str
    dtype: torch.dtype
    weights: Literal["none", "int8", "fp8"] = "none"
    fp8_kv: bool = False


VARIANTS = {
    "float32": Variant("float32", torch.float32),
    "bf16": Variant("bfloat16", torch.bfloat16),
    "int8": Variant("int8 weights and activations", torch.bfloat16, weights="int8"),
    "fp8-weights": Variant("FP8 weights and activations", torch.bfloat16, weights="fp8"),
    "fp8-kv": Variant("FP8 keys and values", torch.bfloat16, fp8_kv=True),
    "fp8": Variant("FP8, both", torch.bfloat16, weights="fp8", fp8_kv=True),
}


@dataclass(frozen=True, slots=True)
class RoundedKV:
    """A step's attention whose keys and values are what pages in e4m3 with scale 1 would give back."""

    step: StepAttention

    def attend(
        self, module: nn.Module, q_1HTD: torch.Tensor, k_1KTD: torch.Tensor, v_1KTD: torch.Tensor, call: Mapping[str, Any]
    ) -> torch.Tensor:
        return self.step.attend(module, q_1HTD, _as_stored(k_1KTD), _as_stored(v_1KTD), call)


def _as_stored(x: torch.Tensor) -> torch.Tensor:
    return x.float().clamp(-FP8_MAX, FP8_MAX).to(FP8).to(x.dtype)


class Models:
    """The forms of a model that the variants share, each loaded when it is first wanted."""

    def __init__(self, folder: Path, device: torch.device, context: int) -> None:
        self._folder, self._device, self._context = folder, device, context
        self._loaded: dict[tuple[torch.dtype, str], tuple[LoadedModel, SdpaBackend]] = {}

    @torch.inference_mode()
    def logits(self, name: str, token_ids: list[int]) -> torch.Tensor:
        """[T, V] for one window, by the variant of that name."""
        variant = VARIANTS[name]
        key = variant.dtype, variant.weights
        if key not in self._loaded:
            self._loaded[key] = self._load(*key)
        loaded, backend = self._loaded[key]
        num_groups = len(group_layers(loaded.layers, BLOCK_SIZE, 1))
        tables: list[Sequence[int]] = [range(1, 1 - (-len(token_ids) // BLOCK_SIZE))]
        step = StepAttention.of(backend, RaggedBatch([len(token_ids)], [0], (tables,) * num_groups))
        ids_1T = torch.tensor([token_ids], device=self._device)
        logits_1TV: torch.Tensor = loaded.model(
            input_ids=ids_1T,
            position_ids=torch.arange(len(token_ids), device=self._device)[None],
            use_cache=False,
            paged_attention=RoundedKV(step) if variant.fp8_kv else step,
        ).logits
        return logits_1TV[0]

    def _load(self, dtype: torch.dtype, weights: str) -> tuple[LoadedModel, SdpaBackend]:
        config = ModelConfig(model=str(self._folder))
        loaded = load_model(self._folder, config, self._device, dtype, served_context=self._context)
        if weights == "fp8":
            fusion.quantize(loaded.model, None)
        if weights == "int8":
            compiled = self._device.type == "cpu" and unavailable_reason() is None
            fusion.pack_linears(loaded.model, cpu_kernels() if compiled else None, "int8", head_only=False)
        if self._device.type == "cpu":
            for parent in list(loaded.model.modules()):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(parent, name, Float32Sums(child))
        groups = group_layers(loaded.layers, BLOCK_SIZE, dtype.itemsize)
        backend = SdpaBackend(loaded.layers, groups, BLOCK_SIZE, dtype, self._device)
        backend.allocate([-(-self._context // BLOCK_SIZE)] * len(groups))
        return loaded, backend


class Float32Sums(nn.Module):
    """A linear with float32 sums and one rounding at the end, as GPUs multiply; many CPUs take far longer over 16 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.linear.bias is None else self.linear.bias.float()
        return F.linear(x.float(), self.linear.weight.float(), bias).to(x.dtype)


@dataclass(slots=True)
class Tally:
    """One variant against the reference, position by position."""

    nll: list[float] = field(default_factory=list)  # of the token that follows, nats
    absolute: list[float] = field(default_factory=list)  # mean over the vocabulary of |logit - reference|
    largest: list[float] = field(default_factory=list)  # max of the same
    relative: list[float] = field(default_factory=list)  # ||logits - reference|| / ||reference||
    kl: list[float] = field(default_factory=list)  # from the reference's distribution to this one, nats
    agree: list[float] = field(default_factory=list)  # 1 where the likeliest token is the same

    def add(self, logits_TV: torch.Tensor, reference_TV: torch.Tensor, next_ids_T: torch.Tensor) -> None:
        """Logits of the positions that next_ids follow."""
        for first in range(0, len(next_ids_T), SLICE):
            rows = slice(first, first + SLICE)
            x_TV, r_TV = logits_TV[rows].float(), reference_TV[rows].float()
            error_TV = (x_TV - r_TV).abs()
            log_p_TV, log_q_TV = r_TV.log_softmax(-1), x_TV.log_softmax(-1)
            self.nll += (-log_q_TV.gather(1, next_ids_T[rows, None])[:, 0]).tolist()
            self.absolute += error_TV.mean(-1).tolist()
            self.largest += error_TV.amax(-1).tolist()
            self.relative += (error_TV.norm(dim=-1) / r_TV.norm(dim=-1)).tolist()
            self.kl += (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).tolist()
            self.agree += (x_TV.argmax(-1) == r_TV.argmax(-1)).float().tolist()

    def summary(self, reference: Tally) -> dict[str, float]:
        """perplexity_change: relative to the reference's, with the standard error of a paired comparison; the rest by name."""
        change = torch.tensor(self.nll, dtype=torch.float64) - torch.tensor(reference.nll, dtype=torch.float64)
        ratio = math.exp(change.mean().item())
        return {
            "perplexity": math.exp(_mean(self.nll)),
            "perplexity_change": ratio - 1,
            "perplexity_change_standard_error": ratio * change.std().item() / math.sqrt(len(change)),
            "logit_error_mean": _mean(self.absolute),
            "logit_error_max": max(self.largest),
            "relative_logit_error_mean": _mean(self.relative),
            "relative_logit_error_max": max(self.relative),
            "kl_mean": _mean(self.kl),
            "kl_max": max(self.kl),
            "top1_agreement": _mean(self.agree),
        }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def measure(
    models: Models, windows: list[list[int]], reference: str, variants: Sequence[str] = tuple(VARIANTS)
) -> dict[str, dict[str, float]]:
    """The variants' figures against the one named `reference`, which comes first."""
    names = [reference, *(name for name in variants if name != reference)]
    tallies = {name: Tally() for name in names}
    with tqdm(total=len(windows) * len(names), unit="pass", file=sys.stderr) as bar:
        for token_ids in windows:
            expected_TV = models.logits(reference, token_ids)[:-1]
            next_ids_T = torch.tensor(token_ids[1:], device=expected_TV.device)
            for name in names:
                bar.set_description(name)
                logits_TV = expected_TV if name == reference else models.logits(name, token_ids)[:-1]
                tallies[name].add(logits_TV, expected_TV, next_ids_T)
                bar.update()
    return {name: tally.summary(tallies[reference]) for name, tally in tallies.items()}


def prose(text: str) -> Iterator[str]:
    """The paragraphs of a Markdown or reStructuredText page that are whole sentences: no code, tables, lists or headings."""
    in_code = False
    for paragraph in text.split("\n\n"):
        fences = paragraph.count("```")
        lines = paragraph.strip("\n").split("\n")
        if (
            not in_code
            and not fences
            and len(paragraph) > 150
            and all(line[:1].isalpha() or line[:1] in '"`*(' for line in lines)
        ):
            yield " ".join(lines)
        in_code ^= fences % 2 == 1


def default_text(readme: Path = README) -> str:
    """See the module's docstring. Paragraphs that stand in several topics of the reference are taken once."""
    pages = [readme.read_text(encoding="utf-8"), *(text for _, text in sorted(topics.items()))]
    return "\n\n".join(dict.fromkeys(paragraph for page in pages for paragraph in prose(page)))


def cut(tokenizer: Tokenizer, text: str, num_tokens: int, context: int) -> list[list[int]]:
    """num_tokens of the text in windows of `context`, each with what the tokenizer puts before every text."""
    before = tokenizer.encode("")
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    if len(token_ids) < num_tokens:
        raise SystemExit(
            f"the text has {len(token_ids):,} tokens, fewer than --tokens {num_tokens:,}: give a longer one (--text)"
        )
    step = context - len(before)
    windows = [before + token_ids[first : min(first + step, num_tokens)] for first in range(0, num_tokens, step)]
    return [window for window in windows if len(window) > 1]


def markdown(figures: Mapping[str, Mapping[str, float]], reference: str) -> str:
    against = VARIANTS[reference].label
    lines = [
        f"| against {against} | perplexity | change | logit error, mean / max | relative, mean / max | KL, mean / max (nats) "
        "| same top token |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        change = f"{row['perplexity_change']:+.2%} ± {row['perplexity_change_standard_error']:.2%}"
        lines.append(
            f"| {VARIANTS[name].label} | {row['perplexity']:.3f} | {'' if name == reference else change} "
            f"| {row['logit_error_mean']:.3f} / {row['logit_error_max']:.2f} "
            f"| {row['relative_logit_error_mean']:.2%} / {row['relative_logit_error_max']:.2%} "
            f"| {row['kl_mean']:.5f} / {row['kl_max']:.3f} | {row['top1_agreement']:.2%} |"
        )
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a folder, a Hub id, a GGUF file or demo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window")
    parser.add_argument("--text", type=Path, metavar="FILE", help="another text")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), help="default: all")
    parser.add_argument("--reference", choices=tuple(VARIANTS), default="float32", help="what the others are compared with")
    parser.add_argument("--num-threads", type=int, help="default: torch's own choice")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there as JSON")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    folder = resolve_model(ModelConfig(model=args.model), lambda phase, detail, fraction: None)
    text = args.text.read_text(encoding="utf-8") if args.text else default_text()
    windows = cut(Tokenizer.load(folder), text, args.tokens, args.context)
    try:
        figures = measure(Models(folder, torch.device(args.device), args.context), windows, args.reference, args.variants)
    except ValueError as error:  # a card or sizes that know no FP8 products
        raise SystemExit(str(error)) from error
    print(markdown(figures, args.reference))
    if args.out:
        record = {
            "model": args.model,
            "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "text": str(args.text) if args.text else "README.md and Python's language reference, prose",
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "tokens": args.tokens,
            "context": args.context,
            "positions": sum(len(window) - 1 for window in windows),
            "reference": args.reference,
            "variants": figures,
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
