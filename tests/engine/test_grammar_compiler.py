"""GrammarCompiler: what is refused, how long it takes, and that the engine loop goes on meanwhile."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import grammar_compiler
from engine.errors import EngineUnavailable, InvalidRequest, RequestFailed
from engine.grammar import MaskMaker
from engine.grammar_compiler import GrammarCompiler, GrammarSetup
from engine.sampling_params import SamplingParams, StructuredSpec
from tests import ascii_tokenizer
from tests.ascii_tokenizer import EOS_ID


def json_spec(schema: dict[str, Any]) -> StructuredSpec:
    return StructuredSpec("json_schema", json.dumps(schema))


@pytest.fixture(scope="module")
def ascii_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ascii_tokenizer.write(tmp_path_factory.mktemp("ascii"))


@pytest.fixture(scope="module")
def compiler(ascii_folder: Path) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(GrammarSetup(str(ascii_folder), 97, [EOS_ID]))
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def patient(ascii_folder: Path) -> Iterator[GrammarCompiler]:
    """With time enough on a machine that has other work."""
    compiler = GrammarCompiler(GrammarSetup(str(ascii_folder), 97, [EOS_ID]), limit_s=200)
    yield compiler
    compiler.close()


def refusal(compiler: GrammarCompiler, spec: StructuredSpec) -> str:
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(spec).result(timeout=120)
    return caught.value.message


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (json_spec({"type": "string", "pattern": "(?=secret)"}), "JSON schema cannot be used: look-around"),
        (json_spec({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable schema"),
        (json_spec({"$ref": "#/$defs/none"}), "does not exist"),
        (json_spec({"$ref": "https://example.com/secret"}), "not present in a registry"),
        (json_spec({"$ref": "#"}), "nothing can satisfy it"),
        (StructuredSpec("json_schema", "{"), "JSON schema cannot be used"),
        (StructuredSpec("regex", "(secret"), "regular expression cannot be used: unclosed group"),
        (StructuredSpec("regex", r"(a)\1secret"), "backreferences are not supported"),
        (StructuredSpec("lark", 'start: "a"\n   secret secret'), "grammar cannot be used: .* \\(line 2, column"),
        (StructuredSpec("lark", "start: secret"), "unknown name: \\.\\.\\. \\(line 1, column 8\\)"),
        (StructuredSpec("lark", "start: a\na: a"), "nothing can satisfy it"),
        (StructuredSpec("lark", "start: <|secret|>"), "unknown special token"),
    ],
)
def test_a_grammar_that_is_wrong_is_refused_with_the_reason_but_not_the_input(
    compiler: GrammarCompiler, spec: StructuredSpec, message: str
) -> None:
    text = refusal(compiler, spec)
    assert re.search(message, text), text
    assert "secret" not in text or "example.com" in spec.text


def chain(length: int) -> dict[str, Any]:
    """Objects in objects: following the references to the end takes a deep stack."""
    definitions: dict[str, Any] = {
        f"d{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}, "required": ["x"]}
        for i in range(length)
    }
    return {"$defs": {**definitions, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def multiplied(count: int) -> dict[str, Any]:
    """Three to the power of `count` combinations."""
    options = [
        {"anyOf": [{"type": "object", "required": [f"p{i}_{j}"], "properties": {f"p{i}_{j}": {}}} for j in range(3)]}
        for i in range(count)
    ]
    return {"allOf": options}


def rules(name: str, count: int, *, times: int = 1) -> StructuredSpec:
    """A chain of Lark rules (or of terminals, where `name` is a capital), each of which is the next one."""
    lines = [f"{name}{i}: " + " ".join([f"{name}{i + 1}"] * times) for i in range(count)]
    return StructuredSpec("lark", "\n".join([f"start: {name}0", *lines, f'{name}{count}: "a"']))


RECURSIVE = {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/n"}}, {"type": "null"}]}

HOPELESS = {
    "chain of 2,000 references": json_spec(chain(2000)),
    "chain of 20,000 references": json_spec(chain(20_000)),
    "chain of 20,000 rules": rules("r", 20_000),
    "chain of 20,000 terminals": rules("T", 20_000),
    "3^15 combinations": json_spec(multiplied(15)),
    "a billion times": StructuredSpec("regex", "a{1000000000}"),
    "a million times cubed": StructuredSpec("lark", 'start: x{1000000}\nx: y{1000000}\ny: "a"{1000000}'),
    "2^60 by doubling": rules("T", 60, times=2),
    "5,000 parentheses": StructuredSpec("regex", "(" * 5000 + "a" + ")*" * 5000),
    "100,000 whole numbers": json_spec({"enum": list(range(100_000))}),
    "20,000 properties": json_spec({"type": "object", "properties": {f"p{i}": {"minLength": i % 50} for i in range(20_000)}}),
}

LARGE = {
    "40,000 words": json_spec({"enum": [f"value-{i}-{i * 7919 % 100003}" for i in range(40_000)]}),
    "20,000 choices": StructuredSpec("choice", json.dumps([f"w{i}" for i in range(20_000)])),
    "nested quantifiers": StructuredSpec("regex", "((a{1,100}){1,100}){1,100}"),
    "(x+x+)+y": StructuredSpec("regex", "(x+x+)+y"),
    "2^200 states": StructuredSpec("regex", "[ab]*a[ab]{200}"),
    "long strings": json_spec({"type": "string", "minLength": 10**6, "maxLength": 10**9}),
    "300 properties": json_spec({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}),
    "recursion": json_spec({"$ref": "#/$defs/n", "$defs": {"n": RECURSIVE}}),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_a_hopeless_grammar_is_refused_and_the_loop_never_stops(compiler: GrammarCompiler, name: str) -> None:
    future = compiler.compile(HOPELESS[name])
    longest_pause = 0.0
    deadline, last = time.monotonic() + 60, time.monotonic()
    while not future.done() and time.monotonic() < deadline:
        time.sleep(0.001)
        now = time.monotonic()
        longest_pause, last = max(longest_pause, now - last), now
    assert isinstance(future.exception(timeout=0), InvalidRequest)
    assert longest_pause < 0.5, "compiling held the interpreter"


AMBIGUOUS = {
    "itself twice": 'start: s\ns: s s | "a" | "b" | " " | "x"',
    "itself three times": 'start: s\ns: s s s | s s | /[a-z]/ | " "',
    "right recursion over letters": "start: s\ns: /[a-z ]/ s | /[a-z ]/",
    "letters in many groupings": "start: a*\na: b | b b | b b b\nb: /[a-z ]/ | /[a-z ]/ b",
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_an_ambiguous_grammar_is_refused_or_fails_before_a_mask_takes_long(compiler: GrammarCompiler, name: str) -> None:
    try:
        matcher = compiler.compile(StructuredSpec("lark", AMBIGUOUS[name])).result(timeout=60).start(SamplingParams())
    except InvalidRequest as error:
        assert "Too many items" in error.message
        return
    token_ids, times_s = ascii_tokenizer.encode("ab x"), list[float]()
    with pytest.raises(RequestFailed, match=r"Too many items|Current row has|too ambiguous"):
        for index in range(2000):
            started_s = time.thread_time()
            made = MaskMaker(1).make({0: matcher})
            for error in made.errors.values():
                raise error
            matcher.accept(token_ids[index % 2])
            times_s.append(time.thread_time() - started_s)
    assert max(times_s) < 0.2 and sum(times_s) < 0.4 + 0.006 * len(times_s)


@pytest.mark.parametrize("name", LARGE)
def test_a_large_grammar_is_taken_and_its_masks_are_quick(patient: GrammarCompiler, name: str) -> None:
    matcher = patient.compile(LARGE[name]).result(timeout=240).start(SamplingParams())
    rng = random.Random(1)
    slowest = 0.0
    for _ in range(100):
        started_s = time.thread_time()
        masks = MaskMaker(1).make({0: matcher}).masks
        slowest = max(slowest, time.thread_time() - started_s)
        assert masks is not None
        allowed = np.flatnonzero(np.unpackbits(masks.allowed[0].view(np.uint8), bitorder="little"))
        if matcher.accept(int(rng.choice(allowed))):
            break
    assert slowest < 0.5


def test_a_grammar_that_takes_too_long_is_given_up(ascii_folder: Path) -> None:
    slow = StructuredSpec("lark", "start: " + " | ".join(f'"w{i}"' for i in range(60_000)))
    compiler = GrammarCompiler(GrammarSetup(str(ascii_folder), 97, [EOS_ID]), limit_s=0.3)
    try:
        assert "takes more than 0.3 seconds" in refusal(compiler, slow)
        started = time.monotonic()
        assert "takes more than 0.3 seconds" in refusal(compiler, slow) and time.monotonic() - started < 0.1, (
            "it was tried again"
        )
        assert compiler.compile(StructuredSpec("choice", '["a"]')).result(timeout=60), "the next one finds a new process"
    finally:
        compiler.close()


def test_grammars_are_kept_and_the_oldest_go(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_CACHED", 3)
    specs = [StructuredSpec("choice", f'["{i}"]') for i in range(4)]
    first = compiler.compile(specs[0])
    assert compiler.compile(StructuredSpec("choice", '["0"]')) is first
    first.result(timeout=60)
    for spec in specs[1:]:
        compiler.compile(spec).result(timeout=60)
        compiler.compile(specs[0])
    kept = compiler.compile(specs[3])
    assert compiler.compile(specs[0]) is first and compiler.compile(specs[3]) is kept
    assert compiler.compile(specs[1]).result(timeout=60) is not None and len(compiler._cache) == 3


def test_too_many_at_once_are_told_to_come_again(ascii_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_WAITING", 2)
    go = threading.Event()
    monkeypatch.setattr(GrammarCompiler, "_compile", lambda self, spec: go.wait(10))
    compiler = GrammarCompiler(GrammarSetup(str(ascii_folder), 97, [EOS_ID]))
    for i in range(2):
        compiler.compile(StructuredSpec("choice", f'["{i}"]'))
    with pytest.raises(EngineUnavailable, match="try again"):
        compiler.compile(StructuredSpec("choice", '["x"]'))
    go.set()
    compiler.close()


def test_the_process_that_tries_grammars_ends_with_its_owner(ascii_folder: Path) -> None:
    compiler = GrammarCompiler(GrammarSetup(str(ascii_folder), 97, [EOS_ID]))
    compiler.compile(StructuredSpec("choice", '["a"]')).result(timeout=60)
    process = compiler._trials[0]._process
    assert process is not None and process.stdin is not None and process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=10) == 0
    compiler.close()
