"""Loading, encoding, decoding and stop tokens, on small tokenizers in the manner of real families."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError, InvalidRequest, ModelLoadError
from engine.tokenizer import Tokenizer, read_eos_token_ids
from tests.tokenizers_in_the_manner_of import (
    BUILDERS,
    QWEN3_TEMPLATE,
    byte_level_bpe,
    save,
    write_gemma,
    write_llama3,
    write_qwen3,
)

TEXT = "Hello world, the capital of France is Paris. é 世界 🙂👩\u200d👩\u200d👧 e\u0301\n"
GENERATIVE = ("llama3", "gemma", "mistral", "qwen3")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {name: Tokenizer.load(build(tmp_path_factory.mktemp(name))) for name, build in BUILDERS.items()}


@pytest.mark.parametrize("name", GENERATIVE)
def test_text_comes_back(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize(("name", "bos"), [("llama3", "<|begin_of_text|>"), ("gemma", "<bos>"), ("mistral", "<s>")])
def test_encode_adds_one_bos_where_the_model_wants_it(tokenizers: dict[str, Tokenizer], name: str, bos: str) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode("Hello")
    assert [tokenizer.token_text(token_id) for token_id in ids].count(bos) == 1
    assert tokenizer.encode("Hello", add_special_tokens=False) == ids[1:]
    assert bos not in tokenizer.decode(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False).startswith(bos)


def test_encode_adds_nothing_where_the_model_wants_nothing(tokenizers: dict[str, Tokenizer]) -> None:
    assert tokenizers["qwen3"].encode("Hello") == tokenizers["qwen3"].encode("Hello", add_special_tokens=False)


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("llama3", {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}),
        ("gemma", {"<eos>", "<end_of_turn>"}),
        ("mistral", {"</s>"}),
        ("qwen3", {"<|im_end|>", "<|endoftext|>"}),
    ],
)
def test_stop_tokens_are_the_union_of_all_files(tokenizers: dict[str, Tokenizer], name: str, stops: set[str]) -> None:
    tokenizer = tokenizers[name]
    assert {tokenizer.token_text(token_id) for token_id in tokenizer.eos_token_ids} == stops


@pytest.mark.parametrize("name", BUILDERS)
def test_stop_tokens_without_the_vocabulary_are_the_same(tmp_path: Path, name: str) -> None:
    folder = BUILDERS[name](tmp_path)
    assert read_eos_token_ids(folder) == Tokenizer.load(folder).eos_token_ids


def test_a_stop_token_that_only_the_vocabulary_has(tmp_path: Path) -> None:
    folder = write_qwen3(tmp_path)
    word = next(iter(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": word}))
    whole = Tokenizer.load(folder)
    assert word in {whole.token_text(token_id) for token_id in whole.eos_token_ids}
    assert read_eos_token_ids(folder) == whole.eos_token_ids


def test_same_ids_as_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name in GENERATIVE:
        folder = BUILDERS[name](tmp_path / name)
        reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        if name == "qwen3":  # transformers reads chat_template.json for processors only
            reference.chat_template = QWEN3_TEMPLATE
        messages = [{"role": "user", "content": "Hello world"}, {"role": "assistant", "content": "Paris "}]
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.encode(TEXT) == reference(TEXT)["input_ids"], name
        rendered = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.render_chat(messages) == rendered, name
        ids = reference.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode_chat(messages) == ids, name


@pytest.mark.parametrize("name", [*GENERATIVE, "unigram"])  # WordPiece has no bytes of its own per token
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_token_bytes_join_to_the_decoded_text(tokenizers: dict[str, Tokenizer], name: str, data: st.DataObject) -> None:
    tokenizer = tokenizers[name]
    text = data.draw(st.text(st.sampled_from("aet é世🙂界 ,"), max_size=20))
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert joined in (whole, f" {whole}")  # the dummy prefix is a token's byte, and decoding strips it


def test_one_token_by_itself(tokenizers: dict[str, Tokenizer]) -> None:
    for name in GENERATIVE:
        tokenizer = tokenizers[name]
        ids = tokenizer.encode(" Paris\U0001f642", add_special_tokens=False)
        texts = [tokenizer.token_text(token_id) for token_id in ids]
        assert texts[-5:] in ([" Paris", *"\ufffd" * 4], [" ", *"Paris"[1:], *"\ufffd" * 4]), name
        assert b"".join(map(tokenizer.token_bytes, ids[-4:])) == "\U0001f642".encode()
        assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""
        assert tokenizer.token_text(tokenizer.vocab_size + 7) == ""


def test_ids_past_the_vocabulary_add_nothing(tokenizers: dict[str, Tokenizer]) -> None:
    for name in GENERATIVE:
        tokenizer = tokenizers[name]
        ids = tokenizer.encode("Hello world", add_special_tokens=False)
        assert tokenizer.decode([ids[0], tokenizer.vocab_size, *ids[1:], 10**6]) == "Hello world"


def test_vocab_size_counts_added_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_qwen3(tmp_path))
    assert tokenizer.token_text(tokenizer.vocab_size - 1) == "</tool_call>"


def test_added_tokens_of_the_config_alone_are_known(tmp_path: Path) -> None:
    folder = write_qwen3(tmp_path)
    size = Tokenizer.load(folder).vocab_size
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"] = {str(size): {"content": "<|extra|>", "special": True, "normalized": False}}
    path.write_text(json.dumps(config))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("<|extra|>") == [size]
    assert tokenizer.decode([size]) == ""


def test_truncation_left_in_the_file_is_ignored(tmp_path: Path) -> None:
    folder = write_llama3(tmp_path)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    assert len(Tokenizer.load(folder).encode("Hello world " * 50)) > 100


def test_lone_surrogates_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(InvalidRequest, match=r"U\+D800 at character 1") as caught:
        tokenizers["llama3"].encode("a\ud800")
    assert caught.value.param == "prompt"


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    folder = write_gemma(tmp_path)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"generation_config\.json cannot be read"):
        Tokenizer.load(folder)
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match="JSON object"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(folder)
    (folder / "generation_config.json").unlink()
    for broken in ("{", '{"added_tokens": 1}'):
        (folder / "tokenizer.json").write_text(broken)
        with pytest.raises(ModelLoadError, match=r"tokenizer\.json cannot be read"):
            read_eos_token_ids(folder)


def test_given_chat_template_is_text_or_a_path(tmp_path: Path) -> None:
    folder = write_gemma(tmp_path)
    messages = [{"role": "user", "content": "Hello"}]
    assert Tokenizer.load(folder, chat_template="<{{ messages[0].content }}>").render_chat(messages) == "<Hello>"
    path = tmp_path / "mine.jinja"
    path.write_text("[{{ messages[0].content }}]")
    assert Tokenizer.load(folder, chat_template=str(path)).render_chat(messages) == "[Hello]"
    with pytest.raises(ConfigError, match=r"nowhere\.jinja cannot be read"):
        Tokenizer.load(folder, chat_template=str(tmp_path / "nowhere.jinja"))
    with pytest.raises(ConfigError, match="cannot be parsed"):
        Tokenizer.load(folder, chat_template="{% if %}")


def test_named_templates_in_a_folder(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level_bpe(["<s>"]), {"chat_template": {"rag": "RAG {{ documents[0].text }}"}})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="name one of rag"):
        tokenizer.render_chat([])
    assert tokenizer.render_chat([], chat_template="rag", template_kwargs={"documents": [{"text": "x"}]}) == "RAG x"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS {{ tools | tojson }}")
    assert Tokenizer.load(folder).render_chat([], tools=[{"name": "é<"}]) == 'TOOLS [{"name": "é<"}]'


def test_the_frontend_stays_light() -> None:
    code = "import engine.tokenizer, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
