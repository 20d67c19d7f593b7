"""ServerConfig: the one definition behind YAML files, environment variables and command-line flags.

A value is taken from the first of: flag, environment (`OCTAVO_<NAME>`), `--config` file, `configs/cpu.yaml` or
`configs/gpu.yaml`, `configs/default.yaml`, the default written here. A name nobody
knows is an error that gives the nearest one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from engine.config import (
    ATTENTION_BACKENDS,
    DEVICES,
    DTYPES,
    KV_CACHE_DTYPES,
    LOAD_FORMATS,
    QUANTIZATIONS,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    RecoveryConfig,
    SchedulerConfig,
)
from engine.errors import ConfigError
from engine.logs import LogConfig, LogFormat
from server.config_sources import CONFIGS_DIR, ENV_PREFIX, Source, env_source, nearest, shipped_defaults, yaml_source
from server.flags import Parser, flag_name, make_parser
from server.keys import KeyRing, read_keys
from server.otlp import check_tracing
from server.parsers.registry import REASONING_FORMATS, TOOL_FORMATS
from server.tls import check_tls

DEMO_MODEL_NAMES = ("SmolLM2-135M-Instruct", "demo")
LOG_LEVELS = ("debug", "info", "warning", "error")

_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_count(value: object) -> object:
    """'8k' is 8,000 and '8K' is 8,192; the same for m/M, g/G, t/T. Raises ValueError on anything but a whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgtKMGT]?)", value.strip()) if isinstance(value, str) else None
    if match:
        number = float(match[1]) * _SUFFIXES.get(match[2], 1) if "." in match[1] else int(match[1]) * _SUFFIXES.get(match[2], 1)
        if number == int(number):
            return int(number)
    raise ValueError("must be a whole number, with k, M or G behind it if you like (8k is 8000, 8K is 8192)")


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _parse_list(value: object) -> object:
    """A comma-separated string (environment) or a list (YAML, flags)."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


Count = Annotated[int, BeforeValidator(parse_count)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]
Names = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_parse_list)]


def _setting(default: Any, group: str, description: str, **extra: Any) -> Any:
    """A field with its help group. Ranges that the engine's own config checks are not written twice."""
    bounds = {key: extra.pop(key) for key in ("ge", "le", "gt") if key in extra}
    return Field(default, description=description, json_schema_extra={"group": group, **extra}, **bounds)


def engine_log_level(level: str) -> str:
    """The engine process has nothing to say at debug, but its libraries have much."""
    return "info" if level == "debug" else level


