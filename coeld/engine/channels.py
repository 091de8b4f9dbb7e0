"""What of an answer is for its reader, where a model speaks in channels (gpt-oss, "harmony"):

<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>

Only the messages of the channel `final` are; the others are reasoning, and calls of tools.
"""

from collections.abc import Mapping
from typing import Final

from tokenizers import Tokenizer

CHANNEL: Final = "<|channel|>"
MESSAGE: Final = "<|message|>"
HEADS: Final = ("<|start|>", "<|end|>", CHANNEL)
"""After each of these comes no text before the next MESSAGE."""
FINAL: Final = "final"


class Channels:
    """Looks at one answer, token by token."""

    def __init__(self, tokenizer: Tokenizer, control: Mapping[str, int]) -> None:
        """`control`: the tokenizer's control tokens, CHANNEL and MESSAGE among them."""
        self._tokenizer = tokenizer
        self._message = control[MESSAGE]
        self._heads = {control[text] for text in HEADS if text in control}
        self._head: list[int] = []
        """The tokens after the last of `_heads`."""
        self._shown = True  # what has no channel at all is a plain answer

    def is_answer(self, token: int) -> bool:
        """Whether the next token belongs to the answer."""
        if token in self._heads:
            self._head, self._shown = [], False
        elif token == self._message:
            said = self._tokenizer.decode(self._head, skip_special_tokens=False)
            self._shown = said.partition("<|")[0].split()[:1] == [FINAL]
        elif not self._shown:
            self._head.append(token)
        return self._shown
