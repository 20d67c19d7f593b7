"""A model of the Hugging Face Hub on this machine: what the repository holds, what of it is needed, and what is here already.

Small files come first, so that a model that cannot be served is refused before its weights are fetched; the revision's name is
written last, so that what it leads to is whole. Nothing is asked where HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from engine.config import ModelConfig
from engine.errors import ModelLoadError, OctavoError
from engine.hub_download import Download, HubFile, Report, Retries
from engine.hub_errors import check_token, explain, first_line, hub_address, offline_error
from engine.model_cache import hub_folder, hub_snapshot
from engine.weight_files import check_weights, needed_weights

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

logger = logging.getLogger(__name__)

CheckFolder = Callable[[Path], object]
CheckDisk = Callable[[Path, int], None]

QUESTION_TIMEOUT_S = 10.0
_SMALL_FILES = ("*.json", "*.jinja", "tokenizer*", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_MAX_REVISIONS = 12


@dataclass(frozen=True, slots=True)
class Repository:
    """What the Hub lists of one commit. files: by name."""

    commit: str
    files: dict[str, HubFile]


def hub_model(config: ModelConfig, report: Report, *, check_config: CheckFolder, check_disk: CheckDisk) -> Path:
    """The snapshot folder of the Hub model that `config` names, with all that is needed of it.

    check_config: raises where the model in a folder that holds its config.json cannot be served. check_disk: raises where a
    folder's disk has not so many bytes free. Raises ModelLoadError with the remedy.
    """
    from huggingface_hub import constants

    cached = hub_snapshot(config)
    missing = _missing_file(cached, config) if cached else None
    if constants.is_offline_mode():
        if cached is None or missing is not None:
            raise offline_error(config, missing)
        return cached
    check_token()
    try:
        repository = _ask(config, report, can_wait=cached is None or missing is not None)
    except ModelLoadError as error:
        if cached is None or missing is not None:
            raise
        logger.warning("%s; what the cache holds of it is served", error.message)
        return cached
    check_listing(config, repository)
    return _fetch(config, repository, report, check_config, check_disk)


def check_listing(config: ModelConfig, repository: Repository) -> None:
    """Raises ModelLoadError for a repository that can be told to be of no use from the names of its files."""
    names = repository.files
    has_config = "config.json" in names
    if has_config and config.load_format == "dummy":
        return
    if has_config or any(name.endswith(".gguf") for name in names):
        check_weights(f"the Hub's {config.model}", names, allow_pickled=config.allow_pickled_weights)
    if not has_config:
        raise ModelLoadError(f"the Hub's {config.model} has no config.json: give the id of a model in transformers' format")


def _fetch(
    config: ModelConfig, repository: Repository, report: Report, check_config: CheckFolder, check_disk: CheckDisk
) -> Path:
    folder, files = hub_folder(config), repository.files
    download = Download(config.model, folder, repository.commit, report)

    def fetch(names: list[str]) -> None:
        wanted = [files[name] for name in names]
        if any(not download.is_here(file) for file in wanted):
            check_disk(folder, download.missing_bytes(wanted))
            with _sentences(config, is_download=True):
                download.fetch(wanted)

    fetch(_small_names(config, repository))
    check_config(download.snapshot)
    if config.load_format != "dummy":
        weights = needed_weights(files, download.snapshot)
        absent = next((name for name in weights if name not in files), None)
        if absent is not None:
            raise ModelLoadError(f"the index of {config.model} names {absent}, which the Hub does not list: tell its author")
        fetch(weights)
    _write_ref(folder, config.revision or "main", repository.commit)
    return download.snapshot


def _small_names(config: ModelConfig, repository: Repository) -> list[str]:
    """Configuration, tokenizer, the weights' index, and code where it is trusted (which may lie in folders of its own)."""
    patterns = (*_SMALL_FILES, *(("*.py",) if config.trust_remote_code else ()))
    return [
        name
        for name in repository.files
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns) and ("/" not in name or name.endswith(".py"))
    ]