class ServerConfig(BaseModel):
    """Every setting of `octavo serve`. `None` leaves the decision to the engine at load."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False, coerce_numbers_to_str=True
    )

    model: str = _setting(
        "demo", "model", "a Hub id, a Hugging Face folder, a GGUF file, or demo (SmolLM2-135M-Instruct)", kind="model"
    )
    served_model_name: Names = _setting(
        [], "model", "name(s) clients may use for it; the first is the one answered with", shown="the model's"
    )
    revision: str | None = _setting(None, "model", "branch, tag or commit on the Hub", shown="main")
    download_dir: str | None = _setting(None, "model", "where downloads go", kind="dir", shown="the user's cache")
    dtype: str = _setting("auto", "model", "what weights and activations are computed in", choices=DTYPES)
    load_format: str = _setting("auto", "model", "dummy makes random weights by config.json alone", choices=LOAD_FORMATS)
    quantization: str = _setting(
        "none", "model", "of weights and activations: fp8 on a GPU, int8 on a CPU", choices=QUANTIZATIONS
    )
    max_model_len: Count | None = _setting(
        None, "model", "context in tokens (8k = 8000, 8K = 8192)", shown="the largest that fits"
    )
    chat_template: str | None = _setting(
        None, "model", "a Jinja file, or the template itself, instead of the model's own", kind="file", shown="the model's"
    )
    generation_config: Literal["auto", "none"] = _setting("auto", "model", "none ignores the model's own sampling defaults")
    tool_parser: str = _setting(
        "auto", "model", "format of tool calls; auto goes by the chat template", choices=("auto", "none", *TOOL_FORMATS)
    )
    reasoning_parser: str = _setting(
        "auto", "model", "format of reasoning; auto goes by the chat template", choices=("auto", "none", *REASONING_FORMATS)
    )
    embedding_pooling: Literal["mean", "last"] = _setting("mean", "model", "which tokens make an embedding")
    trust_remote_code: bool = _setting(False, "model", "run the Python code that comes with the model")
    allow_pickled_weights: bool = _setting(False, "model", "read *.bin weights, which are pickles, where there are no others")

    host: str = _setting("127.0.0.1", "server", "address to listen on; 127.0.0.1 is this machine only, 0.0.0.0 lets others in")
    port: Count = _setting(8000, "server", "port to listen on; 0 lets the system choose", ge=0, le=65535)
    strict: bool = _setting(False, "server", "refuse request fields nobody knows, instead of naming them in a response header")
    max_open_requests: Count = _setting(4096, "limits", "more at once get a 429; 0 is no limit", ge=0, le=2**31 - 1)
    max_connections: Count | None = _setting(
        None,
        "limits",
        "more at once, idle ones too, get a 503 before anything is read",
        shown="four times --max-open-requests and at least 4,096, as far as the limit of open files allows",
        ge=1,
        le=2**31 - 1,
    )
    max_wait_s: Number | None = _setting(
        None,
        "limits",
        "who would wait longer for a place in the engine gets a 429, unless it came with a burst; 0 is no limit",
        shown="a quarter of what an answer takes here, and at least 1.5",
        ge=0,
        le=86400,
    )
    max_waiting_requests: Count = _setting(
        1024, "limits", "more that wait for a place in the engine get a 429; 0 is no limit", ge=0, le=2**31 - 1
    )
    max_waiting_tokens: Count | None = _setting(
        None,
        "limits",
        "the same by expected tokens, of prompts and answers; 0 is no limit",
        shown="what takes a minute",
        ge=0,
        le=2**63 - 1,
    )
    request_timeout_s: Number = _setting(
        0.0, "limits", "seconds a request may take that does not say (timeout); 0 is no limit", ge=0, le=86400
    )
    first_token_timeout_s: Number = _setting(
        0.0, "limits", "seconds its first token may take (first_token_timeout); 0 is no limit", ge=0, le=86400
    )
    response_store_size: Count = _setting(1024, "server", "answers of /v1/responses kept to go on from", ge=0, le=2**31 - 1)
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "observability", "what the log leaves out")
    log_format: LogFormat = _setting("human", "observability", "json: one object a line, for programs that collect logs")
    otlp_endpoint: str | None = _setting(
        None, "observability", "send a trace of every request to this OpenTelemetry collector (http://host:4318)"
    )
    write_timeout_s: Number = _setting(
        30.0, "limits", "seconds a client may take in nothing of its answer before the request is ended", gt=0, le=86400
    )
    drain_delay_s: Number = _setting(
        0.0, "limits", "seconds after SIGTERM in which new requests are still taken, while /health/ready is 503", ge=0, le=86400
    )
    shutdown_timeout_s: Number = _setting(
        30.0, "limits", "seconds that open requests may go on after that; what is left then ends with an error", ge=0, le=86400
    )

    api_key: Names = _setting(
        [],
        "security",
        "key(s) of which every request but /health must bring one; 'KEY ID SCOPE': api, metrics, admin",
        metavar="KEY",
    )
    api_key_file: str | None = _setting(None, "security", "a file of such keys, one a line; # begins a comment", kind="file")
    metrics_port: Count | None = _setting(
        None, "observability", "serve /metrics on this port too, without a key; 0 lets the system choose", ge=0, le=65535
    )
    metrics_prefix: str = _setting(
        "octavo_", "observability", "how the names of the metrics begin; vllm: makes dashboards and autoscalers for vLLM work"
    )
    tls_cert: str | None = _setting(
        None, "security", "a PEM file of the certificate (chain): HTTPS instead of HTTP", kind="file"
    )
    tls_key: str | None = _setting(
        None, "security", "a PEM file of its private key, where that is not in the certificate's", kind="file"
    )
    cors_origins: Names = _setting(
        [], "security", "pages that may use this server from a browser (https://host), or *", metavar="ORIGIN"
    )
    shared_prefix_cache: bool = _setting(
        False, "security", "let keys share computed prompt beginnings, though one can then time what others asked"
    )
    max_body_bytes: Count = _setting(64 * 2**20, "limits", "a larger request body gets a 413", shown="64M", ge=1024, le=2**40)
    max_json_depth: Count = _setting(128, "limits", "JSON nested deeper gets a 400", ge=8, le=512)
    read_timeout_s: Number = _setting(
        30.0, "limits", "seconds a client may take to send headers, or a body (and 1 s more for each 64 KiB)", gt=0, le=86400
    )
    log_prompts: bool = _setting(False, "observability", "write the text of prompts to the log")

    device: str = _setting("auto", "engine", "auto takes a GPU where there is one", choices=DEVICES)
    attention_backend: str = _setting(
        "auto", "engine", "attention implementation; auto takes the device's best", choices=("auto", *ATTENTION_BACKENDS)
    )
    cuda_graphs: bool = _setting(True, "engine", "capture decode steps on a GPU and replay them")
    cpu_kernels: bool = _setting(True, "engine", "use the kernels compiled for this CPU; without them torch does all")
    step_timeout_s: Number = _setting(
        15.0, "engine", "seconds a step may take (ten times what it should, if that is more) before the engine is restarted"
    )
    restart_wait_s: Number = _setting(60.0, "engine", "seconds new requests wait for an engine that is being restarted")
    max_failed_starts: Count = _setting(3, "engine", "engines that die in a row without a step before the server gives up")
    num_threads: Count | None = _setting(None, "engine", "CPU threads of the engine", shown="the cores it may use")
    max_num_seqs: Count | None = _setting(None, "engine", "most sequences in one step")
    max_num_batched_tokens: Count | None = _setting(None, "engine", "most tokens in one step")
    max_num_mixed_tokens: Count | None = _setting(
        None, "engine", "most tokens in one step while many sequences decode", shown="no limit on a CPU, 1024 on a GPU"
    )

    block_size: Count = _setting(16, "KV cache", "tokens in one page, a power of two")
    kv_cache_dtype: str = _setting(
        "auto", "KV cache", "what keys and values are stored in; auto is the model's dtype", choices=KV_CACHE_DTYPES
    )
    enable_prefix_caching: bool = _setting(True, "KV cache", "reuse the pages of equal prompt beginnings")
    gpu_memory_utilization: Number = _setting(0.90, "KV cache", "on a GPU, share of the card's memory to take in all")
    cpu_memory_share: Number = _setting(0.30, "KV cache", "on a CPU, share of the memory left after the weights")
    kv_cache_memory_bytes: Count | None = _setting(
        None, "KV cache", "bytes for pages (4G = 4 GiB) instead of a share", shown="by the share"
    )
    num_kv_blocks: Count | None = _setting(None, "KV cache", "number of pages instead of any size", shown="by the size")

    @field_validator("tool_parser", "reasoning_parser")
    @classmethod
    def _known_format(cls, name: str, info: ValidationInfo) -> str:
        known = ["auto", "none", *(TOOL_FORMATS if info.field_name == "tool_parser" else REASONING_FORMATS)]
        if name not in known:
            raise ValueError(f"must be one of {', '.join(known)}{nearest(name, known)}")
        return name

    @field_validator("metrics_prefix")
    @classmethod
    def _begins_a_metric(cls, prefix: str) -> str:
        if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,63}", prefix):
            raise ValueError("must be 1 to 64 letters, digits, _ or :, and not begin with a digit (octavo_, vllm:)")
        return prefix

    @field_validator("cors_origins")
    @classmethod
    def _is_origin(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s*]+|null", origin):
                raise ValueError("each must be scheme://host or scheme://host:port, without a path, or *")
        return origins

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that requests may give, the one in answers first."""
        if self.served_model_name:
            return tuple(self.served_model_name)
        return DEMO_MODEL_NAMES if self.model == "demo" else (self.model,)

    def engine_config(self) -> EngineConfig:
        """The engine's part. Raises ConfigError where a value is out of range."""
        return EngineConfig(
            model=ModelConfig(**self._fields_of(ModelConfig)),
            cache=CacheConfig(**self._fields_of(CacheConfig)),
            scheduler=SchedulerConfig(**self._fields_of(SchedulerConfig)),
            parallel=ParallelConfig(**self._fields_of(ParallelConfig)),
            device=self.device,
            attention_backend=self.attention_backend,
            cuda_graphs=self.cuda_graphs,
            cpu_kernels=self.cpu_kernels,
        )

    def read_keys(self, *, again: bool = False) -> KeyRing:
        """The API keys; again: see there. Raises ConfigError."""
        return read_keys(self.api_key, self.api_key_file, again=again)

    def log_config(self) -> LogConfig:
        """How the engine process logs."""
        return LogConfig(engine_log_level(self.log_level), self.log_format)

    def recovery_config(self) -> RecoveryConfig:
        """What the engine's parent goes by. Raises ConfigError where a value is out of range."""
        return RecoveryConfig(**self._fields_of(RecoveryConfig))

    def _fields_of(self, part: type[msgspec.Struct]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in part.__struct_fields__ if name in type(self).model_fields}

    def read_chat_template(self) -> str | None:
        """The text of `chat_template`, read from its file unless it is a template itself. Raises ConfigError."""
        given = self.chat_template
        if given is None or "{{" in given or "{%" in given:
            return given
        try:
            return Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template {given} cannot be read: {error}", param="chat_template") from None


