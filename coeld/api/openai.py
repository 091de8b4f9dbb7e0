"""OpenAI's request and response shapes, to and from the words of the engine. Pure.

What would change the answer is checked or refused: types, ranges, roles, and fields of OpenAI's
that are not supported. Fields that coeld does not know are ignored, as by OpenAI. `x_coeld` in a
request is ours (`kl_budget`), and in `usage`: how long it took, and what travelled.
"""

import json
from dataclasses import dataclass
from typing import Any, Final, Literal

from coeld.errors import BadRequest

Kind = Literal["chat", "text"]

ROLES: Final = ("system", "developer", "user", "assistant")
MESSAGES_MAX: Final = 4096
STOPS_MAX: Final = 4
STOP_CHARS_MAX: Final = 256
TOKENS_MAX: Final = 1 << 24
"""More than any context; larger numbers are mistakes."""
KL_BUDGET_MAX: Final = 1.0
"""Nats per token: beyond, the answer would be another model's."""
SEED_MAX: Final = (1 << 63) - 1
NEUTRAL_IN_BOTH: Final[dict[str, tuple[Any, ...]]] = {
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
}
NEUTRAL: Final[dict[Kind, dict[str, tuple[Any, ...]]]] = {
    "chat": NEUTRAL_IN_BOTH
    | {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "logprobs": (False,),
        "top_logprobs": (0,),
    },
    "text": NEUTRAL_IN_BOTH | {"echo": (False,), "suffix": ("",), "best_of": (1,), "logprobs": ()},
}
"""Fields that are not supported, with the values, besides null, that change nothing."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A checked request."""

    kind: Kind
    model: str | None
    stream: bool
    include_usage: bool
    engine: dict[str, Any]
    """Fields of the engine's `generate`, without the id."""


def parse(kind: Kind, body: bytes) -> Ask:
    """A request body. Raises BadRequest, naming the field."""
    value = _json(body)
    _refuse_unsupported(value, NEUTRAL[kind])
    stream = _flag(value, "stream")
    options = _field(value, "stream_options", dict, {})
    if options and not stream:
        raise BadRequest("stream_options is only allowed with stream: true.", "stream_options")
    if _integer(value, "n", 1, 1, 128) != 1:
        raise BadRequest("Only n = 1 is supported: ask several times instead.", "n")
    return Ask(
        kind=kind,
        model=_field(value, "model", str, None),
        stream=stream,
        include_usage=_flag(options, "include_usage", "stream_options.include_usage"),
        engine=_source(kind, value) | _sampling(value) | {"kl_budget": _budget(value)},
    )


def _json(body: bytes) -> dict[str, Any]:
    def refuse(text: str) -> None:
        raise ValueError(f"{text} is not a JSON number")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"The body is not valid JSON: {exc}.") from exc
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object.")
    return value


def _refuse_unsupported(
    value: dict[str, Any], neutral: dict[str, tuple[Any, ...]], where: str = ""
) -> None:
    for name, harmless in neutral.items():
        found = value.get(name)
        if found is None or any(found == one and type(found) is type(one) for one in harmless):
            continue
        raise BadRequest(
            f"{where}{name} is not supported here, and ignoring it would change the answer: "
            "leave it out.",
            where + name,
        )


