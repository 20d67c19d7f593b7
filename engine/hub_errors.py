"""What can go wrong between here and the Hugging Face Hub: each error as a sentence that says what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.config import ModelConfig
from engine.errors import ModelLoadError
from engine.model_cache import hub_cache, nearest_in_cache

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

HUB_SETTINGS = "https://huggingface.co/settings/tokens"
_MAX_QUOTED = 200  # characters of what a server said
_TOKEN = "HF_TOKEN (or of `hf auth login`)"


def hub_address() -> str:
    """The Hub that is asked: HF_ENDPOINT's, else huggingface.co."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a sentence, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:_MAX_QUOTED].rstrip(".") if lines else type(error).__name__


def in_cache_hint(config: ModelConfig) -> str:
    """' (in the cache there is ...)' with the nearest names; nothing where there are none."""
    names = nearest_in_cache(config)
    return f" (in the cache there is {', '.join(names)})" if names else ""


def offline_error(config: ModelConfig, missing: str | None) -> ModelLoadError:
    """For a model that is not in the cache, or only in part (missing: a file), while the Hub may not be asked."""
    revision = f" at revision {config.revision!r}" if config.revision else ""
    where = f"in the cache {hub_cache(config)}"
    state = f"is {where} without {missing}" if missing else f"is not {where}{in_cache_hint(config)}"
    return ModelLoadError(
        f"{config.model}{revision} {state}, and HF_HUB_OFFLINE forbids to fetch it: start once without HF_HUB_OFFLINE, or give "
        "a local folder"
    )


def explain(error: Exception, config: ModelConfig, revisions: list[str], *, is_download: bool = False) -> ModelLoadError:
    """The sentence for an error of huggingface_hub or of HTTP. revisions: that the model has, where they are known.

    is_download: whether it came while a file was fetched, which the next start goes on with.
    """
    import httpx2
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    name, page = config.model, f"{hub_address()}/{config.model}"
    if isinstance(error, GatedRepoError):
        return ModelLoadError(_gated(name, page))
    if isinstance(error, RevisionNotFoundError):
        known = f"it has {', '.join(revisions)}" if revisions else f"see {page}/tree/main"
        return ModelLoadError(f"{name} has no revision {config.revision or 'main'!r}: {known}")
    if isinstance(error, RepositoryNotFoundError):
        return ModelLoadError(_not_found(config))
    if isinstance(error, HfHubHTTPError):
        return ModelLoadError(_refused(error, name))
    if is_download:
        return ModelLoadError(
            f"the download of {name} from {hub_address()} was cut ({first_line(error)}): start again, and it goes on from "
            "where it was"
        )
    if isinstance(error, httpx2.HTTPError | httpx2.InvalidURL):
        return ModelLoadError(
            f"{name} cannot be looked up, since the Hub at {hub_address()} cannot be reached ({first_line(error)}): check the "
            "network and HF_ENDPOINT, or give a local folder"
        )
    return ModelLoadError(
        f"{hub_address()} does not answer like a Hugging Face Hub ({type(error).__name__}: {first_line(error)}): check "
        "HF_ENDPOINT and the network's proxy, or give a local folder"
    )


def check_token() -> None:
    """Raises ModelLoadError for a token that cannot even be sent; it is never quoted."""
    from huggingface_hub import get_token

    token = get_token()
    if token is not None and not (token.isascii() and token.isprintable()):
        raise ModelLoadError(f"the token in {_TOKEN} holds characters that no token has: copy it again from {HUB_SETTINGS}")


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _gated(name: str, page: str) -> str:
    if _has_token():
        return (
            f"{name} is gated, and the token in {_TOKEN} may not read it: accept the terms at {page} with that token's "
            "account, and let the token read gated models"
        )
    return (
        f"{name} is gated: accept its terms at {page}, then set HF_TOKEN to a token of that account (from {HUB_SETTINGS}), "
        "or log in with `hf auth login`"
    )


def _not_found(config: ModelConfig) -> str:
    private = f"let the token in {_TOKEN} read it" if _has_token() else "set HF_TOKEN, or log in with `hf auth login`"
    return (
        f"there is no folder and no Hub model {config.model!r}: check the spelling{in_cache_hint(config)}, and if the model is "
        f"private, {private}"
    )


def _refused(error: HfHubHTTPError, name: str) -> str:
    status = error.response.status_code
    if status == 401 and not _has_token():
        return f"the Hub at {hub_address()} gives {name} only to who has a token: set HF_TOKEN, or log in with `hf auth login`"
    if status == 401:
        return (
            f"the Hub does not accept the token in {_TOKEN} for {name}: make a new one at {HUB_SETTINGS}, or unset it for "
            "a public model"
        )
    if status == 429:
        return (
            f"the Hub at {hub_address()} limits how often it is asked (429) while {name} is fetched: start again later, or set "
            "HF_TOKEN, which raises the limit"
        )
    said = " ".join((error.server_message or "").split())[:_MAX_QUOTED].rstrip(".")
    quoted = f" ({said})" if said else ""
    if status >= 500 or status == 408:
        return f"the Hub at {hub_address()} answers {status}{quoted} for {name}, several times in a row: start again later"
    return f"the Hub at {hub_address()} refuses {name} with {status}{quoted}: see {hub_address()}/{name}"
