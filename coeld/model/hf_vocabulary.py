"""The tokenizer of a Hugging Face folder, and the tokens that begin and end an answer.

tokenizer.json is taken as it is, but for padding and truncation, which some checkpoints left in it
from training. Special tokens are found where transformers finds them: tokenizer_config.json, then
generation_config.json and config.json, as texts or ids.
"""

import json
from typing import Any

from tokenizers import Tokenizer

from coeld.errors import BadModelFile, UnsupportedModel
from coeld.model.chat_template import checked
from coeld.model.checkpoint import Vocabulary
from coeld.model.hf_folder import HfFolder
from coeld.model.tokenizer import end_tokens

OLD_FILES = ("tokenizer.model", "vocab.json", "spiece.model")
OTHER_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_vocabulary(folder: HfFolder, rows: int) -> Vocabulary | None:
    """`rows`: of the embedding. None without a tokenizer. Raises BadModelFile, UnsupportedModel."""
    if not folder.has("tokenizer.json"):
        if old := next(filter(folder.has, OLD_FILES), None):
            raise UnsupportedModel(
                f"{folder.source} has its tokenizer in {old} only. coeld reads tokenizer.json; "
                "transformers writes it: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            )
        return None
    value = {**folder.json("tokenizer.json"), "truncation": None, "padding": None}
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        data = text.encode()
        tokenizer = Tokenizer.from_str(text)
    except Exception as exc:  # the library raises nothing narrower
        raise BadModelFile(
            f"tokenizer.json of {folder.source} makes no tokenizer ({str(exc)[:200]}). The file is "
            "damaged, or newer than the installed package tokenizers."
        ) from exc
    tokens: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    if max(tokens.values(), default=0) >= rows:
        raise BadModelFile(
            f"{folder.source} has tokens up to {max(tokens.values())} for {rows} rows of the "
            "embedding. The files do not belong together; get them again."
        )
    return _Special(folder, tokenizer, tokens, rows).read(data)


class _Special:
    """Finds the special tokens."""

    def __init__(
        self, folder: HfFolder, tokenizer: Tokenizer, tokens: dict[str, int], rows: int
    ) -> None:
        self._folder, self._tokenizer, self._tokens, self._rows = folder, tokenizer, tokens, rows
        self._config = self._optional("tokenizer_config.json")
        self._generation = self._optional("generation_config.json")

    def read(self, data: bytes) -> Vocabulary:
        bos = self._named("bos_token")
        if bos is None and "bos_token" not in self._config:
            bos = next(iter(self._numbered("bos_token_id")), None)
        control = {
            token.content: index
            for index, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        eos = self._named("eos_token")
        named = {eos} - {None} | set(self._numbered("eos_token_id"))
        template = self._chat_template() or ""
        return Vocabulary(
            json=data,
            bos_token=bos,
            eos_tokens=end_tokens({index for index in named if index is not None}, control, eos),
            add_bos=bos is not None and self._add_bos(bos),
            chat_template=checked(template, self._others(), self._folder.source) or None,
        )

    def _optional(self, name: str) -> dict[str, Any]:
        return self._folder.json(name) if self._folder.has(name) else {}

    def _bad(self, key: str, value: Any) -> BadModelFile:
        return BadModelFile(
            f"{self._folder.source} gives {key} as {str(value)[:80]!r}, which is no token. The "
            "file is damaged or made by a broken tool; get it again."
        )

    def _text(self, key: str) -> Any:
        """Of a token given as a text, or as an object around it."""
        value = self._config.get(key)
        return value.get("content") if isinstance(value, dict) else value

    def _named(self, key: str) -> int | None:
        text = self._text(key)
        if text is None:
            return None
        if not isinstance(text, str) or text not in self._tokens:
            raise self._bad(key, self._config[key])
        return self._tokens[text]

    def _others(self) -> dict[str, str]:
        """Texts of the special tokens besides BOS and EOS."""
        found = {key: self._text(key) for key in OTHER_TOKENS}
        return {key: text for key, text in found.items() if isinstance(text, str)}

    def _numbered(self, key: str) -> list[int]:
        """Tokens given as an id or a list of ids."""
        value = self._generation.get(key)
        if value is None:
            value = self._folder.config.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(index) is not int or not 0 <= index < self._rows for index in found):
            raise self._bad(key, value)
        return found

    def _add_bos(self, bos: int) -> bool:
        """As the configuration says, else as the tokenizer does."""
        said = self._config.get("add_bos_token")
        if isinstance(said, bool):
            return said
        ids: list[int] = self._tokenizer.encode("", add_special_tokens=True).ids
        return ids[:1] == [bos]

    def _chat_template(self) -> str | None:
        """A file of its own, else a text or a list of named texts in the configuration."""
        if self._folder.has("chat_template.jinja"):
            try:
                return self._folder.text("chat_template.jinja").decode() or None
            except UnicodeDecodeError as exc:
                raise BadModelFile(
                    f"chat_template.jinja of {self._folder.source} is not UTF-8."
                ) from exc
        found = self._config.get("chat_template")
        if isinstance(found, list):
            named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get("default")
        if found is not None and not isinstance(found, str):
            raise BadModelFile(
                f"the chat_template in tokenizer_config.json of {self._folder.source} is no text."
            )
        return found or None