def _check_known(source: Source) -> None:
    known = list(ServerConfig.model_fields)
    for key in source.values:
        if key not in known:
            hint = nearest(source.label(key), map(source.label, known))
            raise ConfigError(f"unknown setting {source.label(key)} in {source.place}{hint}", param=key)


def command_parser(command: str) -> Parser:
    """The command line of `octavo serve`, `plan` or `doctor`."""
    return make_parser(command, ServerConfig.model_fields, shipped_defaults())


def _flag_source(argv: Sequence[str], command: str) -> tuple[Source, str | None]:
    """The flags given, and the --config file. Raises ConfigError on an unknown flag or a model given twice."""
    parser = command_parser(command)
    parsed, unknown = parser.parse_known_args(argv)
    values = vars(parsed)
    config_path, positional = values.pop("config"), values.pop("model_positional")
    for argument in unknown:
        what = argument.split("=", 1)[0]
        raise ConfigError(
            f"unknown argument {what}{nearest(what, parser._option_string_actions)}; see octavo {command} --help", param=what
        )
    if positional is not None:
        if values.get("model", positional) != positional:
            raise ConfigError(f"two models are given, {positional} and --model {values['model']}: give one", param="model")
        values["model"] = positional
    return Source("the command line", values, flag_name), config_path


def has_nvidia_driver(environ: Mapping[str, str]) -> bool:
    """Whether a card may be used, found out without importing torch (which takes seconds)."""
    if environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    paths = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/nvidia-smi")
    return any(Path(path).exists() for path in paths) or shutil.which("nvidia-smi") is not None


