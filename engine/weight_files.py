"""Which of a model's files hold its weights, and whether they may be read: told from names, of a folder or a listing."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Collection
from pathlib import Path

from engine.errors import ModelLoadError

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
_PICKLES = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt")
_OTHER_PICKLES = frozenset({"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"})  # what training leaves
_HEADER_LENGTH_BYTES = 8  # then so many bytes of JSON, then the tensors: https://huggingface.co/docs/safetensors
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def check_weights(where: str, names: Collection[str], *, allow_pickled: bool) -> None:
    """Raises ModelLoadError where `names`, the files in `where`, hold no weights that may be read.

    Safetensors, where there are any, are what is read.
    """
    convert = "convert them (transformers' save_pretrained writes safetensors)"
    safetensors = sorted(name for name in names if name.endswith(".safetensors"))
    if SAFETENSORS in names or f"{SAFETENSORS}.index.json" in names:
        return
    if safetensors:
        raise ModelLoadError(
            f"{where} has weights in {safetensors[0]}, but transformers reads {SAFETENSORS} or what {SAFETENSORS}.index.json "
            f"names: {convert}"
        )
    found = dict.fromkeys(name for pattern in _PICKLES for name in sorted(fnmatch.filter(names, pattern)))
    pickled = [name for name in found if name not in _OTHER_PICKLES]
    if not pickled:
        gguf = next((name for name in sorted(names) if name.endswith(".gguf")), None)
        remedy = f"download {gguf} and give its path" if gguf else f"{convert} or give the path of a GGUF file"
        raise ModelLoadError(f"{where} has no *.safetensors weights: {remedy}")
    if not allow_pickled:
        raise ModelLoadError(
            f"{where} has no *.safetensors weights, only pickles such as {pickled[0]}, which may run code when they are read: "
            f"{convert}, or pass --allow-pickled-weights if you trust whoever made them"
        )
    if not any(fnmatch.fnmatch(name, "pytorch_model*.bin") for name in pickled):
        raise ModelLoadError(f"{where} has weights in {pickled[0]}, but transformers reads pytorch_model*.bin: {convert}")


def needed_weights(names: Collection[str], folder: Path) -> list[str]:
    """The files, of `names`, that will be read for their weights. An index among them is read from `folder`.

    For names that check_weights lets through. Raises ModelLoadError for an index that cannot be read.
    """
    has_safetensors = SAFETENSORS in names or f"{SAFETENSORS}.index.json" in names
    single = SAFETENSORS if has_safetensors else PICKLE
    if single in names:
        return [single]
    index = folder / f"{single}.index.json"
    if index.name not in names:
        return sorted(fnmatch.filter(names, "pytorch_model*.bin"))
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{index} cannot be read ({type(error).__name__}: {error}): fetch the model again") from error


def check_whole(folder: Path, cure: str) -> None:
    """Raises ModelLoadError, naming the file and the cure, where one of the folder's safetensors is not as long as it says."""
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        try:
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
                header = json.loads(file.read(min(header_bytes, _MAX_HEADER_BYTES)))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, KeyError, IndexError, TypeError):
            raise ModelLoadError(f"{path} is damaged, its first bytes are no safetensors header: {cure}") from None
        expected = _HEADER_LENGTH_BYTES + header_bytes + max(ends, default=0)
        if size != expected:
            raise ModelLoadError(f"{path} is damaged, it has {size:,} bytes instead of {expected:,}: {cure}")