def _source(kind: Kind, value: dict[str, Any]) -> dict[str, Any]:
    """What is to be continued or answered."""
    if kind == "chat":
        return {"messages": _messages(value.get("messages"))}
    prompt = value.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise BadRequest("prompt must be one text (lists of several, or of tokens, are not)."
                         if prompt is not None else "prompt is missing.", "prompt")  # fmt: skip
    if not prompt:
        raise BadRequest("prompt is empty: there is nothing to continue.", "prompt")
    return {"prompt": _clean(prompt, "prompt")}


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message.", "messages")
    if len(messages) > MESSAGES_MAX:
        raise BadRequest(f"messages holds more than {MESSAGES_MAX} messages.", "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRequest(f"{where} must be an object with role and content.", where)
    role = message.get("role")
    if role == "tool":
        raise BadRequest(
            f"{where}.role is tool, and tools are not supported here: say what it found in a "
            "message of the user.",
            f"{where}.role",
        )
    _refuse_unsupported(message, {"tool_calls": ([],), "function_call": ()}, f"{where}.")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRequest(f"{where}.role must be one of {', '.join(ROLES)}.", f"{where}.role")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise BadRequest(
            f"{where}.content must be a text or a list of text parts.", f"{where}.content"
        )
    role = "system" if role == "developer" else role
    return {"role": role, "content": _clean(content, f"{where}.content")}


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") not in ("text", "input_text"):
        raise BadRequest(f'{where} must be {{"type": "text", "text": …}}.', where)
    text = part.get("text")
    if not isinstance(text, str):
        raise BadRequest(f"{where}.text must be a text.", f"{where}.text")
    return text


def _clean(text: str, where: str) -> str:
    """Refuses half characters (lone surrogates), which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{where} holds a lone surrogate, which is no character.", where) from None
    return text


def _sampling(value: dict[str, Any]) -> dict[str, Any]:
    newer = value.get("max_completion_tokens") is not None
    name = "max_completion_tokens" if newer else "max_tokens"
    return {
        "max_tokens": _integer(value, name, None, 1, TOKENS_MAX),
        "temperature": _number(value, "temperature", 1.0, 0.0, 2.0),
        "top_p": _number(value, "top_p", 1.0, 0.0, 1.0),
        "top_k": _integer(value, "top_k", 0, 0, TOKENS_MAX),
        "seed": _integer(value, "seed", None, -SEED_MAX - 1, SEED_MAX),
        "stop": _stops(value.get("stop")),
    }


def _budget(value: dict[str, Any]) -> float | None:
    """x_coeld.kl_budget: what the answer may lose on slow links; None: as configured."""
    ours = _field(value, "x_coeld", dict, {})
    budget: float | None = _number(ours, "kl_budget", None, 0.0, KL_BUDGET_MAX, "x_coeld.kl_budget")
    return budget


def _stops(stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
        raise BadRequest("stop must be a text or a list of texts.", "stop")
    if len(stops) > STOPS_MAX or any(not 0 < len(one) <= STOP_CHARS_MAX for one in stops):
        raise BadRequest(
            f"stop holds at most {STOPS_MAX} texts of 1 to {STOP_CHARS_MAX} characters.", "stop"
        )
    return [_clean(one, "stop") for one in stops]


def _field(value: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    found = value.get(name)
    if found is None:
        return default
    if not isinstance(found, kind):
        words: dict[Any, str] = {str: "a text", dict: "an object"}
        raise BadRequest(f"{name} must be {words[kind]}.", name)
    return found


def _flag(value: dict[str, Any], name: str, where: str = "") -> bool:
    found = value.get(name)
    if found is not None and type(found) is not bool:
        raise BadRequest(f"{where or name} must be true or false.", where or name)
    return bool(found)


def _integer(value: dict[str, Any], name: str, default: Any, low: int, high: int) -> Any:
    found = value.get(name)
    if found is None:
        return default
    if type(found) is not int or not low <= found <= high:
        raise BadRequest(f"{name} must be a whole number between {low} and {high}.", name)
    return found


def _number(
    value: dict[str, Any], name: str, default: Any, low: float, high: float, where: str = ""
) -> Any:
    found, where = value.get(name), where or name
    if found is None:
        return default
    if type(found) not in (int, float) or not low <= found <= high:
        raise BadRequest(f"{where} must be a number between {low:g} and {high:g}.", where)
    return float(found)


@dataclass(frozen=True, slots=True)
class Reply:
    """Builds everything that is sent back for one request."""

    kind: Kind
    ident: str
    created_s: int
    model: str

    def whole(self, text: str, done: dict[str, Any]) -> dict[str, Any]:
        """The answer of a request without streaming."""
        choice = self._choice({"content": text}, text, done["finish_reason"])
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text}
            del choice["delta"]
        return self._frame(choice, stream=False) | {"usage": usage(done)}

    def first(self) -> dict[str, Any] | None:
        """What a streamed chat begins with."""
        if self.kind == "text":
            return None
        return self._frame(self._choice({"role": "assistant", "content": ""}, "", None))

    def piece(self, text: str) -> dict[str, Any]:
        return self._frame(self._choice({"content": text}, text, None))

    def last(self, done: dict[str, Any]) -> dict[str, Any]:
        return self._frame(self._choice({}, "", done["finish_reason"]))

    def usage(self, done: dict[str, Any]) -> dict[str, Any]:
        """The extra chunk of stream_options.include_usage."""
        return self._frame(None) | {"usage": usage(done)}

    def _choice(self, delta: dict[str, str], text: str, reason: str | None) -> dict[str, Any]:
        said = {"delta": delta} if self.kind == "chat" else {"text": text}
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}

    def _frame(self, choice: dict[str, Any] | None, stream: bool = True) -> dict[str, Any]:
        name = "text_completion"
        if self.kind == "chat":
            name = "chat.completion.chunk" if stream else "chat.completion"
        return {
            "id": self.ident,
            "object": name,
            "created": self.created_s,
            "model": self.model,
            "choices": [choice] if choice else [],
        }


def usage(done: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's `usage`, and ours beside it, from the engine's `done`."""
    prompt, completion = int(done["prompt_tokens"]), int(done["completion_tokens"])
    decode_s = float(done["decode_s"])
    speed = (completion - 1) / decode_s if completion > 1 and decode_s > 0 else None
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "x_coeld": {
            "prefill_s": done["prefill_s"],
            "decode_s": decode_s,
            "decode_tokens_per_s": round(speed, 2) if speed else None,
            "decode_split": done["decode_split"],
            "stalls": done["stalls"],
            "wire": done["wire"],
            "narrow": done["narrow"],
        },
    }


def model_card(name: str, created_s: int, context_tokens: int) -> dict[str, Any]:
    """An entry of /v1/models."""
    return {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "coeld",
        "context_window": context_tokens,
    }
