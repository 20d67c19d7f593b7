"""`octavo chat` as people use it: in a terminal, and behind a pipe."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.chat_client import ChatServer
from tests.server.scripted_server import DONE, HANG, ROOT, Reply, Screen, ScriptedServer, chunk, said
from tests.server.test_cli import served

CHAT = (sys.executable, "-m", "server.cli", "chat")
USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}
QUESTION = [{"role": "user", "content": "Why?"}]


def pipe(url: str, *args: str, question: bytes = b"Why?\n", key: str = "") -> subprocess.CompletedProcess[str]:
    command = [*CHAT, "--url", url, *args]
    environ = {**os.environ, "OCTAVO_API_KEY": key, "PYTHONUTF8": "1"}
    done = subprocess.run(command, check=False, input=question, capture_output=True, cwd=ROOT, env=environ, timeout=60)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def screen(server: ScriptedServer, *args: str, **environ: str) -> Screen:
    return Screen(*CHAT, "--url", server.url, *args, **environ)


# From a pipe: one question, its answer, and nothing else on stdout.


def test_a_question_from_a_pipe() -> None:
    with ScriptedServer([chunk(reasoning="hm"), chunk("Be"), chunk("cause\x1b[1m é."), chunk(finish="stop"), DONE]) as server:
        done = pipe(server.url, "--system", "Be brief.", "--temperature", "0", "--max-tokens", "9", "--top-p", "0.5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Because\x1b[1m é.\n", "")
    (body,) = server.bodies
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert (body["model"], body["temperature"], body["max_tokens"], body["top_p"]) == ("fake", 0, 9, 0.5)
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    assert "explain" not in body  # OpenAI refuses fields that it does not know


def test_an_answer_of_our_own_server() -> None:
    with served() as (_, url, _):
        done = pipe(url, "--max-tokens", "5")
    assert (done.returncode, done.stdout) == (0, "xxxxx\n")
    assert "limit of tokens" in done.stderr


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_events_cut_anywhere(newline: bytes) -> None:
    event = b': waiting\nevent: x\nid: 1\ndata: {"choices":[{"delta":\ndata:{"content":"caf\xc3\xa9 "}}]}\n\n'
    stream = b"\xef\xbb\xbf" + b"".join([event, *said("\u2026")]).replace(b"\n", newline)
    for size in (1, 2, 3, 7, len(stream)):
        parts = [stream[at : at + size] for at in range(0, len(stream), size)]
        with ScriptedServer(parts) as server:
            chunks = list(ChatServer(server.url).stream({}))
        assert "".join(choice["delta"].get("content", "") for each in chunks for choice in each["choices"]) == "café …"


def test_a_server_that_is_not_there() -> None:
    done = pipe("http://127.0.0.1:9")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"octavo: no server answers at http://127.0.0.1:9 \(.*\)\. Start one with: octavo serve --port 9; .*\n", done.stderr
    )


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("ftp://x", "ftp://x is no URL"),
        ("http://127.0.0.1:port", "is no URL"),
        ("http://host.invalid", "there is no host host.invalid"),
    ],
)
def test_wrong_urls(url: str, sentence: str) -> None:
    done = pipe(url)
    assert done.returncode == 1 and sentence in done.stderr and done.stderr.count("\n") == 1


def test_a_url_may_be_short_or_long() -> None:
    with ScriptedServer() as server:
        assert pipe(server.url.removeprefix("http://")).stdout == "Hello.\n"
        assert pipe(f"{server.url}/v1/").stdout == "Hello.\n"


def test_api_keys() -> None:
    with ScriptedServer(api_key="right") as server:
        assert "the server wants an API key: give it with --api-key or in OCTAVO_API_KEY" in pipe(server.url).stderr
        assert "does not take this API key: A wrong key." in pipe(server.url, "--api-key", "wrong").stderr
        assert pipe(server.url, key="right,other").stdout == "Hello.\n"
        assert pipe(server.url, "--api-key", "right", key="wrong").stdout == "Hello.\n"


def test_models() -> None:
    with ScriptedServer(models=("tiny", "large")) as server:
        assert pipe(server.url, "--model", "large").returncode == 0
        assert server.bodies[-1]["model"] == "large"
        done = pipe(server.url, "--model", "larg")
        assert done.returncode == 1
        assert "does not serve larg (did you mean large?); it serves tiny, large" in done.stderr


def test_a_server_that_is_starting_is_waited_for() -> None:
    with ScriptedServer() as server:
        loading = {"status": "starting", "detail": "The model is being loaded (weights); try again soon."}
        server.health = [(503, loading), (503, loading), (503, {"error": {"message": "Loading model"}}), (200, {})]
        done = pipe(server.url)
    assert (done.returncode, done.stdout) == (0, "Hello.\n")
    assert done.stderr.splitlines() == [
        "The server is not ready yet. The model is being loaded (weights)",
        "The server is not ready yet. Loading model",
    ]


def test_a_server_that_failed_is_not() -> None:
    with ScriptedServer() as server:
        server.health = [(503, {"status": "failed", "detail": "The engine is not running: it ended."})]
        assert "cannot answer: The engine is not running: it ended." in pipe(server.url).stderr


def test_a_server_that_starts_anew_in_between_is_waited_for_a_few_times() -> None:
    busy = Reply(status=503, body={"error": {"message": "The model is being loaded."}})
    with ScriptedServer(busy, said("Hello.")) as server:
        assert pipe(server.url).stdout == "Hello.\n"
    with ScriptedServer(busy) as server:
        done = pipe(server.url)
    assert done.returncode == 1 and "cannot answer now: The model is being loaded." in done.stderr
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (Reply(status=429, body={"error": {"message": "Too many."}}, headers={"Retry-After": "3"}), "try again in 3 s"),
        (Reply(status=400, body={"error": {"message": "temperature is odd."}}), "Temperature is odd."),
        (Reply(status=404, body={"detail": "Not Found"}), "Not Found"),
        (Reply(status=500, body=None), "HTTP status 500"),
        (Reply([chunk("Be"), b'data: {"error": {"message": "the engine died"}}\n\n', DONE]), "The engine died"),
        (Reply([chunk("Be")], cut=True), "The connection broke in the middle of the answer"),
        (Reply([chunk("Be")]), "The server ended its answer before it was whole"),
        (Reply([chunk("Be"), b"data: {not json}\n\n"]), "The server sent an event that is no JSON object"),
    ],
)
def test_what_goes_wrong_is_a_sentence(reply: Reply, sentence: str) -> None:
    with ScriptedServer(reply) as server:
        done = pipe(server.url)
    assert done.returncode == 1
    assert sentence in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == ("Be\n" if reply.parts else "")


def test_an_answer_without_the_last_marks() -> None:
    for parts in ([chunk("Hi"), b"data: [DONE]"], [chunk("Hi", finish="stop")], [chunk("Hi"), b"data: [DONE]\n"]):
        with ScriptedServer(parts) as server:
            assert pipe(server.url).stdout == "Hi\n"


@pytest.mark.parametrize("question", [b"", b" \n", b"\xff"])
def test_an_empty_pipe(question: bytes) -> None:
    done = pipe("http://127.0.0.1:9", question=question)
    assert done.returncode == 2 and "stdin is" in done.stderr


@pytest.mark.parametrize("flags", [("--max-tokens", "0"), ("--temperature", "nan"), ("--top-p", "2"), ("--sys", "x"), ("x",)])
def test_wrong_command_lines(flags: tuple[str, ...]) -> None:
    assert pipe("http://127.0.0.1:9", *flags).returncode == 2


def test_ctrl_c_ends_a_pipe() -> None:
    with ScriptedServer([chunk("Be"), HANG]) as server:
        command = [*CHAT, "--url", server.url]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
        ) as process:
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None
            process.stdin.write(b"Why?")
            process.stdin.close()
            assert process.stdout.read(2) == b"Be"
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 130
            assert b"Traceback" not in process.stderr.read()
        assert server.gone.wait(10)


def test_a_reader_that_leaves() -> None:
    with ScriptedServer([chunk("a" * 100)] * 5000) as server:
        command = f"echo Why? | {' '.join(CHAT)} --url {server.url} | head -c 5"
        done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, cwd=ROOT, timeout=60)
    assert (done.stdout, done.stderr) == (b"aaaaa", b"")


# In a terminal.


def test_a_conversation() -> None:
    with ScriptedServer(said("One."), said("Two."), said("Three."), said("Four.")) as server, screen(server) as term:
        term.expect("fake at http")
        term.type("first\n")
        term.expect("One.\r\n> ")
        term.type("second \\\nline\n")
        term.expect("Two.\r\n> ")
        term.type('"""a\nb\n"""\n')
        term.expect("Three.\r\n> ")
        term.type("/clear\n")
        term.expect("A new conversation.\r\n> ")
        term.type("//etc\n")
        term.expect("Four.\r\n> ")
        term.type("\x04")
        assert term.end() == 0
    contents = [[message["content"] for message in body["messages"]] for body in server.bodies]
    assert contents == [
        ["first"],
        ["first", "One.", "second \nline"],
        ["first", "One.", "second \nline", "Two.", "a\nb"],
        ["/etc"],
    ]


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    with ScriptedServer([chunk("Be"), HANG], said("One."), [HANG], said("Two.")) as server, screen(server) as term:
        term.type("first\n")
        term.expect("\rBe")
        term.type("\x03")
        term.expect("Stopped.\r\n> ")
        assert server.gone.wait(10)
        term.type("half a line")
        term.expect("half a line")
        time.sleep(0.2)  # until Python waits for the next key: a signal just before that is seen with the key alone
        term.type("\x03")
        term.expect("Ctrl-D or /exit leaves.\r\n> ")
        term.type("second\n")
        term.expect("One.\r\n> ")
        term.type("third\n")
        while len(server.bodies) < 3:
            time.sleep(0.01)
        term.type("\x03")
        term.expect("Stopped.\r\n> ")
        term.type("/regenerate\n")
        term.expect("Two.\r\n> ")
        term.type("/exit\n")
        assert term.end() == 0
    contents = [[message["content"] for message in body["messages"]] for body in server.bodies]
    assert contents[1] == ["first", "Be", "second"]
    assert contents[2] == contents[3] == ["first", "Be", "second", "One.", "third"]  # nothing came of the first one


def test_regenerate() -> None:
    refused = Reply(status=400, body={"error": {"message": "no"}})
    with ScriptedServer(said("One."), said("Two."), refused, said("Three.")) as server, screen(server) as term:
        term.type("/regenerate\n")
        term.expect("There is no question yet.")
        term.type("first\n")
        term.expect("One.")
        term.type("/regenerate\n")
        term.expect("Two.")
        term.type("second\n")
        term.expect("No. /regenerate asks again.")
        term.type("/regenerate\n")
        term.expect("Three.")
    contents = [[message["content"] for message in body["messages"]] for body in server.bodies]
    assert contents == [["first"], ["first"], ["first", "Two.", "second"], ["first", "Two.", "second"]]


def test_commands_for_system_model_and_help() -> None:
    with ScriptedServer(models=("tiny", "large")) as server, screen(server, "--system", "Be kind.") as term:
        term.type("/system\n")
        term.expect("System message: Be kind.")
        term.type("/system Be brief.\n")
        term.expect("System message: Be brief.")
        term.type("/model\n")
        term.expect("* tiny\r\n  large")
        term.type("/model lage\n")
        term.expect("did you mean large?")
        term.type("/model large\n")
        term.expect("large answers from here on.")
        term.type("hi\n")
        term.expect("Hello.")
        term.type("/system -\n")
        term.expect("There is no system message.")
        term.type("hi\n")
        term.expect("Hello.")
        term.type("/hlep\n")
        term.expect("There is no command /hlep (did you mean /help?)")
        term.type("/help\n")
        term.expect("/regenerate       answer the last question anew")
    assert server.bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [body["model"] for body in server.bodies] == ["large", "large"]
    assert [message["role"] for message in server.bodies[1]["messages"]] == ["user", "assistant", "user"]


def test_figures() -> None:
    own = {
        "queue_s": 0.001,
        "prefill_s": 0.25,
        "ttft_s": 0.251,
        "total_s": 0.5,
        "cached_tokens": 8,
        "preemptions": 0,
        "seed": 7,
    }
    last = chunk(finish="stop", usage={**USAGE, "octavo": own})
    with ScriptedServer([chunk("a"), chunk("b"), last, DONE], octavo=True) as server, screen(server) as term:
        term.type("/stats\n")
        term.expect("There is no answer yet.")
        term.type("/stats maybe\n")
        term.expect("/stats takes on, off or nothing.")
        term.type("Why?\n")
        term.expect("ab\r\n> ")
        term.type("/stats on\n")
        term.expect("12 prompt tokens (8 cached), 3 output tokens; first token after ")
        term.expect(" tokens/s; in the server: queue 0.001 s, prefill 0.250 s, first token 0.251 s, all 0.500 s, seed 7")
        term.type("Why?\n")
        term.expect("12 prompt tokens")
    assert server.bodies[0]["explain"] is True


def test_save_and_load(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    with ScriptedServer(said("Für dich.")) as server, screen(server, "--system", "Be kind.") as term:
        term.type("hi\n")
        term.expect("Für dich.")
        term.type("/save\n")
        term.expect("/save wants the name of a file.")
        term.type(f"/save {file}\n")
        term.expect("3 messages are in")
        term.type(f"/save {file}\n")  # it is ours
        term.expect("3 messages are in")
    saved = json.loads(file.read_text())
    assert [message["content"] for message in saved["messages"]] == ["Be kind.", "hi", "Für dich."]
    (tmp_path / "other.json").write_text('{"messages": [{"role": "tool"}]}')
    (tmp_path / "text").write_text("text")
    with ScriptedServer() as server, screen(server) as term:
        for name, sentence in (("talk.json", "exists, and stays as it is"), ("no/dir", "cannot be written: no such file")):
            term.type(f"/save {tmp_path / name}\n")
            term.expect(sentence)
        for name, sentence in (
            ("none", "cannot be read: no such"),
            ("other.json", "holds no conversation"),
            ("text", "is no JSON"),
        ):
            term.type(f"/load {tmp_path / name}\n")
            term.expect(sentence)
        term.type(f"/load {file}\n")
        term.expect("2 messages of")
        term.type("again\n")
        term.expect("Hello.")
    assert server.bodies[0]["messages"] == [*saved["messages"], {"role": "user", "content": "again"}]


def test_reasoning_is_dimmed_and_not_sent_back() -> None:
    reply = [chunk(reasoning="hm "), chunk(reasoning="so"), chunk("\n\nBecause."), chunk(finish="stop"), DONE]
    with ScriptedServer(reply) as server, screen(server) as term:
        term.type("Why?\n")
        term.expect("Because.\r\n> ")
        assert "\x1b[2mhm so\r\n\x1b[0m\r\nBecause." in term.raw
        term.type("And?\n")
        term.expect("Because.")
    assert "hm" not in json.dumps(server.bodies[1])


def test_without_color() -> None:
    reply = [chunk(reasoning="hm"), chunk("Because."), chunk(finish="stop"), DONE]
    with ScriptedServer(reply) as server, screen(server, NO_COLOR="1") as term:
        term.type("Why?\n")
        term.expect("(thinking)\r\nhm\r\n(answer)\r\nBecause.\r\n> ")
        assert not re.search(r"\x1b\[\d*m", term.raw)


def test_a_model_cannot_move_the_cursor() -> None:
    with ScriptedServer(said("a\x1b]0;title\x07b\x9b2Jc\rd\te")) as server, screen(server) as term:
        term.type("Why?\n")
        term.expect("a]0;titleb2Jcd\te\r\n")


def test_pasted_lines_are_one_message() -> None:
    with ScriptedServer() as server, screen(server) as term:
        term.expect("> ")
        term.type("\x1b[200~a\nb\x1b[201~\n")
        term.expect("Hello.")
    assert server.bodies[0]["messages"][0]["content"] == "a\nb"


def test_tab_completes_commands() -> None:
    with ScriptedServer() as server, screen(server) as term:
        term.expect("> ")
        term.type("/regen\t\n")
        term.expect("There is no question yet.")


def test_it_starts_light() -> None:
    code = (
        "import sys, server.cli, server.terminal_chat\n"
        "sys.exit(bool({'engine', 'pydantic', 'asyncio', 'fastapi'} & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
