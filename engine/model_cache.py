"""Where models lie on this machine: the cache of what Octavo makes, and what is here already without fetching anything."""

from __future__ import annotations

import hashlib
from pathlib import Path

from engine.config import ModelConfig
from engine.errors import ModelLoadError

CONVERSION = "v1"  # part of every converted folder's name; raise it when the conversion changes
_DEMO_FOLDER = "SmolLM2-135M-Instruct"


def cache_root(config: ModelConfig) -> Path:
    """Where converted models are kept: `download_dir`, else the user's cache."""
    return Path(config.download_dir).expanduser() if config.download_dir else Path.home() / ".cache" / "octavo" / "models"


def demo_folder(root: Path) -> Path:
    """Where the conversion of the demo model is kept."""
    return root / f"{_DEMO_FOLDER}-{CONVERSION}"


def gguf_folder(gguf: Path, root: Path) -> Path:
    """Where the conversion of `gguf` is kept."""
    return root / f"{gguf.stem}-{files_key(gguf)}-{CONVERSION}"


def files_key(*paths: Path) -> str:
    """Changes when a file is another one: of paths, sizes and modification times."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:12]


def present_folder(config: ModelConfig) -> Path:
    """The folder with the config.json of the model that `config` names, if it is on this machine; nothing is fetched or made.

    Raises ModelLoadError where it is not.
    """
    path = Path(config.model).expanduser()
    if config.model == "demo":
        folder: Path | None = demo_folder(cache_root(config))
    elif path.is_file():
        folder = gguf_folder(path, cache_root(config))
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"{path} has no config.json: give a Hugging Face model folder, a GGUF file or a Hub id")
        folder = path
    else:
        folder = _hub_folder(config)
    if folder is None or not (folder / "config.json").is_file():
        raise ModelLoadError(
            f"{config.model} is not on this machine yet, so its sizes are unknown: give a folder with its config.json, or let "
            "`octavo serve` fetch it"
        )
    return folder


def _hub_folder(config: ModelConfig) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(config.model, "config.json", cache_dir=config.download_dir, revision=config.revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
