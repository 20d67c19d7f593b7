"""Chat templates: what reaches the template, what comes out, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.chat_template import ChatTemplate
from engine.errors import InvalidRequest
from engine.tokenizer import Tokenizer
from tests.tokenizers_in_the_manner_of import (
    GEMMA_TEMPLATE,
    LLAMA3_TEMPLATE,
    MISTRAL_TEMPLATE,
    QWEN3_TEMPLATE,
    byte_level_bpe,
    save,
    write_gemma,
    write_llama3,
    write_mistral,
    write_qwen3,
)

USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Paris"}
WEATHER_TOOL = {"type": "function", "function": {"name": "weather", "description": "Wetter in <Köln>"}}


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_llama3(tmp_path_factory.mktemp("llama3")))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_gemma(tmp_path_factory.mktemp("gemma")))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_mistral(tmp_path_factory.mktemp("mistral")))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_qwen3(tmp_path_factory.mktemp("qwen3")))


def render(source: str, *messages: dict[str, Any], **variables: Any) -> str:
    return ChatTemplate(source).render(messages, continue_final_message=False, variables=variables)


def test_chat_has_exactly_one_bos(llama3: Tokenizer, gemma: Tokenizer, mistral: Tokenizer, qwen3: Tokenizer) -> None:
    for tokenizer, bos, count in (
        (llama3, "<|begin_of_text|>", 1),
        (gemma, "<bos>", 1),
        (mistral, "<s>", 1),
        (qwen3, "<|endoftext|>", 0),
    ):
        texts = [tokenizer.token_text(token_id) for token_id in tokenizer.encode_chat([USER])]
        assert texts.count(bos) == count
        assert texts[0] == bos or not count


def test_a_template_without_bos_gets_none(llama3: Tokenizer) -> None:
    ids = llama3.encode_chat([USER], chat_template="{{ messages[0].content }}")
    assert ids == llama3.encode("Hello", add_special_tokens=False)


def test_llama3(llama3: Tokenizer) -> None:
    assert llama3.render_chat([{"role": "system", "content": " be brief "}, USER]) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_qwen3_thinking_switch_and_tools(qwen3: Tokenizer) -> None:
    assert qwen3.render_chat([USER]) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    off = qwen3.render_chat([USER], template_kwargs={"enable_thinking": False})
    assert off.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    with_tools = qwen3.render_chat([{"role": "system", "content": "S"}, USER], tools=[WEATHER_TOOL])
    assert with_tools.startswith("<|im_start|>system\nS\n\n# Tools\n<tools>\n" + json.dumps(WEATHER_TOOL, ensure_ascii=False))
    assert qwen3.render_chat([USER], tools=[]) == qwen3.render_chat([USER])


def test_tool_use_template_is_chosen_when_there_are_tools(mistral: Tokenizer) -> None:
    assert mistral.render_chat([USER], tools=[WEATHER_TOOL]).startswith("<s>[TOOLS][{")
    assert mistral.render_chat([USER], tools=[WEATHER_TOOL], chat_template="default") == "<s>[INST] Hello [/INST]"


def test_what_a_template_raises_is_the_message(gemma: Tokenizer, mistral: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="System role not supported") as caught:
        gemma.render_chat([{"role": "system", "content": "x"}, USER])
    assert caught.value.param == "messages"
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        mistral.render_chat([USER, USER])


def test_no_template_names_the_flag(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save(tmp_path, byte_level_bpe(["<s>"]), {}))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="--chat-template"):
        tokenizer.encode_chat([USER])
    assert tokenizer.render_chat([USER], chat_template="{{ messages[0].role }}") == "user"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", "cannot be parsed"),
        ("{{ '\ud800' }}", "Unicode|parsed"),
        ("{% for x in [1] %}" * 30 + "{% endfor %}" * 30, "cannot be parsed"),
        ("{{ " + "9" * 5000 + " }}", "cannot be parsed"),
        ("{{ " + "(" * 3000 + ")" * 3000 + " }}", "cannot be parsed"),
        ("{{ " + "1 + " * 3000 + "1 }}", "cannot be parsed"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "not safely callable|refuses"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ messages[0] + 1 }}", "TypeError"),
    ],
)
def test_bad_templates_are_the_clients_error(llama3: Tokenizer, source: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        llama3.render_chat([USER], chat_template=source)
    assert caught.value.param in {"messages", "chat_template"}


def test_lone_surrogates_are_refused(qwen3: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"U\+DFFF") as caught:
        qwen3.encode_chat([{"role": "user", "content": "a\udfff"}])
    assert caught.value.param == "messages"


def test_null_and_missing_content(llama3: Tokenizer, gemma: Tokenizer, qwen3: Tokenizer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    for tokenizer in (llama3, gemma, qwen3):
        for message in ({"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "assistant"}):
            assert "None" not in tokenizer.render_chat([USER, message])
    only_none = "{% for m in messages %}{% if m['content'] is none %}(call){% else %}{{ m.content }}{% endif %}{% endfor %}"
    assert render(only_none, {"role": "assistant", "content": None}, USER) == "(call)Hello"


def test_developer_becomes_system_where_the_template_knows_no_developer(qwen3: Tokenizer) -> None:
    messages = [{"role": "developer", "content": "D"}, USER]
    assert qwen3.render_chat(messages).startswith("<|im_start|>system\nD<|im_end|>")
    assert messages[0]["role"] == "developer"
    assert render("{% if messages[0].role == 'developer' %}dev{% endif %}", *messages) == "dev"


@pytest.mark.parametrize(
    ("source", "parts", "string"),
    [
        (LLAMA3_TEMPLATE, False, True),
        (GEMMA_TEMPLATE, True, True),
        (MISTRAL_TEMPLATE, False, True),
        (QWEN3_TEMPLATE, False, True),
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", True, False),
        (
            "{% for m in messages %}{% for p in m['content'] | selectattr('type', '==', 'text') %}{% endfor %}{% endfor %}",
            True,
            False,
        ),
        ("{% for m in messages %}{% set c = m.get('content') or [] %}{% for p in c %}{% endfor %}{% endfor %}", True, False),
        (
            "{% macro show(x) %}{% if x is string %}{{ x }}{% else %}{% for p in x %}{{ p.text }}{% endfor %}{% endif %}"
            "{% endmacro %}{% for m in messages %}{{ show(m.content) }}{% endfor %}",
            True,
            True,
        ),
        ("{% for m in messages %}{% for line in m.content.split() %}{{ line }}{% endfor %}{% endfor %}", False, True),
    ],
)
def test_content_forms_a_template_takes(source: str, parts: bool, string: bool) -> None:
    template = ChatTemplate(source)
    assert (template.takes_content_parts, template.takes_content_string) == (parts, string)


def test_content_parts(llama3: Tokenizer, gemma: Tokenizer) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "world"}]}
    assert "\n\nHello \nworld<|eot_id|>" in llama3.render_chat([parts])
    assert "user\nHelloworld<end_of_turn>" in gemma.render_chat([parts])  # the template trims part by part
    only_parts = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    assert render(only_parts, parts, USER) == "<Hello ><world><Hello>"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "'image_url'"),
        (["Hello"], "'str'"),
        ([{"type": "text"}], "without a string 'text'"),
        (7, "must be a string, null or a list of parts, got int"),
    ],
)
def test_other_content_is_refused(llama3: Tokenizer, content: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        llama3.render_chat([USER, {"role": "user", "content": content}])
    assert "messages[1]" in caught.value.message


def test_tool_call_arguments(qwen3: Tokenizer) -> None:
    def rendered(arguments: str) -> str:
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        return qwen3.render_chat([USER, {"role": "assistant", "content": None, "tool_calls": [call]}])

    assert '"arguments": {"city": "Köln <3"}}</tool_call>' in rendered('{"city":"Köln <3"}')
    assert '"arguments": {"city": }</tool_call>' in rendered('{"city": ')  # the model's own broken JSON comes back as it was
    joined = "{{ messages[0].tool_calls[0].function.arguments + '!' }}"
    call = {"function": {"name": "f", "arguments": '{"a":1}'}}
    assert render(joined, {"role": "assistant", "tool_calls": [call]}) == '{"a":1}!'


def test_continue_final_message(llama3: Tokenizer, gemma: Tokenizer, mistral: Tokenizer, qwen3: Tokenizer) -> None:
    for tokenizer, text in (
        (llama3, "The capital"),
        (gemma, "The capital"),
        (mistral, "The capital "),
        (qwen3, "The capital "),
    ):
        messages: list[dict[str, Any]] = [USER, {"role": "assistant", "content": "The capital "}]
        rendered = tokenizer.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
        whole = tokenizer.render_chat(messages, add_generation_prompt=False)
        assert rendered.endswith(text)
        assert whole.startswith(rendered)
        assert messages[1]["content"] == "The capital "


def test_continue_final_message_with_parts(gemma: Tokenizer) -> None:
    parts = [{"type": "text", "text": "The"}, {"type": "text", "text": "capital"}]
    messages: list[dict[str, Any]] = [USER, {"role": "assistant", "content": parts}]
    rendered = gemma.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert rendered.endswith("<start_of_turn>model\nThecapital")
    assert messages[1]["content"][1] == {"type": "text", "text": "capital"}


def test_continue_final_message_refusals(llama3: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="add_generation_prompt"):
        llama3.render_chat([USER, ASSISTANT], continue_final_message=True)
    no_text: list[list[dict[str, Any]]] = [[], [USER, {"role": "assistant", "content": None}]]
    for messages in no_text:
        with pytest.raises(InvalidRequest, match="text to continue"):
            llama3.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="does not write out"):
        llama3.render_chat([USER], add_generation_prompt=False, continue_final_message=True, chat_template="x")


def test_template_variables(llama3: Tokenizer) -> None:
    source = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ add_generation_prompt }}|{{ tools is none }}|{{ mood }}"
    rendered = llama3.render_chat([USER], chat_template=source, template_kwargs={"mood": "é"})
    assert rendered == "<|begin_of_text|>|<|eot_id|>||True|True|é"
    with pytest.raises(InvalidRequest, match="may not hold messages, tools") as caught:
        llama3.render_chat([USER], template_kwargs={"tools": [], "messages": []})
    assert caught.value.param == "chat_template_kwargs"


def test_template_functions() -> None:
    assert render("{{ strftime_now('%Y') | length }}") == "4"
    assert render("{{ x | tojson }}", x={"a": "<é>"}) == '{"a": "<é>"}'
    assert render("{{ x | tojson(indent=2) }}", x={"b": 1}) == '{\n  "b": 1\n}'
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("a{% generation %}{% set x = 1 %}b{{ x }}{% endgeneration %}c") == "ab1c"
    assert render("  {% if true %}\n  x\n  {% endif %}\ny") == "  x\ny"


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
LOOP: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL, {**CALL, "function": {"name": "time", "arguments": "{"}}]},
    {"role": "tool", "tool_call_id": "1", "content": "21"},
    {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "noon"}]},
    {"role": "user", "content": "Thanks"},
]


@pytest.mark.parametrize(
    ("source", "tools", "calls", "role"),
    [
        (LLAMA3_TEMPLATE, False, False, False),
        (QWEN3_TEMPLATE, True, True, False),
        ("{% if tools is defined %}{% endif %}", True, False, False),
        ("{% set tools = [] %}{% for m in messages %}{% if m['role'] == 'tool' %}{% endif %}{% endfor %}", False, False, True),
        (
            "{% for m in messages %}{% if 'tool_calls' in m or m.role in ['tool', 'ipython'] %}{% endif %}{% endfor %}",
            False,
            True,
            True,
        ),
    ],
)
def test_what_a_template_knows_of_tools(source: str, tools: bool, calls: bool, role: bool) -> None:
    template = ChatTemplate(source)
    assert (template.takes_tools, template.takes_tool_calls, template.takes_tool_role) == (tools, calls, role)


def test_calls_and_results_as_text(llama3: Tokenizer, gemma: Tokenizer) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    broken = '<tool_call>\n{"name": "time", "arguments": "{"}\n</tool_call>'
    results = "<tool_response>\n21\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"
    text = llama3.render_chat(LOOP)
    assert f"I look.\n{call}\n{broken}<|eot_id|>" in text
    assert f"<|start_header_id|>user<|end_header_id|>\n\n{results}<|eot_id|>" in text
    assert f"<start_of_turn>user\n{results}<end_of_turn>" in gemma.render_chat(LOOP[:-1])  # turns alternate
    only_parts = "{% for m in messages %}{{ m.role }}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    assert render(only_parts, *LOOP[:4]) == f"user<Hello>assistant<I look.\n{call}\n{broken}>user<{results}>"


def test_a_tool_block_stands_with_the_system_message(llama3: Tokenizer, qwen3: Tokenizer) -> None:
    system = {"role": "system", "content": "Be brief."}
    text = llama3.render_chat([system, USER], tools=[WEATHER_TOOL], tool_block="TOOLS")
    assert "<|start_header_id|>system<|end_header_id|>\n\nBe brief.\n\nTOOLS<|eot_id|>" in text
    text = llama3.render_chat([{"role": "developer", "content": [{"type": "text", "text": "D"}]}, USER], tool_block="TOOLS")
    assert "<|start_header_id|>system<|end_header_id|>\n\nD\nTOOLS<|eot_id|>" in text
    text = llama3.render_chat([USER], tool_block="TOOLS")
    assert text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nTOOLS<|eot_id|>")
    assert "TOOLS" not in qwen3.render_chat([USER], tools=[WEATHER_TOOL], tool_block="TOOLS")


def test_a_tool_block_without_a_place_for_a_system_message(gemma: Tokenizer) -> None:
    assert gemma.render_chat([USER], tool_block="TOOLS").startswith("<bos><start_of_turn>user\nTOOLS\n\nHello<end_of_turn>")
    with pytest.raises(InvalidRequest, match="System role not supported"):
        gemma.render_chat([{"role": "system", "content": "S"}, USER], tool_block="TOOLS")
    silent = "{% for m in messages if m.role != 'system' %}{{ m.content }};{% endfor %}"
    block = {"continue_final_message": False, "variables": {}, "tool_block": "TOOLS"}
    assert ChatTemplate(silent).render([ASSISTANT, USER], **block) == "Paris;TOOLS\n\nHello;"
    assert ChatTemplate(silent).render([ASSISTANT], **block) == "TOOLS;Paris;"
    continued = {**block, "continue_final_message": True}
    assert ChatTemplate(silent).render([USER, ASSISTANT], **continued) == "TOOLS\n\nHello;Paris"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% set ns = namespace(x=[0]) %}{% for a in range(9999) %}{% for b in range(9999) if b == a %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_goes_on_and_on_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.chat_template.TIME_LIMIT_S", 0.05)
    with pytest.raises(InvalidRequest, match=r"more than 0\.05 seconds") as caught:
        render(source)
    assert caught.value.param == "messages"


def test_loops_that_are_watched_are_loops_still() -> None:
    source = (
        "{% for k, v in {'a': [1, 2], 'b': []}.items() %}{{ loop.index }}/{{ loop.length }}{{ k }}"
        "{% for x in v %}{{ x }}{{ '.' if loop.last else ',' }}{{ loop.previtem }}{% else %}none{% endfor %}"
        "{{ loop.revindex0 }};{% endfor %}{% for x in nothing %}{{ x }}{% endfor %}"
        "{% for x in [[1, [2]]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}"
        "{% for x in range(9) if x is odd %}{% if x == 5 %}{% break %}{% endif %}{{ x }}{% endfor %}"
    )
    assert render(source) == "1/2a1,2.11;2/2bnone0;(1(2))13"
