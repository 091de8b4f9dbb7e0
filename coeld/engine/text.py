"""Text to tokens and back: tokenizer, chat template, streaming with stop strings."""

from collections.abc import Sequence
from typing import Final

from jinja2 import TemplateError
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from coeld.engine.channels import CHANNEL, MESSAGE, Channels
from coeld.errors import BadModelFile, BadRequest
from coeld.model.chat_template import compile_template
from coeld.model.manifest import Manifest
from coeld.model.store import Store

LOOK_CHARS: Final = 32
"""Per token of the context: the beginning of a text that shows whether it is far too long. All of
megabytes would take seconds, in which no answer goes on."""
NO_TOKENIZER: Final = '{"model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}'
"""Stands in for a model whose source had none."""
END_TOKENS: Final = 8
"""Of a prompt, at which its continuation is tied on; characters are bytes in some, four at most."""
HALF: Final = "\ufffd"
"""What half a character is decoded to."""
TEMPLATE_ERRORS: Final = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError),
)
"""What a template's code raises about messages that it was not written for."""


class Text:
    """The tokenizer and chat template of one model."""

    def __init__(self, manifest: Manifest, store: Store) -> None:
        """Raises BadModelFile when the tokenizer or the template cannot be read."""
        self._manifest = manifest
        ref = manifest.tokenizer
        try:
            source = store.blob_path(ref).read_text("utf-8") if ref else NO_TOKENIZER
            self._tokenizer = Tokenizer.from_str(source)
            template = manifest.chat_template
            written = store.blob_path(template).read_text("utf-8") if template else None
            self._template = compile_template(written) if written else None
        except (OSError, ValueError) as exc:
            raise BadModelFile(
                f"tokenizer or chat template of {manifest.name} cannot be read ({exc}). "
                "Remove the model and add it again."
            ) from exc
        added = self._tokenizer.get_added_tokens_decoder().items()
        self._control = {token.content: index for index, token in added if token.special}

    def encode(self, text: str, context: int | None = None) -> list[int]:
        """Token ids of a plain prompt, with the beginning-of-text token if the model wants one. Of
        text that is far too long for the context perhaps only the first: more than twice as many.

        Raises BadRequest when the model has no tokenizer.
        """
        if self._manifest.tokenizer is None:
            raise BadRequest(
                f"{self._manifest.name} came without a tokenizer: it can only be measured, with "
                "coeld bench.",
                "prompt",
            )
        ids = self._tokens(text, context)
        bos = self._manifest.bos_token
        return [bos, *ids] if self._manifest.add_bos and bos is not None else ids

    def encode_chat(
        self, messages: Sequence[dict[str, str]], context: int | None = None
    ) -> list[int]:
        """The same of a conversation, ready for the assistant's turn. Raises BadRequest."""
        if self._template is None:
            raise BadRequest(
                f"{self._manifest.name} has no chat template: use /v1/completions.", "messages"
            )
        try:
            text = self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                bos_token=self._token(self._manifest.bos_token),
                eos_token=self._token(next(iter(self._manifest.eos_tokens), None)),
            )
        except TEMPLATE_ERRORS as exc:
            raise BadRequest(
                f"the chat template refuses these messages: {exc}", "messages"
            ) from exc
        return self._tokens(text, context)

    def _tokens(self, text: str, context: int | None) -> list[int]:
        beginning = text if context is None else text[: context * LOOK_CHARS]
        # as a batch, for only then other threads run meanwhile
        (encoded,) = self._tokenizer.encode_batch_fast([beginning], add_special_tokens=False)
        ids: list[int] = encoded.ids
        if context is None or len(beginning) == len(text) or len(ids) > 2 * context:
            return ids
        return self._tokens(text, None)

    def stream(self, stop: Sequence[str] = (), prompt: Sequence[int] | None = None) -> "Stream":
        """`prompt`: the plain one that is to be continued; None: an answer to a conversation."""
        if prompt is not None:
            return Stream(self._tokenizer, stop, None, self._end(prompt))
        spoken = {CHANNEL, MESSAGE} <= self._control.keys()
        return Stream(
            self._tokenizer, stop, Channels(self._tokenizer, self._control) if spoken else None
        )

    def _end(self, prompt: Sequence[int]) -> Sequence[int]:
        """The shortest end of a prompt that is text by itself; empty when there is none near."""
        for count in range(1, END_TOKENS + 1):
            text = self._tokenizer.decode(prompt[-count:])
            if text and HALF not in text:
                return prompt[-count:]
        return ()

    def _token(self, token: int | None) -> str:
        return "" if token is None else self._tokenizer.id_to_token(token) or ""


class Stream:
    """Tokens to text as it may be shown: never half a character, never part of a stop string, and
    of a model that speaks in channels only the answer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        channels: Channels | None,
        before: Sequence[int] = (),
    ) -> None:
        """`before`: what the text goes on after. Sentencepiece drops the first space of a text, and
        of one that continues another there is none to drop."""
        self._tokenizer = tokenizer
        self._channels = channels
        self._decode = DecodeStream(skip_special_tokens=True)
        for token in before:
            self._decode.step(tokenizer, token)
        self._stop = [text for text in stop if text]
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """Text that is now certain, and whether a stop string was completed (it is cut off)."""
        if self._channels is None or self._channels.is_answer(token):
            self._held += self._decode.step(self._tokenizer, token) or ""
        found = [at for at in (self._held.find(text) for text in self._stop) if at >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            return text, True
        keep = _overlap(self._held, self._stop)
        text, self._held = self._held[: len(self._held) - keep], self._held[-keep:] if keep else ""
        return text, False

    def flush(self) -> str:
        """What was held back, at the end of an answer."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` with which some stop string begins."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
