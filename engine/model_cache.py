"""Where models lie on this machine: the cache of what Octavo makes, and what is here already without fetching anything."""

from __future__ import annotations

import contextlib
import difflib
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


def check_gguf(path: Path) -> None:
    """Raises ModelLoadError for a file that is something else."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelLoadError(f"{path} is no GGUF file: give a Hugging Face folder, a GGUF file or a Hub id")


def check_folder(path: Path) -> None:
    """Raises ModelLoadError for a folder without a config.json, which is no model's."""
    if not (path / "config.json").is_file():
        raise ModelLoadError(f"{path} has no config.json: give a Hugging Face model folder, a GGUF file or a Hub id")


def check_name(config: ModelConfig) -> None:
    """Raises ModelLoadError where it takes no more than a look to see that `config` names no model: nothing is read, the Hub is
    not asked."""
    if config.model == "demo":
        return
    path = Path(config.model)
    with contextlib.suppress(RuntimeError):  # there is no such user
        path = path.expanduser()
    if path.is_file():
        check_gguf(path)
    elif path.is_dir():
        check_folder(path)
    elif not is_hub_id(config.model):
        raise ModelLoadError(f"there is no file or folder {path}: give a Hub id, a model folder, a GGUF file or 'demo'")


def files_key(*paths: Path) -> str:
    """Changes when a file is another one: of paths, sizes and modification times."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:12]


def is_hub_id(name: str) -> bool:
    """Whether the Hub could have a model of that name, which no file's or folder's name is mistaken for."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.endswith(".gguf")


def hub_cache(config: ModelConfig) -> Path:
    """Where models of the Hub are kept, in the layout that huggingface_hub's other users share: `download_dir`, else theirs."""
    from huggingface_hub import constants

    return Path(config.download_dir or constants.HF_HUB_CACHE).expanduser()


def hub_folder(config: ModelConfig) -> Path:
    """The part of the Hub's cache for the model that `config` names: blobs, refs, snapshots."""
    return hub_cache(config) / f"models--{config.model.replace('/', '--')}"


def hub_snapshot(config: ModelConfig) -> Path | None:
    """The folder with the config.json of a Hub model that is in the cache, if it is, whole or not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(config.model, "config.json", cache_dir=hub_cache(config), revision=config.revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def nearest_in_cache(config: ModelConfig, count: int = 3) -> list[str]:
    """Hub models in the cache whose names are like the one in `config`, with or without their owner; the nearest first."""
    folders = sorted(hub_cache(config).glob("models--*/snapshots/*/config.json"))
    names = {folder.parents[2].name.removeprefix("models--").replace("--", "/", 1) for folder in folders}
    wanted = config.model.lower()
    by_form: dict[str, list[str]] = {}
    for name in sorted(names):
        for form in {name.lower(), name.lower().rpartition("/")[2]}:
            by_form.setdefault(form, []).append(name)
    forms = [wanted, wanted.rpartition("/")[2]]
    near = [form for part in forms for form in difflib.get_close_matches(part, by_form, n=count, cutoff=0.6)]
    return list(dict.fromkeys(name for form in near for name in by_form[form]))[:count]


def present_folder(config: ModelConfig) -> Path:
    """The folder with the config.json of the model that `config` names, if it is on this machine; nothing is fetched or made.

    Raises ModelLoadError where it is not.
    """
    path = Path(config.model).expanduser()
    if config.model == "demo":
        folder: Path | None = demo_folder(cache_root(config))
    elif path.is_file():
        check_gguf(path)
        folder = gguf_folder(path, cache_root(config))
    elif path.is_dir():
        check_folder(path)
        folder = path
    else:
        folder = hub_snapshot(config)
    if folder is None or not (folder / "config.json").is_file():
        near = nearest_in_cache(config) if is_hub_id(config.model) else []
        hint = f" ({', '.join(near)} is)" if near else ""
        raise ModelLoadError(
            f"{config.model} is not on this machine yet{hint}, so its sizes are unknown: give a folder with its config.json, "
            "or let `octavo serve` fetch it"
        )
    return folder
