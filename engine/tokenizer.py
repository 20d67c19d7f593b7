"""Text to token ids and back, for the frontend: `tokenizers` and Jinja only, neither torch nor transformers.

Reads a local Hugging Face folder: tokenizer.json, tokenizer_config.json, special_tokens_map.json, the chat template files,
config.json and generation_config.json. Encodes and renders as transformers 5 does; so what encode adds is decided by
tokenizer.json alone, whatever `add_bos_token` in tokenizer_config.json says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import AddedToken

from engine.chat_template import ChatJob, compile_template
from engine.detokenizer import (
    ByteTextSource,
    Detokenizer,
    SpacedTextSource,
    StreamTextSource,
    TextDelta,
    TextSource,
    TokenBytes,
    check_unicode,
)
from engine.errors import ConfigError, InvalidRequest, ModelLoadError

__all__ = ["Detokenizer", "TextDelta", "Tokenizer"]

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"
_RENDER_ARGUMENTS = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"})


class _OwnToken(msgspec.Struct):
    id: int
    content: str


class _OwnTokens(msgspec.Struct):
    """What of tokenizer.json is read where the vocabulary is not needed."""

    added_tokens: list[_OwnToken] = []


class Tokenizer:
    """A model's tokenizer with its special tokens and chat templates. Immutable after `load`, safe to share by threads.

    vocab_size: one more than the highest id that decodes. eos_token_ids: every id that ends a turn, by the tokenizer,
    config.json and generation_config.json together.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: frozenset[int],
        chat_templates: Mapping[str, str],
    ) -> None:
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._chat_templates = dict(chat_templates)
        self._token_bytes = TokenBytes.of(backend)
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size: int = max([backend.get_vocab_size(with_added_tokens=True) - 1, *added]) + 1
        self.eos_token_ids = eos_token_ids

    @classmethod
    def load(cls, folder: Path, *, chat_template: str | None = None) -> Tokenizer:
        """`chat_template` replaces the folder's templates: its text, or the path of a .jinja file.

        Raises ModelLoadError when a file of the folder is missing or cannot be read, ConfigError for a bad `chat_template`.
        """
        backend = _load_backend(folder)
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(config, _read_json(folder / "special_tokens_map.json"))
        _add_tokens(backend, config, special_tokens)
        templates = _folder_templates(folder, config) if chat_template is None else _given_template(chat_template)
        return cls(
            backend,
            special_tokens=special_tokens,
            eos_token_ids=_eos_token_ids(folder, backend.token_to_id, special_tokens),
            chat_templates=templates,
        )

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat_templates)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidRequest (param "prompt") for text with lone surrogates."""
        check_unicode(text, "prompt")
        return self._encode(text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # The batch call is the one that does not work out character offsets; it lets other threads run meanwhile.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids that the tokenizer does not know (models pad their vocabularies) add nothing."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def render_chat(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The prompt text of a conversation, with the options of `chat_job`. Raises InvalidRequest naming the cause."""
        rendered = self.chat_job(messages, **options).render()
        check_unicode(rendered, "messages")
        return rendered

    def chat_job(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        tool_block: str = "",
    ) -> ChatJob:
        """What renders a conversation, as data.

        chat_template: the name of one of the model's templates, or template text. template_kwargs: further variables for the
        template (`documents`, `enable_thinking`, ...). tool_block: what describes the tools where the template does not.
        Raises InvalidRequest for arguments that exclude each other.
        """
        if add_generation_prompt and continue_final_message:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other: set one of them to false",
                param="continue_final_message",
            )
        extra = dict(template_kwargs or {})
        if taken := sorted(_RENDER_ARGUMENTS & extra.keys()):
            raise InvalidRequest(
                f"chat_template_kwargs may not hold {', '.join(taken)}: these are set by the request itself",
                param="chat_template_kwargs",
            )
        variables = {
            **self._special_tokens,
            "documents": None,
            **extra,
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt,
        }
        return ChatJob(
            source=self.template_source(chat_template, with_tools=bool(tools)),
            messages=messages,
            variables=variables,
            continue_final_message=continue_final_message,
            tool_block=tool_block,
        )

    def encode_chat(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """`render_chat`, with its options, as ids."""
        return self.encode_rendered(self.render_chat(messages, **options))

    def encode_rendered(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """A rendered conversation as ids. The template writes the special tokens, so the tokenizer adds none by itself.

        Raises InvalidRequest (param "messages") for text with lone surrogates.
        """
        check_unicode(text, "messages")
        return self._encode(text, add_special_tokens)

    def has_template(self, name: str) -> bool:
        """Whether one of the model's templates has this name."""
        return name in self._chat_templates

    def template_source(self, chat_template: str | None = None, *, with_tools: bool) -> str:
        """The template a conversation goes through; `chat_template` as in `chat_job`. Raises InvalidRequest."""
        if chat_template is not None:
            return self._chat_templates.get(chat_template, chat_template)
        if with_tools and TOOL_TEMPLATE in self._chat_templates:
            return self._chat_templates[TOOL_TEMPLATE]
        if DEFAULT_TEMPLATE in self._chat_templates:
            return self._chat_templates[DEFAULT_TEMPLATE]
        if self._chat_templates:
            names = ", ".join(sorted(self._chat_templates))
            raise InvalidRequest(
                f"this model has no default chat template: name one of {names} in chat_template", param="chat_template"
            )
        raise InvalidRequest(
            "this model has no chat template: use /v1/completions, or start the server with --chat-template FILE",
            param="messages",
        )

    @property
    def added_tokens(self) -> dict[str, int]:
        """Text -> id of the tokens that stand for themselves, markers among them."""
        return {token.content: token_id for token_id, token in self._backend.get_added_tokens_decoder().items()}

    @property
    def special_tokens(self) -> frozenset[str]:
        """Those of the added tokens that `skip_special_tokens` hides."""
        return frozenset(token.content for token in self._backend.get_added_tokens_decoder().values() if token.special)

    def token_id(self, token: str) -> int | None:
        """The id of a token by how the vocabulary writes it; None where there is no such token."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def vocabulary_text(self, token_id: int) -> str:
        """A token as the vocabulary writes it; "" for an id it does not know."""
        return self._backend.id_to_token(token_id) or ""

    def token_text(self, token_id: int) -> str:
        """One token's own text, special tokens included; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes a token adds to a text; b"" for an id the tokenizer does not know."""
        if self._token_bytes is not None:
            return self._token_bytes[token_id]
        return self.decode([token_id], skip_special_tokens=False).encode()

    def detokenizer(
        self,
        prompt_token_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = False,
        min_tokens: int = 0,
    ) -> Detokenizer:
        """Incremental text of what follows `prompt_token_ids`: a first " Paris" after a prompt keeps its space.

        spaces_between_special_tokens: one space between two neighbouring special tokens, where these are shown.
        """
        source: TextSource
        if self._token_bytes is not None:
            skipped = self._special_ids if skip_special_tokens else frozenset()
            source = ByteTextSource(self._token_bytes, prompt_token_ids, skipped)
        else:
            source = StreamTextSource(self._backend, prompt_token_ids, skip_special_tokens)
        if spaces_between_special_tokens and not skip_special_tokens:
            source = SpacedTextSource(source, self._special_ids)
        return Detokenizer(source, stop=stop, include_stop_str_in_output=include_stop_str_in_output, min_tokens=min_tokens)


def read_eos_token_ids(folder: Path) -> frozenset[int]:
    """`Tokenizer.load(folder).eos_token_ids`, in a tenth of its time where the tokenizer's own is among its added tokens.

    Raises ModelLoadError as that does.
    """
    config = _read_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(config, _read_json(folder / "special_tokens_map.json"))
    try:
        own = msgspec.json.decode((folder / "tokenizer.json").read_bytes(), type=_OwnTokens).added_tokens
    except (OSError, msgspec.MsgspecError):
        return Tokenizer.load(folder).eos_token_ids  # or what is wrong with the file
    ids = {token.content: token.id for token in own}
    eos_token = special_tokens.get("eos_token")
    if eos_token is not None and eos_token not in ids:
        return Tokenizer.load(folder).eos_token_ids
    return _eos_token_ids(folder, ids.get, special_tokens)


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelLoadError(
            f"{folder} has no tokenizer.json: save the model with a fast tokenizer "
            "(transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for every kind of bad file
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    # Left-overs of training; a prompt is never cut or padded silently.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _token_content(value: Any) -> str | None:
    """A special token is written as a string or as an AddedToken's fields."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _special_tokens(config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]) -> dict[str, str]:
    merged = {**special_tokens_map, **{name: config[name] for name in SPECIAL_TOKEN_NAMES if config.get(name) is not None}}
    contents = {name: _token_content(merged.get(name)) for name in SPECIAL_TOKEN_NAMES}
    return {name: content for name, content in contents.items() if content}


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> None:
    """What tokenizer_config.json declares and tokenizer.json lacks: added tokens, and the special ones being special."""
    declared: Mapping[str, Any] = config.get("added_tokens_decoder") or {}
    present = backend.get_added_tokens_decoder()
    for token_id, fields in sorted(((int(key), value) for key, value in declared.items()), key=lambda item: item[0]):
        token = AddedToken(**{name: value for name, value in fields.items() if name != "__type"})
        if present.get(token_id) == token and present[token_id].special == token.special:
            continue
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    # A name that is in no vocabulary would get an id past the model's embeddings, so only known ones are marked.
    known = [name for name in special_tokens.values() if name not in special and backend.token_to_id(name) is not None]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in known])


def _eos_token_ids(folder: Path, token_to_id: Callable[[str], int | None], special_tokens: Mapping[str, str]) -> frozenset[int]:
    config = _read_json(folder / "config.json")
    text_config = config.get("text_config")
    generation_config = _read_json(folder / "generation_config.json")
    ids: set[int] = set()
    for source in (config, text_config, generation_config):
        value = source.get("eos_token_id") if isinstance(source, dict) else None
        values = value if isinstance(value, list) else [value]
        ids.update(token_id for token_id in values if isinstance(token_id, int) and token_id >= 0)
    own = token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
    return frozenset(ids if own is None else {*ids, own})


def _folder_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> template text. Files win over the entry in tokenizer_config.json, as in transformers."""
    templates: dict[str, str] = {}
    for value in (config.get("chat_template"), _read_json(folder / "chat_template.json").get("chat_template")):
        if isinstance(value, str):
            templates[DEFAULT_TEMPLATE] = value
        elif isinstance(value, dict):
            templates.update(value)
        elif isinstance(value, list):
            templates.update({entry["name"]: entry["template"] for entry in value})
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    files[DEFAULT_TEMPLATE] = folder / "chat_template.jinja"
    try:
        templates.update({name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()})
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"a chat template in {folder} cannot be read: {error}") from error
    return templates


def _given_template(chat_template: str) -> dict[str, str]:
    text = chat_template
    if "{" not in chat_template and "\n" not in chat_template:  # no template text: a path
        try:
            text = Path(chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"--chat-template {chat_template} cannot be read: {error}", param="chat_template") from error
    try:
        compile_template(text)
    except InvalidRequest as error:
        raise ConfigError(f"--chat-template: {error.message}", param="chat_template") from error
    return {DEFAULT_TEMPLATE: text}
