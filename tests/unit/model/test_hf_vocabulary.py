"""The tokenizer and the special tokens of a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from coeld.errors import BadModelFile, ModelError, UnsupportedModel
from coeld.model.checkpoint import Vocabulary
from coeld.model.hf_folder import HfFolder
from tests.harness.tiny_checkpoints import VOCAB, write_folder
from tests.reference.tiny_gguf import CHAT_TEMPLATE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "m", "olmoe")


def change(folder: Path, file: str, **values: Any) -> None:
    """Sets keys of a JSON file; None removes one, `null` is written as "null"."""
    found = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def read(folder: Path, rows: int = VOCAB) -> Vocabulary:
    with HfFolder(folder) as found:
        vocabulary = found.vocabulary(rows)
    assert vocabulary is not None
    return vocabulary


def test_what_the_files_say_about_tokens(folder: Path) -> None:
    found = read(folder)
    assert (found.bos_token, found.eos_tokens, found.add_bos) == (1, (2, 0), False)
    assert found.chat_template == CHAT_TEMPLATE
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "in the hall <|im_end|>\n naïve 日本"
    assert Tokenizer.from_str(found.json.decode()).encode(text).ids == original.encode(text).ids


def test_padding_and_truncation_of_training_are_left_out(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    before = read(folder).json
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tokenizer.json"))
    found = read(folder).json
    assert len(Tokenizer.from_str(found.decode()).encode("a b c d e f").ids) == 11
    assert found == before


@pytest.mark.parametrize(
    ("config", "generation", "bos", "eos"),
    [
        ({"bos_token": {"content": "<|im_end|>"}}, {}, 2, (2, 0)),
        ({"bos_token": None}, {}, 1, (2, 0)),
        ({"eos_token": "<|endoftext|>"}, {}, 1, (0, 2)),
        ({}, {"eos_token_id": 5, "bos_token_id": None}, 1, (2, 0, 5)),
        ({"eos_token": None}, {"eos_token_id": [7, 6]}, 1, (0, 2, 6, 7)),
        ({"eos_token": None, "bos_token": None}, {"eos_token_id": None}, 1, (0, 2)),
    ],
)
def test_special_tokens_are_texts_objects_ids_or_lists(
    folder: Path, config: dict, generation: dict, bos: int, eos: tuple
) -> None:
    change(folder, "tokenizer_config.json", **config)
    change(folder, "generation_config.json", **generation)
    found = read(folder)
    assert (found.bos_token, found.eos_tokens) == (bos, eos)


def test_a_bos_that_is_null_is_none_whatever_the_model_was_trained_with(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"bos_token": null}')
    found = read(folder)
    assert (found.bos_token, found.add_bos) == (None, False)


def test_whether_bos_is_added_is_asked_of_the_tokenizer_unless_said(folder: Path) -> None:
    change(folder, "tokenizer_config.json", add_bos_token=None)
    assert read(folder).add_bos is False
    special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    first = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    single = [first, {"Sequence": {"id": "A", "type_id": 0}}]
    both = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": both}
    change(folder, "tokenizer.json", post_processor={**template, "special_tokens": special})
    assert read(folder).add_bos is True
    change(folder, "tokenizer_config.json", add_bos_token=False)
    assert read(folder).add_bos is False


def test_gpt_oss_goes_on_after_the_end_of_a_message(folder: Path) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    names = {0: "<|end|>", 2: "<|return|>"}
    for token in value["added_tokens"]:
        token["content"] = names.get(token["id"], token["content"])
    value["model"]["vocab"] = {
        names.get(index, token): index for token, index in value["model"]["vocab"].items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(value))
    (folder / "generation_config.json").unlink()
    change(folder, "tokenizer_config.json", eos_token="<|return|>")
    assert read(folder).eos_tokens == (2,)


def test_chat_templates_are_found_in_all_three_places(folder: Path) -> None:
    change(folder, "tokenizer_config.json", chat_template="inner")
    assert read(folder).chat_template == CHAT_TEMPLATE
    (folder / "chat_template.jinja").unlink()
    assert read(folder).chat_template == "inner"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    change(folder, "tokenizer_config.json", chat_template=named)
    assert read(folder).chat_template == "d"
    change(folder, "tokenizer_config.json", chat_template=None)
    assert read(folder).chat_template is None


def test_a_chat_template_that_cannot_be_read_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for message in %}")
    with pytest.raises(UnsupportedModel, match=r"(?i)chat template of m .*correct"):
        read(folder)


def test_special_tokens_that_the_chat_template_names_become_part_of_it(folder: Path) -> None:
    change(folder, "tokenizer_config.json", pad_token={"content": "<pad>"}, unk_token="<unk>")
    (folder / "chat_template.jinja").write_text("{{ pad_token }}")
    assert read(folder).chat_template == '{% set pad_token = "<pad>" +%}{{ pad_token }}'


def test_without_a_tokenizer_there_is_none_and_old_files_are_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with HfFolder(folder) as found:
        assert found.vocabulary(VOCAB) is None
        (folder / "tokenizer.model").write_bytes(b"\n\x00")
        with pytest.raises(UnsupportedModel, match=r"tokenizer.model only.*save_pretrained"):
            found.vocabulary(VOCAB)


def test_more_tokens_than_rows_is_refused(folder: Path) -> None:
    assert read(folder, 269)
    with pytest.raises(BadModelFile, match="tokens up to 268 for 268 rows"):
        read(folder, 268)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer_config.json", "bos_token", "<never heard>"),
        ("tokenizer_config.json", "bos_token", 7),
        ("tokenizer_config.json", "eos_token", {"content": 7}),
        ("tokenizer_config.json", "chat_template", 7),
        ("generation_config.json", "eos_token_id", VOCAB),
        ("generation_config.json", "eos_token_id", [1, -1]),
        ("generation_config.json", "eos_token_id", ["2"]),
        ("generation_config.json", "eos_token_id", True),
        ("tokenizer.json", "model", {"type": "BPE"}),
        ("tokenizer.json", "added_tokens", 7),
    ],
)
def test_nonsense_is_refused(folder: Path, file: str, key: str, value: Any) -> None:
    (folder / "chat_template.jinja").unlink()  # it would hide what the configuration says
    change(folder, file, **{key: value})
    with pytest.raises(BadModelFile):
        read(folder)


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b'{"a": "\\ud800"}'])
def test_files_that_are_no_json_are_refused(folder: Path, file: str, text: bytes) -> None:
    (folder / file).write_bytes(text)
    if text.startswith(b'{"a"') and file != "tokenizer.json":
        assert read(folder)  # an unknown key is nobody's business
        return
    with pytest.raises(ModelError):
        read(folder)


def test_a_chat_template_that_is_no_text_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(BadModelFile, match="not UTF-8"):
        read(folder)
