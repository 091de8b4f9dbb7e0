"""The chat template: code by the model's author, so it runs in Jinja2's sandbox.

What it finds there is what transformers gives it (utils/chat_template_utils.py).
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from coeld.errors import UnsupportedModel


def compile_template(written: str) -> Template:
    """Raises ValueError when it is no template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["raise_exception"] = _raise
    environment.filters["tojson"] = _tojson
    try:
        return environment.from_string(written)
    except (TemplateError, RecursionError, SyntaxError) as exc:
        raise ValueError(f"{type(exc).__name__}: {exc}") from exc


def checked(written: str, tokens: Mapping[str, str], source: str) -> str:
    """The template of a model to be imported. `tokens`: texts of special tokens by their names in
    templates; those that it names become part of it. Raises UnsupportedModel.
    """
    used = {name: text for name, text in tokens.items() if name in written}
    # "+": the first line break of the template stays.
    lines = [f"{{% set {k} = {json.dumps(v, ensure_ascii=False)} +%}}" for k, v in used.items()]
    template = "".join(lines) + written
    try:
        compile_template(template)
    except ValueError as exc:
        raise UnsupportedModel(
            f"the chat template of {source} cannot be read ({str(exc)[:200]}), so that nobody "
            "could talk to the model. Correct or remove it: chat_template.jinja or the key "
            "chat_template of tokenizer_config.json in a folder, tokenizer.chat_template in a GGUF "
            "file (gguf-new-metadata writes a copy with another)."
        ) from exc
    return template


class _Generation(Extension):
    """{% generation %}…{% endgeneration %} marks for training what the assistant said."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _strftime_now(pattern: str) -> str:
    return datetime.now(tz=UTC).astimezone().strftime(pattern)


def _raise(message: Any) -> None:
    raise TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
