"""Loading, bytes of tokens, decoding against the `tokenizers` library, chat templates."""

import json
import random
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer

from hybridgen.engine.request import InvalidRequest
from hybridgen.engine.tokenizer import Tokenizer, TokenizerError
from tests.engine.tiny_tokenizers import CORPUS, KINDS, save

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('an assistant cannot begin') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if mood %}[{{ mood }}]{% endif %}{% endfor %}"
    "{% for tool in tools or [] %}<tool {{ tool.function.name }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        save(root / kind, kind, chat_template=CHAT_TEMPLATE)
    return {kind: root / kind for kind in KINDS}


def load(folders: dict[str, Path], kind: str) -> Tokenizer:
    return Tokenizer(str(folders[kind]))


def raw_tokenizer(folders: dict[str, Path], kind: str) -> RawTokenizer:
    return RawTokenizer.from_file(str(folders[kind] / "tokenizer.json"))


def random_tokens(raw: RawTokenizer, source: random.Random, *, whole_characters: bool) -> list[int]:
    """Any ids of the vocabulary; with `whole_characters`, byte tokens only in runs that make characters."""
    ids = sorted(raw.get_vocab().values())
    byte_ids = {raw.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
    byte_ids.pop(None, None)
    plain = [token for token in ids if token not in byte_ids]
    tokens: list[int] = []
    for _ in range(source.randrange(12)):
        if byte_ids and source.random() < 0.4:
            id_of = {byte: token for token, byte in byte_ids.items()}
            tokens += [id_of[byte] for byte in source.choice("é€🙂 你").encode()]
        else:
            tokens.append(source.choice(plain if whole_characters else ids))
    return tokens


@pytest.mark.parametrize("skip_special_tokens", [True, False], ids=["skip", "keep"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens_decode_as_the_tokenizers_library_decodes_them(
    folders: dict[str, Path], kind: str, skip_special_tokens: bool
) -> None:
    tokenizer, raw = load(folders, kind), raw_tokenizer(folders, kind)
    source = random.Random(kind)
    for _ in range(400):
        tokens = random_tokens(raw, source, whole_characters=True)
        expected = raw.decode(tokens, skip_special_tokens=skip_special_tokens)
        assert tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens) == expected, tokens


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
def test_bytes_that_make_no_character_leave_the_characters_beside_them_alone(
    folders: dict[str, Path], kind: str
) -> None:
    tokenizer, raw = load(folders, kind), raw_tokenizer(folders, kind)
    tokens = [
        raw.token_to_id(f"<0x{byte:02X}>") for byte in "é€".encode() + b"\xff" + "🙂".encode()[:3] + b"a"
    ]
    assert tokenizer.decode(tokens) == "é€\ufffd\ufffda"


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_text_survives_encoding_and_decoding(folders: dict[str, Path], kind: str) -> None:
    tokenizer = load(folders, kind)
    for text in CORPUS:
        # A metaspace vocabulary cannot tell a line's own leading spaces from the one it puts there.
        text = text if kind == "byte_level" else re.sub(r"^ +", "", text)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(
    ("kind", "name", "raw"),
    [
        ("byte_level", "Ġthe", b" the"),
        ("byte_level", "Ã", b"\xc3"),
        ("byte_level", "Ċ", b"\n"),
        ("byte_level", "<tool é>", "<tool é>".encode()),
        ("byte_level", "</s>", b"</s>"),
        ("llama", "<0xE2>", b"\xe2"),
        ("llama", "<0x0A>", b"\n"),
        ("llama", "▁cat", b" cat"),
        ("llama", "▁▁", b"  "),
        ("llama", "你", "你".encode()),
        ("metaspace", "<0xE2>", b"\xe2"),
        ("metaspace", "▁é", " é".encode()),
        ("metaspace_without_bytes", "▁cat", b" cat"),
        ("wordpiece", "cat", b"cat"),
    ],
)
def test_a_token_is_the_bytes_it_adds_within_a_text(
    folders: dict[str, Path], kind: str, name: str, raw: bytes
) -> None:
    tokenizer = load(folders, kind)
    token = raw_tokenizer(folders, kind).token_to_id(name)
    assert tokenizer.token_text(token) == (raw.decode("utf-8", "replace"), raw)


def test_an_id_beyond_the_vocabulary_is_no_text(folders: dict[str, Path]) -> None:
    tokenizer = load(folders, "byte_level")
    assert tokenizer.token_text(tokenizer.max_token_id + 1) == ("", b"")
    assert tokenizer.decode([tokenizer.max_token_id + 1]) == ""


def test_a_text_that_continues_a_prompt_keeps_its_space_and_one_that_begins_does_not(
    folders: dict[str, Path],
) -> None:
    raw = raw_tokenizer(folders, "llama")
    tokenizer = load(folders, "llama")
    bos, cat = raw.token_to_id("<s>"), raw.token_to_id("▁cat")

    def continued(context: list[int]) -> str:
        return tokenizer.stream(skip_special_tokens=True, context=context).push(cat)

    assert continued([]) == "cat"
    assert continued([bos]) == "cat"
    assert continued([bos] * 20) == "cat"
    assert continued([bos, cat]) == " cat"
    assert continued([cat] * 20) == " cat"


def test_vocabulary_and_ends_are_gathered_from_every_file(folders: dict[str, Path], tmp_path: Path) -> None:
    save(tmp_path, "byte_level")
    raw = raw_tokenizer(folders, "byte_level")
    end = raw.token_to_id("</s>")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.eos_token_ids == (7, 9, end)
    assert tokenizer.vocab_size == raw.get_vocab_size()
    assert tokenizer.max_token_id == tokenizer.vocab_size - 1
    assert load(folders, "byte_level").eos_token_ids == (end,)


def test_a_long_prompt_is_not_truncated_by_what_the_files_say(tmp_path: Path) -> None:
    save(tmp_path, "byte_level")
    path = tmp_path / "tokenizer.json"
    files = json.loads(path.read_text())
    files["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(files))
    assert len(Tokenizer(str(tmp_path)).encode("a b c d e f")) > 3


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json.*model\.safetensors"):
        Tokenizer(str(tmp_path))
    with pytest.raises(TokenizerError, match="no folder"):
        Tokenizer(str(tmp_path / "nowhere"))


def test_a_broken_tokenizer_file_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        Tokenizer(str(tmp_path))


def test_a_template_that_needs_remote_code_is_not_run(tmp_path: Path) -> None:
    save(tmp_path, "byte_level")
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["tokenizer_class"]
    settings["auto_map"] = {"AutoTokenizer": [None, "evil.Evil"]}
    path.write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(TokenizerError, match="trust_remote_code"):
        Tokenizer(str(tmp_path))


def test_the_chat_template_gets_messages_tools_and_variables(folders: dict[str, Path]) -> None:
    tokenizer = load(folders, "byte_level")
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(messages) == "<user>hi<assistant>"
    assert (
        tokenizer.apply_chat_template(messages, add_generation_prompt=False, variables={"mood": "calm"})
        == "<user>hi[calm]"
    )
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert tokenizer.apply_chat_template(messages, tools=tools) == "<user>hi<tool f><assistant>"
    messages.append({"role": "assistant", "content": "he"})
    open_ended = tokenizer.apply_chat_template(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert open_ended == "<user>hi<assistant>he"


def test_a_template_given_at_start_replaces_the_models(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer(str(folders["byte_level"]), chat_template="{{ messages[0].content }}!")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi!"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "assistant", "content": "hi"}], "an assistant cannot begin"),
        ([], "."),
        ([{"content": "hi"}], "role"),
    ],
    ids=["raised", "empty", "undefined"],
)
def test_messages_that_the_template_refuses_are_the_clients_fault(
    folders: dict[str, Path], messages: list[dict[str, str]], reason: str
) -> None:
    strict = (
        "{% if not messages[0].role %}{{ raise_exception('role is missing') }}{% endif %}" + CHAT_TEMPLATE
    )
    tokenizer = Tokenizer(str(folders["byte_level"]), chat_template=strict)
    with pytest.raises(InvalidRequest, match=reason) as refusal:
        tokenizer.apply_chat_template(messages)
    assert refusal.value.param == "messages"


def test_a_client_cannot_bring_a_template_or_change_what_comes_out(folders: dict[str, Path]) -> None:
    tokenizer = load(folders, "byte_level")
    for name in ("chat_template", "tokenize", "return_dict", "self", "conversations"):
        with pytest.raises(InvalidRequest, match=name) as refusal:
            tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], variables={name: "x"})
        assert refusal.value.param == "chat_template_kwargs"


def test_without_a_template_a_chat_is_refused_with_the_way_out(tmp_path: Path) -> None:
    save(tmp_path, "byte_level")
    tokenizer = Tokenizer(str(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="/v1/completions") as refusal:
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert refusal.value.param == "messages"


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_has_fewer_tokens_than_its_least(folders: dict[str, Path], kind: str) -> None:
    tokenizer, source = load(folders, kind), random.Random(kind)
    for _ in range(200):
        text = "".join(source.choices(["the", " ", "   ", "é", "🙂", "zzzz", "<tool é>", "</s>"], k=20))
        assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


def test_the_least_number_of_tokens_is_the_length_in_longest_tokens(folders: dict[str, Path]) -> None:
    tokenizer = load(folders, "byte_level")
    longest = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))
    assert tokenizer.min_tokens("a" * (10 * longest + 1)) == 11
    assert load(folders, "wordpiece").min_tokens("a" * 1000) == 0