def _missing_file(folder: Path, config: ModelConfig) -> str | None:
    """What the cached `folder` lacks of its weights, if it does. Weights that may not be read are no matter here."""
    names = {path.name for path in folder.iterdir() if path.exists()}
    if config.load_format == "dummy":
        return None
    if not any(name.endswith((".safetensors", ".bin", ".index.json")) for name in names):
        return "the weights"
    try:
        return next((name for name in needed_weights(names, folder) if name not in names), None)
    except ModelLoadError:
        return "the weights' index"


def _ask(config: ModelConfig, report: Report, *, can_wait: bool) -> Repository:
    """What the Hub lists of the revision. can_wait: whether it is asked again, after a while, when it is out of order."""
    from huggingface_hub import HfApi

    report("look up", f"{config.model} at {hub_address()}", None)
    # Its lines would give every address, with the signatures of those that lead to storage.
    for library in ("httpx2", "httpcore2"):
        logging.getLogger(library).setLevel(logging.WARNING)

    def wait(seconds: float, reason: str) -> None:
        report("look up", f"{config.model}: again in {seconds:.0f} s: {reason}", None)
        time.sleep(seconds)

    retries, api = Retries(wait), HfApi(library_name="octavo")
    with _sentences(config, is_download=False):
        while True:
            try:
                return _repository(
                    api.model_info(config.model, revision=config.revision, timeout=QUESTION_TIMEOUT_S, files_metadata=True)
                )
            except Exception as error:
                if not can_wait:
                    raise
                retries.failed(error)


def _repository(info: ModelInfo) -> Repository:
    files = {}
    for sibling in info.siblings or ():
        path = PurePosixPath(sibling.rfilename)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"it lists {sibling.rfilename!r}, which lies outside of the repository")
        blob = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if blob is None or sibling.size is None or not re.fullmatch("[0-9a-f]{40,64}", blob):
            raise ValueError(f"it lists {sibling.rfilename} without its size and hash")
        files[sibling.rfilename] = HubFile(sibling.rfilename, sibling.size, blob, is_large=bool(sibling.lfs))
    if info.sha is None:
        raise ValueError("it names no commit")
    return Repository(info.sha, files)


@contextmanager
def _sentences(config: ModelConfig, *, is_download: bool) -> Iterator[None]:
    """Turns what huggingface_hub and HTTP raise into ModelLoadError; errors of the disk pass."""
    import httpx2
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        yield
    except OctavoError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, httpx2.HTTPError):
            raise
        revisions = _revisions(config.model) if isinstance(error, RevisionNotFoundError) else []
        raise explain(error, config, revisions, is_download=is_download) from error


def _revisions(name: str) -> list[str]:
    """Branches and tags, if one question tells them."""
    from huggingface_hub.utils import build_hf_headers, get_session

    try:
        url = f"{hub_address()}/api/models/{name}/refs"
        answer = get_session().get(url, headers=build_hf_headers(library_name="octavo"), timeout=QUESTION_TIMEOUT_S)
        refs = answer.raise_for_status().json()
        names = [ref["name"] for kind in ("branches", "tags") for ref in refs[kind]]
    except Exception as error:  # it is only for a better sentence
        logger.debug("no list of revisions: %s", first_line(error))
        return []
    return names if len(names) <= _MAX_REVISIONS else [*names[:_MAX_REVISIONS], "more"]


def _write_ref(folder: Path, revision: str, commit: str) -> None:
    """Let the revision's name lead to the commit, for whoever looks into the cache next."""
    path = folder / "refs" / revision
    if revision == commit or (path.is_file() and path.read_text(encoding="utf-8") == commit):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.write_text(commit, encoding="utf-8")
        new.replace(path)
    except OSError as error:  # all files are there: it serves, also from a cache that may only be read
        logger.warning("%s could not be written (%s): without a network this revision will not be found", path, error.strerror)
