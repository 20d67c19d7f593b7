"""Token ids to text, a few at a time: never half a character, never a part of a stop string.

Most tokenizers decode token by token into bytes (byte-level BPE; sentencepiece with metaspace and byte fallback). For these
`TokenBytes` knows every token's bytes and a UTF-8 decoder joins them: exact over skipped special tokens and over invalid
bytes. All others go through `tokenizers.decoders.DecodeStream`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import tokenizers
from tokenizers.decoders import DecodeStream

from engine.errors import InvalidRequest

# How far back a prompt can matter to the text after it: a UTF-8 character has at most four bytes, so at most three tokens
# of an unfinished one; the rest is room for skipped special tokens.
PROMPT_TAIL_TOKENS = 8

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE vocabularies (GPT-2, Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_level_alphabet()


class TokenBytes(dict[int, bytes]):
    """Token id -> the exact bytes it adds to the text; b"" for an id that the tokenizer does not know. Filled on demand.

    strips_first_space: the decoder drops one space at the very beginning of the text (sentencepiece's dummy prefix).
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, byte_level: bool, byte_fallback: bool, metaspace: bool, strips: bool):
        super().__init__()
        self._backend = backend
        self._byte_level = byte_level
        self._byte_fallback = byte_fallback
        self._metaspace = metaspace
        self._texts: dict[frozenset[int], TokenTexts] = {}
        self.strips_first_space = strips

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> TokenBytes | None:
        """None where the decoder is not one that works token by token."""
        if backend.decoder is None:
            return None
        spec: dict[str, Any] = json.loads(backend.decoder.__getstate__())
        steps: list[dict[str, Any]] = spec["decoders"] if spec["type"] == "Sequence" else [spec]
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return cls(backend, byte_level=True, byte_fallback=False, metaspace=False, strips=False)
        metaspace = strips = fused = False
        for step in steps:
            match step:
                case {"type": "Replace", "pattern": {"String": pattern}, "content": " "} if pattern == _METASPACE:
                    metaspace = True
                case {"type": "Metaspace", "replacement": replacement} if replacement == _METASPACE:
                    metaspace = True
                    strips = step.get("prepend_scheme", "always") != "never"
                case {"type": "ByteFallback"}:
                    pass
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Strip", "content": " ", "start": 1, "stop": 0} if fused:
                    strips = True
                case _:
                    return None
        return cls(backend, byte_level=False, byte_fallback="ByteFallback" in kinds, metaspace=metaspace, strips=strips)

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        data = b"" if token is None else self._decode(token)
        self[token_id] = data
        return data

    def texts(self, skipped: frozenset[int]) -> TokenTexts:
        """Every token's own text, where `skipped` leave none. The same object for the same set."""
        if skipped not in self._texts:
            self._texts[skipped] = TokenTexts(self, skipped)
        return self._texts[skipped]

    def _decode(self, token: str) -> bytes:
        if self._byte_level:
            # An added token may hold characters outside the alphabet; it then stands for itself as a whole.
            values = [_BYTE_OF_CHAR.get(char, -1) for char in token]
            return token.encode() if -1 in values else bytes(values)
        if self._byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return (token.replace(_METASPACE, " ") if self._metaspace else token).encode()


class TokenTexts(dict[int, str | None]):
    """Token id -> the text it adds where no character is unfinished; None for a token that is not whole characters by itself.

    Filled on demand and shared by all requests: most tokens are whole characters, and a look-up is cheaper than a decoder.
    """

    def __init__(self, token_bytes: TokenBytes, skipped: frozenset[int]) -> None:
        super().__init__()
        self._token_bytes = token_bytes
        self._skipped = skipped

    def __missing__(self, token_id: int) -> str | None:
        try:
            text: str | None = "" if token_id in self._skipped else self._token_bytes[token_id].decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text


class TextSource(Protocol):
    """Turns one token after the other into text; what it returns never ends in an unfinished character."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str:
        """What an unfinished character at the end decodes to."""
        ...


class ByteTextSource:
    """Text by the exact bytes of each token. `skipped` are the ids that leave no text (special tokens)."""

    def __init__(self, token_bytes: TokenBytes, prompt_token_ids: Sequence[int], skipped: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._texts = token_bytes.texts(skipped)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # After a token of whole characters nothing is unfinished, whatever stood before it.
        if not (prompt_token_ids and self._texts[prompt_token_ids[-1]]):
            for token_id in prompt_token_ids[-PROMPT_TAIL_TOKENS:]:
                if token_id not in skipped:
                    self._decoder.decode(token_bytes[token_id])
        self._strip_next = token_bytes.strips_first_space and not any(
            token_id not in skipped and token_bytes[token_id] for token_id in prompt_token_ids
        )
        self._between_characters = not self._strip_next and self._is_between_characters()

    def push(self, token_id: int) -> str:
        if self._between_characters:
            text = self._texts[token_id]
            if text is not None:
                return text
        return self._push_bytes(token_id)

    def _push_bytes(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        data = self._token_bytes[token_id]
        if self._strip_next and data:
            self._strip_next = False
            data = data.removeprefix(b" ")
        text = self._decoder.decode(data)
        self._between_characters = not self._strip_next and self._is_between_characters()
        return text

    def _is_between_characters(self) -> bool:
        unfinished, _ = self._decoder.getstate()
        return not unfinished

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class StreamTextSource:
    """Text by the library's own incremental decoder, for decoders that look at neighbouring tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip = skip_special_tokens
        self._stream = DecodeStream(list(prompt_token_ids[-PROMPT_TAIL_TOKENS:]), skip_special_tokens)
        self._unsent: list[int] = []

    def push(self, token_id: int) -> str:
        self._unsent.append(token_id)
        try:
            text = self._stream.step(self._backend, token_id)
        except Exception:  # the library raises a bare Exception when new tokens change text that it has already given out
            text = self._backend.decode(self._unsent, skip_special_tokens=self._skip)
            self._stream = DecodeStream([token_id], self._skip)
        if text:
            self._unsent.clear()
        return text or ""

    def flush(self) -> str:
        return self._backend.decode(self._unsent, skip_special_tokens=self._skip)