def load_config(argv: Sequence[str], environ: Mapping[str, str], *, command: str = "serve") -> ServerConfig:
    """Puts the sources together. command: the one whose flags these are, for its help and errors.

    Raises ConfigError naming the setting and where it was written.
    """
    flags, config_path = _flag_source(argv, command)
    env = env_source(environ)
    config_path = config_path or environ.get(f"{ENV_PREFIX}CONFIG")
    own = [yaml_source(Path(config_path).expanduser())] if config_path else []
    strong = [flags, env, *own]
    device = next((str(source.values["device"]) for source in strong if "device" in source.values), "auto")
    on_gpu = device == "cuda" or (device == "auto" and has_nvidia_driver(environ))
    files = [yaml_source(CONFIGS_DIR / name) for name in ("gpu.yaml" if on_gpu else "cpu.yaml", "default.yaml")]
    sources = [*strong, *files]
    for source in sources:
        _check_known(source)
    chosen = {key: source for source in reversed(sources) for key in source.values}
    try:
        config = ServerConfig(**{key: source.values[key] for key, source in chosen.items()})
        config.engine_config()
        config.recovery_config()
        config.read_keys()
        check_tls(config.tls_cert, config.tls_key)
        check_tracing(config.otlp_endpoint)
    except ValidationError as error:
        raise _config_error(error, chosen) from None
    except ConfigError as error:
        written = chosen.get(error.param or "")
        where = f"{written.label(error.param or '')} in {written.place}: " if written else ""
        raise ConfigError(f"{where}{error.message}", param=error.param) from None
    return config


def _config_error(error: ValidationError, chosen: Mapping[str, Source]) -> ConfigError:
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0])
    source = chosen[key]
    shown = "" if key == "api_key" else f", got {str(first['input'])[:80]!r}"
    reason = first["msg"].removeprefix("Value error, ")
    return ConfigError(f"{source.label(key)} in {source.place}: {reason[0].lower()}{reason[1:]}{shown}", param=key)
