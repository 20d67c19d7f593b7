"""ServerConfig: precedence of its sources, and what is said about wrong names and values."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import ConfigError
from server.config import CONFIGS_DIR, ServerConfig, load_config

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def load(*argv: str, **environ: str) -> ServerConfig:
    return load_config(argv, {**NO_GPU, **environ})


def test_each_source_wins_over_the_weaker_ones(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("port: 1001\nmax-num-seqs: 5\nlog_level: null\n")
    assert load().port == 8000
    assert load().max_num_seqs == 32
    assert load("--device", "cuda").max_num_seqs == 256
    config = load("--config", str(own))
    assert (config.port, config.max_num_seqs, config.log_level) == (1001, 5, "info")
    assert load("--config", str(own), OCTAVO_PORT="1002").port == 1002
    assert load("--config", str(own), "--port", "1003", OCTAVO_PORT="1002").port == 1003
    assert load(OCTAVO_CONFIG=str(own)).port == 1001


def test_every_shipped_file_and_every_default_is_valid() -> None:
    for path in CONFIGS_DIR.glob("*.yaml"):
        if path.name in ("default.yaml", "cpu.yaml", "gpu.yaml"):
            load("--config", str(path)).engine_config()
    ServerConfig().engine_config()


@pytest.mark.parametrize(
    ("argv", "environ", "parts"),
    [
        (["--prot", "1"], {}, ["--prot", "did you mean --port?"]),
        (["--max-model-length", "1"], {}, ["did you mean --max-model-len?"]),
        ([], {"OCTAVO_MAX_NUM_SEQ": "1"}, ["OCTAVO_MAX_NUM_SEQ", "did you mean OCTAVO_MAX_NUM_SEQS?"]),
        (["--port", "high"], {}, ["--port", "whole number", "'high'"]),
        (["--port"], {}, ["--port", "expected one argument"]),
        ([], {"OCTAVO_PORT": "70000"}, ["OCTAVO_PORT", "65535", "70000"]),
        (["--block-size", "17"], {}, ["--block-size", "power of two"]),
        (["--dtype", "int3"], {}, ["--dtype", "bfloat16", "int3"]),
        (["--gpu-memory-utilization", "nan"], {}, ["--gpu-memory-utilization"]),
        (["--max-model-len", "1.0001K"], {}, ["--max-model-len", "1.0001K"]),
        (["--tool-parser", "herms"], {}, ["--tool-parser", "one of auto, none, hermes", "did you mean hermes?", "'herms'"]),
        ([], {"OCTAVO_REASONING_PARSER": "hermes"}, ["OCTAVO_REASONING_PARSER", "one of auto, none, think"]),
        (["--max-open-requests", "-1"], {}, ["--max-open-requests", "'-1'"]),
        (["--embedding-pooling", "max"], {}, ["--embedding-pooling", "'mean' or 'last'"]),
        (["one", "two"], {}, ["unknown argument two"]),
        (["one", "--model", "two"], {}, ["two models", "one", "two"]),
        (["--quantization", "int8", "--device", "cuda"], {}, ["--quantization", "int8 is for a CPU", "fp8 or none"]),
        (["--device", "cpu"], {"OCTAVO_QUANTIZATION": "fp8"}, ["OCTAVO_QUANTIZATION", "needs a GPU", "int8 or none"]),
        (["--config", "/no/such.yaml"], {}, ["/no/such.yaml", "No such file"]),
    ],
)
def test_a_wrong_name_or_value_is_refused_where_it_was_written(
    argv: list[str], environ: dict[str, str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*argv, **environ)
    for part in parts:
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("text", "part"),
    [("prot: 1\n", "did you mean port?"), ("- port\n", "name: value"), ("a: b: c", "cannot be read"), ("port: true\n", "port")],
)
def test_a_wrong_yaml_file_is_refused_by_name(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"own\.yaml") as caught:
        load("--config", str(path))
    assert part in caught.value.message


@pytest.mark.parametrize(
    ("text", "value"), [("4096", 4096), ("8k", 8000), ("32K", 32768), ("1M", 2**20), ("1.5k", 1500), ("4G", 4 * 2**30)]
)
def test_counts_take_suffixes(text: str, value: int) -> None:
    config = load("--max-model-len", text, OCTAVO_KV_CACHE_MEMORY_BYTES=text)
    assert config.max_model_len == config.kv_cache_memory_bytes == value


def test_lists_and_switches() -> None:
    config = load(
        "m", "--served-model-name", "a", "b", "--no-enable-prefix-caching", OCTAVO_API_KEY="k1, k2", OCTAVO_STRICT="1"
    )
    assert config.model_names == ("a", "b")
    assert config.api_key == ["k1", "k2"]
    assert config.strict and not config.enable_prefix_caching
    assert load("m").model_names == ("m",)
    assert "demo" in load().model_names
    assert load(OCTAVO_API_KEY="").api_key == []


def test_a_wrong_api_key_is_not_printed(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("api_key: [[secret]]\n")
    with pytest.raises(ConfigError) as caught:
        load("--config", str(path))
    assert "secret" not in caught.value.message


def test_engine_config_has_every_engine_setting() -> None:
    engine = load("m", "--block-size", "32", "--num-threads", "2", "--device", "cpu", "--revision", "r").engine_config()
    assert (engine.model.model, engine.model.revision) == ("m", "r")
    assert (engine.cache.block_size, engine.parallel.num_threads, engine.device) == (32, 2, "cpu")
    assert engine.scheduler.max_num_batched_tokens == 512


def test_chat_template_is_a_file_or_the_text_itself(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ messages }}")
    assert load("--chat-template", str(path)).read_chat_template() == "{{ messages }}"
    assert load("--chat-template", "{{ x }}").read_chat_template() == "{{ x }}"
    assert load().read_chat_template() is None
    with pytest.raises(ConfigError, match="--chat-template"):
        load("--chat-template", str(tmp_path / "none")).read_chat_template()
