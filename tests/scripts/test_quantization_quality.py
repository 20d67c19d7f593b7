"""The cost of quantization at its smallest size: every variant is measured, errors are counted right, and the text is prose."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import quantization_quality
import torch
from quantization_quality import VARIANTS, Models, Tally

from engine.tokenizer import Tokenizer
from tests import tiny_models

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("FP8 products need compute capability 8.9", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("llama"))


def test_the_whole_of_it_with_a_tiny_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--model",
        str(folder),
        "--device",
        DEVICE,
        "--tokens",
        "150",
        "--context",
        "64",
        "--out",
        str(tmp_path / "out.json"),
    ]
    assert quantization_quality.main(arguments) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    variants = record["variants"]
    assert set(variants) == set(VARIANTS) and record["positions"] == 150 - 3
    assert (
        variants["float32"]["logit_error_max"] == variants["float32"]["kl_max"] == variants["float32"]["perplexity_change"] == 0
    )
    for name in ("bf16", "int8", "fp8-weights", "fp8-kv", "fp8"):
        figures = variants[name]
        assert all(map(math.isfinite, figures.values())) and figures["perplexity"] > 1
        assert 0 < figures["relative_logit_error_mean"] < 1 and 0 < figures["kl_mean"] < 1 and figures["top1_agreement"] > 0.5
    for name in ("int8", "fp8-weights", "fp8-kv"):
        assert variants["bf16"]["relative_logit_error_mean"] < variants[name]["relative_logit_error_mean"]
        assert variants[name]["relative_logit_error_mean"] < variants["fp8"]["relative_logit_error_mean"]
    table = capsys.readouterr().out
    assert "| against float32 |" in table and all(f"| {variant.label} |" in table for variant in VARIANTS.values())


def test_equal_variants_are_equal_in_every_figure(folder: Path) -> None:
    token_ids = Tokenizer.load(folder).encode("the printer folds the sheet three times", add_special_tokens=False)
    models, tally = Models(folder, torch.device(DEVICE), context=64), Tally()
    first, second = (models.logits("bf16", token_ids)[:-1] for _ in range(2))
    tally.add(second, first, torch.tensor(token_ids[1:], device=DEVICE))
    figures = tally.summary(tally)
    assert figures["logit_error_max"] == figures["relative_logit_error_max"] == figures["kl_max"] == 0
    assert figures["top1_agreement"] == 1


def test_figures_of_known_logits() -> None:
    """Two positions with two tokens each: equal odds in the reference, odds of 3 to 1 here."""
    reference, logits = torch.ones(2, 2), torch.tensor([[1 + math.log(3), 1.0], [1.0, 1 + math.log(3)]])
    base, tally = Tally(), Tally()
    base.add(reference, reference, torch.tensor([0, 0]))
    tally.add(logits, reference, torch.tensor([0, 0]))
    figures = tally.summary(base)
    assert base.summary(base)["perplexity"] == pytest.approx(2)
    assert figures["perplexity"] == pytest.approx(math.sqrt(4 / 3 * 4))
    assert figures["perplexity_change"] == pytest.approx(figures["perplexity"] / 2 - 1)
    assert figures["logit_error_mean"] == pytest.approx(math.log(3) / 2)
    assert figures["logit_error_max"] == pytest.approx(math.log(3))
    assert figures["relative_logit_error_mean"] == pytest.approx(math.log(3) / math.sqrt(2))
    assert figures["kl_mean"] == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert figures["top1_agreement"] == 0.5


def test_the_text_is_prose(folder: Path) -> None:
    sentence = "It loads a model and keeps its keys and values in pages of sixteen tokens, " * 3
    code = f"```python\n{sentence}\n\n{sentence}\n```"
    page = "\n\n".join(["# Title", sentence, code, "| a | b |\n|---|---|", f"    {sentence}", f"- {sentence}"])
    assert list(quantization_quality.prose(page)) == [sentence]
    paragraphs = quantization_quality.default_text().split("\n\n")
    assert len(paragraphs) == len(set(paragraphs)) > 100
    assert paragraphs[0].startswith("An OpenAI-compatible model server.")


def test_windows_hold_every_token_once(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    text = "pages of sixteen tokens are counted, shared and freed again " * 4
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    windows = quantization_quality.cut(tokenizer, text, 50, 16)
    assert [len(window) for window in windows] == [16, 16, 16, 2]
    assert [token_id for window in windows for token_id in window] == token_ids[:50]
    with pytest.raises(SystemExit, match="fewer than --tokens 9,999"):
        quantization_quality.cut(tokenizer, text, 9999, 16)