class SpacedTextSource:
    """Another source's text, with one space between two special tokens that follow each other. `special`: their ids."""

    def __init__(self, source: TextSource, special: frozenset[int]) -> None:
        self._source = source
        self._special = special
        self._after_special = False
        self.flush = source.flush

    def push(self, token_id: int) -> str:
        is_special = token_id in self._special
        space = " " if is_special and self._after_special else ""
        self._after_special = is_special
        return space + self._source.push(token_id)


class TextDelta(NamedTuple):
    """text: new and safe to send. num_tokens: tokens consumed. stop: the stop string that was completed, if one was."""

    text: str
    num_tokens: int
    stop: str | None


class Detokenizer:
    """The text of one choice while its tokens arrive.

    Text that could be the beginning of a stop string is held back until it is known not to be; where stop strings are part of
    the output, nothing need be. Of several stop strings the one that ends first wins, then the one that starts first. They are
    looked for in the text of the tokens after the first `min_tokens` only. Raises InvalidRequest for stop strings that are
    empty or not valid Unicode.

    is_plain: there are no stop strings; then `push` is `append` for one token, without a TextDelta.
    """

    def __init__(self, source: TextSource, *, stop: Sequence[str], include_stop_str_in_output: bool, min_tokens: int) -> None:
        for string in stop:
            if not string:
                raise InvalidRequest("stop must not hold an empty string", param="stop")
            check_unicode(string, "stop")
        self.push = source.push
        self.is_plain = not stop
        self._source = source
        self._stop = tuple(stop)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        self._num_held_sent = 0  # characters of what is held that have been sent nevertheless
        self._stopped: str | None = None
        self._first_chars = frozenset(string[0] for string in stop)
        self._max_held = max(map(len, stop), default=1) - 1

    def append(self, token_ids: Sequence[int]) -> TextDelta:
        """Tokens after the one that completes a stop string are ignored, in this call and in later ones."""
        push = self.push
        if not self._stop:
            return TextDelta("".join([push(token_id) for token_id in token_ids]), len(token_ids), None)
        if self._stopped is not None:
            return TextDelta("", 0, self._stopped)
        sent: list[str] = []
        for index, token_id in enumerate(token_ids):
            text = push(token_id)
            self._num_tokens += 1
            if self._num_tokens <= self._min_tokens:
                sent.append(text)
            elif text:
                sent.append(self._scan(text))
                if self._stopped is not None:
                    return TextDelta("".join(sent), index + 1, self._stopped)
        return TextDelta("".join(sent), len(token_ids), None)

    def finish(self) -> str:
        """The text still held back, when the choice ends without a stop string. "" after a stop string."""
        if self._stopped is not None:
            return ""
        text = self._held[self._num_held_sent :] + self._source.flush()
        self._held, self._num_held_sent = "", 0
        return text

    def _scan(self, text: str) -> str:
        """Adds `text` to what is held and returns what can be sent; sets `_stopped` at a match."""
        text, num_sent = self._held + text, self._num_held_sent
        matches = [(start + len(s), start, s) for s in self._stop if (start := text.find(s)) >= 0]
        if matches:
            end, start, self._stopped = min(matches)
            self._held = ""
            return text[num_sent:end] if self._include_stop else text[:start]
        self._held = self._stop_beginning(text)
        if self._include_stop:
            self._num_held_sent = len(self._held)
            return text[num_sent:]
        return text[: len(text) - len(self._held)]

    def _stop_beginning(self, text: str) -> str:
        """The longest end of `text` that a stop string begins with."""
        for start in range(max(0, len(text) - self._max_held), len(text)):
            if text[start] in self._first_chars and self._begins_stop(text[start:]):
                return text[start:]
        return ""

    def _begins_stop(self, suffix: str) -> bool:
        return any(string.startswith(suffix) for string in self._stop)


def check_unicode(text: str, param: str) -> None:
    """Raises InvalidRequest where `text` has a lone surrogate: JSON can carry one, UTF-8 (and so a tokenizer) cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{param} must be valid Unicode, got a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}",
            param=param,
        ) from None
