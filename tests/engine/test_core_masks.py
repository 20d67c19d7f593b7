"""Grammars and bad words in the core, over a fake runner that obeys masks: every choice says in a crowd what it says alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine.core import EngineCore
from engine.errors import InvalidRequest
from engine.grammar import GrammarTokenizer, MaskedRows, MaskMaker, Matcher
from engine.messages import AddRequest
from engine.sampling_params import SamplingParams, StructuredSpec, choice_seed
from engine.step import HostMasks, PendingOutput, SchedulerOutput
from tests import ascii_tokenizer
from tests.ascii_tokenizer import EOS_ID, GrammarsAtOnce, decode, encode
from tests.fake_runner import VOCAB_SIZE, FakeRunner, _allowed, next_token
from tests.scheduler_harness import Harness, expect, prompt_of

REGEX = StructuredSpec("regex", "[ab]{3}-[0-9]{2,9}z")
SCHEMA = StructuredSpec(
    "json_schema",
    '{"x-guidance":{"whitespace_pattern":" ?"},"type":"object","properties":{"n":{"type":"integer","minimum":0,"maximum":99},'
    '"t":{"type":"array","items":{"enum":["x","yy"]},"maxItems":3}},"required":["n","t"],"additionalProperties":false}',
)
CHOICE = StructuredSpec("choice", '["yes","no","maybe"]')
FREE_END = StructuredSpec("regex", "[a-e]+")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> GrammarTokenizer:
    return ascii_tokenizer.load(tmp_path_factory.mktemp("ascii"))


@dataclass
class RecordingRunner(FakeRunner):
    """Keeps the masks of every step, and the order of calls."""

    masks: list[HostMasks | None] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def launch(self, step: SchedulerOutput) -> None:
        self.calls.append("launch")
        super().launch(step)

    def sample(self, masks: HostMasks | None) -> Any:
        self.calls.append("sample")
        self.masks.append(masks)
        pending = super().sample(masks)
        return _Noted(pending, self.calls)


@dataclass
class _Noted:
    pending: PendingOutput
    calls: list[str]

    def done(self) -> bool:
        return True

    def wait(self) -> Any:
        self.calls.append("wait")
        return self.pending.wait()


@dataclass
class MaskHarness(Harness):
    grammars: GrammarsAtOnce | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.runner = RecordingRunner(self.runner.groups, self.block_size)
        self.core = EngineCore(
            self.scheduler,
            self.runner,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=frozenset({EOS_ID}),
            pipeline_depth=self.depth,
            grammars=self.grammars,
        )


@pytest.fixture
def harness_of(tokenizer: GrammarTokenizer) -> Iterator[Any]:
    made: list[MaskHarness] = []

    def make(**options: Any) -> MaskHarness:
        made.append(MaskHarness(grammars=GrammarsAtOnce(tokenizer), **options))
        return made[-1]

    yield make
    for harness in made:
        harness.core.close()


def alone(tokenizer: GrammarTokenizer, prompt: list[int], *, choice: int = 0, **options: Any) -> tuple[list[int], str]:
    """What the fake model says to a prompt under a grammar and bad words, without core and scheduler."""
    sampling = SamplingParams(**{"max_tokens": 8, **options})
    spec = sampling.structured
    matcher = Matcher.of_bad_words(sampling) if spec is None else tokenizer.compile(spec).start(sampling)
    maker, output = MaskMaker(1), list[int]()
    while len(output) < sampling.max_tokens:
        masks = maker.make({0: matcher}).masks or HostMasks()
        output.append(next_token(prompt + output, choice_seed(sampling.seed, choice), _allowed(masks, 0)))
        if output[-1] == EOS_ID or matcher.accept(output[-1]):
            return output, "stop"
    return output, "length"


CASES: dict[str, dict[str, Any]] = {
    "regex": {"structured": REGEX, "max_tokens": 30},
    "schema": {"structured": SCHEMA, "max_tokens": 60},
    "choice": {"structured": CHOICE},
    "free end": {"structured": FREE_END, "max_tokens": 25},
    "cut": {"structured": REGEX, "max_tokens": 4},
    "bad words": {"bad_words": (tuple(encode("ab")), tuple(encode("b")), tuple(encode("cde"))), "structured": FREE_END},
    "bad words only": {"bad_words": tuple((i, j) for i in range(3, 40) for j in range(50, 97, 2))[:1000], "max_tokens": 40},
}


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("tight", [False, True])
def test_alone_and_in_a_crowd_each_follows_its_own_grammar(
    tokenizer: GrammarTokenizer, harness_of: Any, depth: int, tight: bool
) -> None:
    harness = harness_of(depth=depth, **({"num_blocks": 17} if tight else {"num_blocks": 200}))
    prompts = {name: prompt_of(3 + i, seed=i) for i, name in enumerate(CASES)}
    for name, options in CASES.items():
        harness.add(name, prompts[name], **options)
        harness.add(f"free {name}", prompts[name], max_tokens=12)
    harness.run()
    assert not tight or harness.scheduler.stats().preemptions > 0
    for name, options in CASES.items():
        said = harness.tokens[name, 0], harness.finished[name, 0]
        assert said == alone(tokenizer, prompts[name], **options), f"{name}: {decode(said[0])!r}"
        assert harness.tokens[f"free {name}", 0] == expect(prompts[name], 12), "a row without need was masked"
    assert decode(harness.tokens["choice", 0]) in ("yes", "no", "maybe")


def test_the_end_of_a_grammar_is_stop_without_an_eos_token_or_with_one(harness_of: Any) -> None:
    harness = harness_of()
    harness.add("choice", prompt_of(4), structured=CHOICE)
    for seed in range(8):
        harness.add(f"free end {seed}", prompt_of(4), structured=FREE_END, seed=seed, max_tokens=60)
    harness.run()
    last = [output for output in harness.outputs if output.finish_reason]
    assert {output.finish_reason for output in last} == {"stop"}
    by_name = {output.request_id: output for output in last}
    assert by_name["choice"].stop_token_id is None and EOS_ID not in harness.tokens["choice", 0]
    assert all(output.stop_token_id == EOS_ID for name, output in by_name.items() if name != "choice")


def test_ignore_eos_goes_on_for_as_long_as_the_grammar_does(harness_of: Any) -> None:
    harness = harness_of()
    for seed in range(8):
        harness.add(
            f"r{seed}", prompt_of(4), structured=StructuredSpec("regex", "a{2,9}"), seed=seed, ignore_eos=True, max_tokens=20
        )
    harness.run()
    assert all(decode(tokens) == "a" * 9 for tokens in harness.tokens.values()) and set(harness.finished.values()) == {"stop"}


@pytest.mark.parametrize("depth", [0, 1])
def test_every_choice_has_a_matcher_of_its_own_and_forks_start_with_the_row_s_mask(
    tokenizer: GrammarTokenizer, harness_of: Any, depth: int
) -> None:
    harness = harness_of(depth=depth)
    harness.add("r", prompt_of(9), structured=REGEX, n=6, max_tokens=20)
    harness.run()
    answers = [harness.tokens["r", choice] for choice in range(6)]
    assert len(harness.runner.steps[0].forks) == 5
    assert answers == [alone(tokenizer, prompt_of(9), structured=REGEX, max_tokens=20, choice=i)[0] for i in range(6)]
    assert len({decode(answer) for answer in answers}) > 1


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("fails_late", [False, True])
def test_a_step_that_did_not_fit_is_made_again_with_the_same_masks(
    tokenizer: GrammarTokenizer, harness_of: Any, depth: int, fails_late: bool
) -> None:
    harness = harness_of(depth=depth)
    harness.runner.fails_late = fails_late
    count = iter(range(10_000))
    harness.runner.out_of_memory = lambda step: next(count) % 9 == 3
    for i, (name, options) in enumerate(CASES.items()):
        harness.add(name, prompt_of(5 + i, seed=i), **options)
    harness.run()
    for i, (name, options) in enumerate(CASES.items()):
        assert (harness.tokens[name, 0], harness.finished[name, 0]) == alone(tokenizer, prompt_of(5 + i, seed=i), **options)


def test_a_step_that_does_not_fit_and_whose_requests_have_all_ended(harness_of: Any) -> None:
    harness = harness_of(depth=1)
    harness.add("r", prompt_of(4), structured=StructuredSpec("choice", '["a"]'))
    harness.runner.fails_late = True
    harness.runner.out_of_memory = lambda step: step.step_id == 1
    harness.run()
    assert harness.finished == {("r", 0): "stop"} and decode(harness.tokens["r", 0]) == "a"


@pytest.mark.parametrize("depth", [0, 1])
def test_a_replay_goes_on_in_the_middle(tokenizer: GrammarTokenizer, harness_of: Any, depth: int) -> None:
    for name, options in CASES.items():
        whole, reason = alone(tokenizer, prompt_of(6), **options)
        for known in range(1, len(whole) - 1):
            harness = harness_of(depth=depth)
            harness.tokens["r", 0] = whole[:known]
            harness.num_choices["r"] = 1
            sampling = SamplingParams(**{"max_tokens": 8, **options})
            message = AddRequest(
                request_id="r", prompt_token_ids=prompt_of(6), sampling=sampling, output_token_ids=[whole[:known]]
            )
            assert harness.core.add(message)
            harness.run()
            assert (harness.tokens["r", 0], harness.finished["r", 0]) == (whole, reason), name


def test_bad_words_of_several_tokens_are_never_completed(harness_of: Any) -> None:
    words = tuple(tuple(encode(word)) for word in ("ab", "ba", "aac"))
    harness = harness_of()
    for seed in range(20):
        harness.add(
            f"r{seed}", prompt_of(4), structured=StructuredSpec("regex", "[abc]{30}"), bad_words=words, seed=seed, max_tokens=40
        )
    harness.run()
    texts = [decode(tokens) for tokens in harness.tokens.values()]
    assert all(len(text) == 30 for text in texts) and len(set(texts)) > 10
    assert not any(word in text for text in texts for word in ("ab", "ba", "aac"))


def test_steps_of_which_no_row_is_restricted_have_no_masks(harness_of: Any) -> None:
    harness = harness_of()
    harness.add("free", prompt_of(4, seed=1), max_tokens=20)
    expected = expect(prompt_of(5), 20)
    harness.add("bad", prompt_of(5), max_tokens=20, bad_words=((expected[7], expected[8]),))
    harness.run()
    assert [step for step, masks in enumerate(harness.runner.masks) if masks is not None] == [8]
    assert harness.runner.masks[8] == HostMasks({}, {1: [expected[8]]})
    assert harness.tokens["free", 0] == expect(prompt_of(4, seed=1), 20) and harness.tokens["bad", 0][:8] == expected[:8]
    assert harness.tokens["bad", 0][8] != expected[8]


def test_a_grammar_that_becomes_too_complex_fails_its_request_alone(harness_of: Any) -> None:
    harness = harness_of()
    endless = StructuredSpec("lark", 'start: x{1000000}\nx: y{1000000}\ny: "a"{1000000}')
    harness.add("bad", prompt_of(4), structured=endless, n=2, max_tokens=20)
    harness.add("good", prompt_of(5), structured=REGEX, max_tokens=20)
    harness.run()
    assert harness.finished == {("bad", 0): "error", ("bad", 1): "error", ("good", 0): "stop"}
    [error] = {output.error for output in harness.outputs if output.error is not None}
    assert error is not None and "Too many items" in error.message


def test_masks_are_made_while_the_device_computes_after_the_tokens_before_are_known(harness_of: Any) -> None:
    harness = harness_of(depth=1)
    harness.add("r", prompt_of(4), structured=StructuredSpec("regex", "a{4}"), max_tokens=20)
    harness.run()
    # Every launch but the first comes before the step before it is waited for, and sampling after it.
    assert " ".join(harness.runner.calls).startswith("launch sample launch wait sample launch wait sample launch wait sample")


def test_without_a_pipeline_masks_are_made_during_the_launch(harness_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, launching = threading.Event(), threading.Event()
    make, launch = MaskMaker.make, RecordingRunner.launch

    def make_during_launch(self: MaskMaker, matchers: Any) -> MaskedRows:
        assert launching.wait(10), "masks were made before the launch"
        made.set()
        return make(self, matchers)

    def launch_until_made(self: RecordingRunner, step: SchedulerOutput) -> None:
        launching.set()
        assert made.wait(10), "the launch had to end before masks were made"
        launch(self, step)

    monkeypatch.setattr(MaskMaker, "make", make_during_launch)
    monkeypatch.setattr(RecordingRunner, "launch", launch_until_made)
    harness = harness_of()
    harness.add("r", prompt_of(4), structured=CHOICE)
    harness.run()
    assert harness.finished == {("r", 0): "stop"}


# -- waiting for the compiler ------------------------------------------------------------------------------------------


def message_of(request_id: str, spec: StructuredSpec, **options: Any) -> AddRequest:
    sampling = SamplingParams(structured=spec, **options)
    return AddRequest(request_id=request_id, prompt_token_ids=prompt_of(4), sampling=sampling)


def test_only_the_request_that_needs_a_grammar_waits_for_it(tokenizer: GrammarTokenizer) -> None:
    grammars = GrammarsAtOnce(tokenizer, late=True)
    harness = MaskHarness(grammars=grammars)
    assert not harness.core.add(message_of("r", CHOICE)) and harness.core.is_compiling and not harness.core.has_work
    assert (harness.core.stats().num_waiting, harness.core.stats().num_deferred) == (1, 1)
    harness.add("other", prompt_of(4))
    harness.run()
    assert harness.finished == {("other", 0): "length"} and harness.core.take_compiled() == []
    grammars.finish()
    assert harness.core.take_compiled() == [("r", None)] and not harness.core.is_compiling
    harness.num_choices["r"] = 1
    harness.run()
    assert harness.finished["r", 0] == "stop"
    harness.core.close()


def test_a_bad_grammar_is_refused_and_an_aborted_request_is_not_queued(tokenizer: GrammarTokenizer) -> None:
    grammars = GrammarsAtOnce(tokenizer, late=True)
    harness = MaskHarness(grammars=grammars)
    harness.core.add(message_of("bad", StructuredSpec("regex", "((")))
    harness.core.add(message_of("gone", CHOICE))
    harness.core.abort("gone")
    grammars.finish()
    [(request_id, error)] = harness.core.take_compiled()
    assert request_id == "bad" and isinstance(error, InvalidRequest) and "unclosed group" in error.message
    assert not harness.core.has_work and not harness.core.is_compiling
    harness.core.close()


def test_without_a_tokenizer_structured_output_is_refused() -> None:
    harness = MaskHarness()
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        harness.core.add(message_of("r", CHOICE))


def test_a_missing_tokenizer_json(tmp_path: Path) -> None:
    from engine.grammar_compiler import GrammarCompiler, GrammarSetup

    compiler = GrammarCompiler(GrammarSetup(str(tmp_path), 97, [2]))
    with pytest.raises(InvalidRequest, match=r"no usable tokenizer\.json"):
        compiler.compile(CHOICE).result(timeout=60)
    compiler.close()
