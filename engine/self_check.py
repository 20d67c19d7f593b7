"""What only the engine's own libraries can say of this machine: `python -m engine.self_check PART [JSON]` prints a JSON object.

`octavo doctor` asks in processes of their own, because an import may fail, crash or hang, and torch takes seconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.config import ModelConfig
from engine.errors import ModelLoadError, OctavoError
from engine.model_cache import check_name, present_folder

HUB_TIMEOUT_S = 10.0


def look_at_torch(_: ModelConfig) -> dict[str, Any]:
    """The build, and what it finds: cuda is the CUDA version that torch was built for, None in a build for CPUs."""
    import torch

    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "usable": torch.cuda.is_available()}
    if found["usable"]:
        found["architectures"] = torch.cuda.get_arch_list()
        found["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found


def look_at_cpu_kernels(_: ModelConfig) -> dict[str, Any]:
    """compiled: whether they lie in the cache. reason: why there are none, or will be none."""
    from engine.kernels.cpu_build import CpuLibraryUnavailable, load_cpu_library

    try:
        made = load_cpu_library(build=False)
    except CpuLibraryUnavailable as error:
        return {"compiled": False, "reason": str(error)}
    return {"compiled": True, "compiler": made.compiler}


def look_at_toolchain(_: ModelConfig) -> dict[str, Any]:
    """Compiles a tiny extension as Triton does. Raises ConfigError."""
    from engine.kernels.toolchain import try_toolchain

    return {"said": try_toolchain()}


def look_at_model(config: ModelConfig) -> dict[str, Any]:
    """folder: where it lies, None for a Hub model that is not here. config: its config.json. Raises OctavoError.

    Of a model that is not here the Hub is asked for config.json and the sizes of the files (download_bytes), no more.
    """
    from engine.hub_errors import offline_error

    path = Path(config.model).expanduser()
    try:
        folder = present_folder(config)
    except OctavoError:
        if config.model == "demo" or path.exists():
            raise
        check_name(config)
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise offline_error(config, None) from None
        return _ask_the_hub(config)
    if config.load_format != "dummy":
        _check_files(config, folder)
    return {"folder": str(folder), **_read(folder, config)}


def _check_files(config: ModelConfig, folder: Path) -> None:
    from engine.weight_files import check_weights, check_whole, needed_weights

    names = {file.name for file in folder.iterdir()}
    check_weights(str(folder), names, allow_pickled=config.allow_pickled_weights)
    missing = [name for name in needed_weights(names, folder) if not (folder / name).is_file()]
    if missing:
        raise ModelLoadError(f"{folder} lacks {len(missing)} of its weight files, such as {missing[0]}: fetch the model again")
    check_whole(folder, "fetch it again")


def _read(folder: Path, config: ModelConfig) -> dict[str, Any]:
    from engine.model_support import read_config

    found = read_config(folder, trust_remote_code=config.trust_remote_code)
    architecture = (found.architectures or [found.model_type])[0]
    return {"architecture": architecture, "config": json.loads((folder / "config.json").read_text(encoding="utf-8"))}


def _ask_the_hub(config: ModelConfig) -> dict[str, Any]:
    from huggingface_hub import HfApi, hf_hub_download

    from engine.hub_errors import check_token, explain

    check_token()
    with tempfile.TemporaryDirectory(prefix="octavo-doctor-") as scratch:
        try:
            info = HfApi().model_info(config.model, revision=config.revision, files_metadata=True, timeout=HUB_TIMEOUT_S)
            hf_hub_download(config.model, "config.json", revision=config.revision, local_dir=scratch)
        except Exception as error:
            raise explain(error, config, []) from None
        sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
        weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors") and "/" not in name)
        return {"folder": None, "download_bytes": weights, **_read(Path(scratch), config)}


PARTS: Mapping[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "torch": look_at_torch,
    "cpu_kernels": look_at_cpu_kernels,
    "toolchain": look_at_toolchain,
    "model": look_at_model,
}


def main(argv: list[str]) -> None:
    """Prints what the part found, or {"error": a sentence}; a bug, or a library that does not import, is an error too."""
    config = msgspec.json.decode(argv[1], type=ModelConfig) if len(argv) > 1 else ModelConfig()
    try:
        found = PARTS[argv[0]](config)
    except OctavoError as error:
        found = {"error": error.message}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
