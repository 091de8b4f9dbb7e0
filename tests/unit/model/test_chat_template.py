"""Chat templates are rendered as transformers renders them: what is expected here, it gave."""

import pytest

from coeld.errors import UnsupportedModel
from coeld.model.chat_template import checked, compile_template

MESSAGE = {"role": "user", "content": "Grüße <b>"}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ m.content|tojson }}", '"Grüße <b>"'),
        ("{{ {'b': 1, 'a': 2}|tojson(sort_keys=true) }}", '{"a": 2, "b": 1}'),
        ("{{ {'b': [1]}|tojson(indent=2) }}", '{\n  "b": [\n    1\n  ]\n}'),
        ("{{ [1, 2]|tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{{ 'ü'|tojson(ensure_ascii=true) }}", r'"\u00fc"'),
        ("{% generation %}{{ m.role }}{% endgeneration %}!", "user!"),
        ("{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}", "21"),
        ("{% for x in [1, 2] %}{% generation %}{{ x }}{% endgeneration %}{% endfor %}", "12"),
        ("{% for x in [1, 2] %}{{ x }}{% break %}{% endfor %}", "1"),
    ],
)
def test_a_template_finds_what_it_finds_in_transformers(template: str, text: str) -> None:
    assert compile_template(template).render(m=MESSAGE) == text


@pytest.mark.parametrize(
    "template", ["{% if %}", "{% unheard_of %}", "{{ x|unheard_of }}", "{% generation %}", "{{"]
)
def test_a_template_that_cannot_be_read_is_refused_with_its_source(template: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"chat template of m\.gguf cannot be read"):
        checked(template, {}, "m.gguf")


def test_a_template_is_kept_as_it_is_but_for_tokens_that_it_names() -> None:
    tokens = {"pad_token": '<"｜pad\\｜🎉>', "unk_token": "<unk>"}
    assert checked("\n{{ m.content }}", tokens, "m") == "\n{{ m.content }}"
    found = checked("\n{{ m.content }}{{ pad_token }}", tokens, "m")
    assert compile_template(found).render(m=MESSAGE) == '\nGrüße <b><"｜pad\\｜🎉>'
    assert "<unk>" not in found
