"""What a chat template is asked, in training and in serving alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from jinja2 import Environment

from cluster.errors import UserError
from jobs.tasks import TaskError
from jobs.tasks.chat_template import render
from jobs.tasks.conversations import Conversation
from jobs.tasks.template_questions import in_its_form, is_same, unshown
from tests.support import tiny_models

WITHOUT_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.role }}:{{ m.content }}{% endfor %}"
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def renders(template: str) -> Callable[[Any], str]:
    compiled = Environment().from_string(template)

    def rendered(messages: Any) -> str:
        try:
            return compiled.render(messages=messages)
        except TypeError as error:
            raise UserError(str(error)) from None

    return rendered


def conversation(*contents: str) -> list[dict[str, Any]]:
    roles = ("system", "user", "assistant")
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


@pytest.mark.parametrize(
    ("template", "contents", "left_out"),
    [
        ("{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}", ("as", "b", "c"), []),
        (
            WITHOUT_SYSTEM,
            ("as", "b", "c"),
            [0],
        ),
        (WITHOUT_SYSTEM, ("b", "b", "b"), [0]),
        (WITHOUT_SYSTEM, (" ", "b", "c"), []),
        ("{{ messages[1].content | tojson }}{{ messages[0].content | upper | trim }}", ("a", "b"), []),
        ("{{ messages[1].content }}", ("a", "b", "c"), [0, 2]),
        ("{{ messages[0].content | length }}{{ messages[1].content }}", ("a", "b"), []),
    ],
)
def test_contents_that_are_left_out(template: str, contents: tuple[str, ...], left_out: list[int]) -> None:
    messages, rendered = conversation(*contents), renders(template)
    assert unshown(rendered, messages, rendered(messages)) == left_out


def test_the_form_of_arguments() -> None:
    messages = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    function = "messages[0].tool_calls[0].function"
    as_json = "{{ " + function + ".arguments | tojson }}"
    assert in_its_form(renders(as_json), messages)[1] == '{"a": 1}'
    for wants_json in ("{{ " + function + ".arguments }}", "{{ 'x' + " + function + ".arguments }}"):
        told, text = in_its_form(renders(wants_json), messages)
        assert told[0]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
        assert text.endswith('{"a": 1}')
    with pytest.raises(UserError, match="can only concatenate"):
        in_its_form(renders("{{ 'x' + 5 }}"), messages)


def test_what_changes_nothing_is_the_same() -> None:
    rendered = renders("{{ messages[0].content }}")
    assert is_same(rendered, conversation("a", "c"), "a")
    assert not is_same(rendered, conversation("b", "c"), "a")
    assert not is_same(renders("{{ 'x' + 5 }}"), conversation("a"), "a")


def test_a_short_system_prompt_that_the_template_leaves_out_is_no_example() -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert render(tokenizer, Conversation(conversation("as", "b", "c")[1:]))
    with pytest.raises(TaskError, match=r"leaves out the content of message 1 \(system\)"):
        render(tokenizer, Conversation(conversation("as", "b", "c")))
