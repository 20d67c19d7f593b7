"""EngineLoop over a scripted socket: whose outputs go where, and what happens in moments without requests."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from engine.core import EngineCore
from engine.kv_cache_manager import KVCacheManager
from engine.messages import Accepted, AddRequest, EngineMessage, FrontendMessage, Refused, StepOutputs
from engine.process import COMPILING_POLL_MS, IDLE_POLL_MS, QUIET_MS, EngineLoop, FrontendSocket
from engine.sampling_params import SamplingParams, StructuredSpec, choice_seed
from engine.scheduler import Scheduler
from tests import ascii_tokenizer
from tests.ascii_tokenizer import GrammarsAtOnce
from tests.fake_runner import VOCAB_SIZE, FakeRunner, expected_tokens, group


class ScriptedSocket:
    """Has the messages of `script`, a list a turn, and keeps what was sent and how long the loop was ready to wait."""

    def __init__(self, *frontends: bytes) -> None:
        self.frontends = set(frontends)
        self.script: list[list[FrontendMessage]] = []
        self.sent: list[tuple[bytes, EngineMessage]] = []
        self.timeouts_ms: list[int] = []

    def receive(self, timeout_ms: int) -> list[FrontendMessage]:
        self.timeouts_ms.append(timeout_ms)
        return self.script.pop(0) if self.script else []

    def send(self, identity: bytes, message: EngineMessage) -> None:
        self.sent.append((identity, message))

    def tokens(self, identity: bytes) -> dict[str, list[int]]:
        tokens: dict[str, list[int]] = {}
        for receiver, message in self.sent:
            if receiver == identity and isinstance(message, StepOutputs):
                for output in message.outputs:
                    tokens.setdefault(output.request_id, []).extend(output.token_ids)
        return tokens


def make_loop(socket: ScriptedSocket, grammars: GrammarsAtOnce | None = None) -> tuple[EngineLoop, FakeRunner]:
    kv = KVCacheManager([group()], [50], block_size=4, max_step_tokens=16)
    scheduler = Scheduler(kv, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=100)
    runner = FakeRunner([group()], 4)
    core = EngineCore(scheduler, runner, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset(), pipeline_depth=0, grammars=grammars)
    return EngineLoop(core, cast(FrontendSocket, socket), epoch=1), runner


def request(request_id: str, prompt: list[int], max_tokens: int) -> AddRequest:
    return AddRequest(request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens))


def test_each_frontend_gets_its_own_and_both_get_the_counters() -> None:
    for frontends in ((b"a",), (b"a", b"b")):
        socket = ScriptedSocket(*frontends)
        loop, _ = make_loop(socket)
        prompts = {f"{name.decode()}:1": [5 + i, 6, 7] for i, name in enumerate(frontends)}
        socket.script = [[request(name, prompt, 3) for name, prompt in prompts.items()]]
        for _ in range(4):
            loop.turn()
        for name in frontends:
            key = f"{name.decode()}:1"
            assert (name, Accepted(key)) in socket.sent
            assert socket.tokens(name) == {key: expected_tokens(prompts[key], choice_seed(0, 0), 3)}
            last = [message for receiver, message in socket.sent if receiver == name][-1]
            assert isinstance(last, StepOutputs) and last.stats is not None and last.stats.num_running == 0


def test_idle_moments_go_to_the_runner_a_piece_at_a_time_and_never_while_there_is_work() -> None:
    socket = ScriptedSocket(b"a")
    loop, runner = make_loop(socket)
    runner.idle_work = 5
    socket.script = [[], [], [request("a:1", [5, 6, 7], 2)]]
    for _ in range(2):
        loop.turn()
    assert runner.idle_work == 3
    for _ in range(2):
        loop.turn()
    assert runner.idle_work == 3 and len(socket.tokens(b"a")["a:1"]) == 2
    for _ in range(4):
        loop.turn()
    assert runner.idle_work == 0
    assert socket.timeouts_ms == [0, 0, 0, 0, QUIET_MS, 0, 0, IDLE_POLL_MS]


def test_a_request_is_answered_when_its_grammar_is_there_and_others_before(tmp_path: Path) -> None:
    socket = ScriptedSocket(b"a")
    grammars = GrammarsAtOnce(ascii_tokenizer.load(tmp_path), late=True)
    loop, _ = make_loop(socket, grammars)
    good, bad = StructuredSpec("choice", '["yes"]'), StructuredSpec("regex", "((")
    structured = [
        AddRequest(request_id=name, prompt_token_ids=[5, 6], sampling=SamplingParams(structured=spec))
        for name, spec in (("a:good", good), ("a:bad", bad))
    ]
    socket.script = [[*structured, request("a:free", [5, 6, 7], 2)]]
    for _ in range(4):
        loop.turn()
    replies = [message for _, message in socket.sent if not isinstance(message, StepOutputs)]
    assert replies == [Accepted("a:free")] and len(socket.tokens(b"a")["a:free"]) == 2
    assert socket.timeouts_ms[-1] == COMPILING_POLL_MS, "without other work the compiler is looked at often"
    grammars.finish()
    for _ in range(6):
        loop.turn()
    accepted, refused = [message for _, message in socket.sent if not isinstance(message, StepOutputs)][1:]
    assert accepted == Accepted("a:good") and ascii_tokenizer.decode(socket.tokens(b"a")["a:good"]) == "yes"
    assert isinstance(refused, Refused) and refused.request_id == "a:bad" and refused.error.kind == "InvalidRequest"
    assert socket.timeouts_ms[-1] > COMPILING_POLL_MS
