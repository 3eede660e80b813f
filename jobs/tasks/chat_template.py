"""Conversations → text by the tokenizer's chat template, with the spans of characters that are learned.

A template may refuse a conversation, leave out what it was given, or rewrite earlier turns. What it leaves out is found
by asking it again without: a text that stays the same has not used it, and the conversation is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jobs.tasks import TaskError, TaskSetupError, template_questions
from jobs.tasks.conversations import Conversation, is_learned
from jobs.tasks.messages import LEARNED, REASONING, Message
from jobs.tasks.template_questions import Messages

# A plain ChatML template, given to tokenizers that bring none.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_MARK = "\ue000\ue001"
"""Stands where an answer would: in no text, and without white space that a template might strip."""


@dataclass(frozen=True)
class Rendered:
    """A text, and the spans (first character, last one + 1) of it that are learned."""

    text: str
    spans: list[tuple[int, int]]


def render_text(tokenizer: Any, messages: Messages, tools: Any = None, prompt: bool = False, **options: Any) -> str:
    """Return the text of messages by the tokenizer's chat template.

    Args:
        tools: as OpenAI writes them.
        prompt: end with what the template puts before an answer.
        options: variables of the template's own.

    Raises:
        TaskSetupError: the tokenizer has no chat template, or one that cannot be read.
        TaskError: the template refuses the messages.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    if not tokenizer.chat_template:
        raise TaskSetupError(
            "the tokenizer has no chat template, and the data are conversations: put one into its folder as "
            "chat_template.jinja, or name a tokenizer that has one in task.tokenizer.from"
        )
    told = [{key: value for key, value in message.items() if key != LEARNED} for message in messages]
    try:
        return str(
            tokenizer.apply_chat_template(told, tools=tools, add_generation_prompt=prompt, tokenize=False, **options)
        )
    except TemplateSyntaxError as error:
        raise TaskSetupError(f"the chat template is broken: line {error.lineno}: {error}") from error
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise TaskError(f"the chat template refuses the conversation: {' '.join(str(error).split())}") from error


def render(tokenizer: Any, conversation: Conversation) -> list[Rendered]:
    """Return a conversation's text with the spans of its answers; one text for each answer where these do not agree.

    A span begins after what the template puts before an answer, and ends after what it puts behind it (so the
    end-of-turn token is learned too). Where the template writes earlier turns in another way than when they were the
    last (it drops their thoughts, or moves the system prompt), each answer is learned behind the prompt that a server
    would send.

    Raises:
        TaskSetupError: the tokenizer has no chat template.
        TaskError: the template refuses the conversation, or leaves out a part of it.
    """
    asked = _Asked(tokenizer, conversation.tools, conversation.messages)
    whole = asked.whole
    learned = [index for index, message in enumerate(asked.messages) if is_learned(message)]
    each = [asked.answer(index) for index in learned]
    if all(whole.startswith(text) for text, _ in each):
        asked.check_shown(asked.messages, whole, learned)
        return [Rendered(whole, [span for _, span in each])]
    for index, (text, _) in zip(learned, each, strict=True):
        asked.check_shown(asked.messages[: index + 1], text, [index])
    return [Rendered(text, [span]) for text, span in each]


class _Asked:
    """One conversation, and what the template makes of it and of variations of it."""

    def __init__(self, tokenizer: Any, tools: Any, messages: list[Message]) -> None:
        self._tokenizer, self._tools = tokenizer, tools
        self.messages, self.whole = template_questions.in_its_form(self.text, messages)

    def text(self, messages: Messages, prompt: bool = False) -> str:
        return render_text(self._tokenizer, messages, self._tools, prompt)

    def answer(self, index: int) -> tuple[str, tuple[int, int]]:
        """Return the text up to the answer at `index`, and the answer's span in it."""
        through = self.text(self.messages[: index + 1])
        return through, (self._start(index, through), len(through.removesuffix("\n")))

    def _start(self, index: int, through: str) -> int:
        """Return where the answer begins: behind the generation prompt, or, without one, where another would differ."""
        before = self.messages[:index]
        try:
            prompt = self.text(before, prompt=True)
            if through.startswith(prompt):
                return len(prompt)
        except TaskError:  # it renders nothing that ends before an answer, such as no message at all
            pass
        message = self.messages[index]
        other = {"role": "assistant", "content": _MARK, **{key: _MARK for key in REASONING if key in message}}
        marked = self.text([*before, other])
        if _MARK not in marked:
            raise TaskError("the chat template leaves out the answer, so it cannot be located")
        pairs = enumerate(zip(through, marked, strict=False))
        return next((at for at, (one, other_) in pairs if one != other_), len(through))

    def check_shown(self, messages: list[Message], text: str, answers: list[int]) -> None:
        """Refuse what the template leaves out of `text`; the thoughts before `answers` must be in it, others need not.

        Raises:
            TaskError: names it.
        """
        is_same = template_questions.is_same
        if self._tools and is_same(lambda told: render_text(self._tokenizer, told), messages, text):
            raise TaskError("the chat template leaves out 'tools'")
        for index, message in enumerate(messages):
            if index in answers and _squeezed(message["content"]) not in _squeezed(text):
                raise TaskError(f"the chat template leaves out a part of the answer in message {index + 1}")
            for what, changed in _variations(message, index in answers):
                if is_same(self.text, [*messages[:index], changed, *messages[index + 1 :]], text):
                    raise _left_out(what, index, message)
        for index in template_questions.unshown(self.text, messages, text):
            raise _left_out("the content", index, messages[index])


def _squeezed(text: str) -> str:
    """Return a text without white space, which templates strip and add."""
    return "".join(text.split())


def _left_out(what: str, index: int, message: Message) -> TaskError:
    return TaskError(f"the chat template leaves out {what} of message {index + 1} ({message['role']})")


def _variations(message: Message, is_answer: bool) -> Iterator[tuple[str, Message]]:
    """Yield what of a message, beside its content, may have been left out, each with the message without it."""
    fields = (*(REASONING if is_answer else ()), *(("name",) if message["role"] != "tool" else ()))
    for field in fields:
        if field in message:
            yield repr(field), {key: value for key, value in message.items() if key != field}
    calls = message.get("tool_calls", [])
    for index, call in enumerate(calls):
        others = [*calls[:index], *calls[index + 1 :]]
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        yield f"the call of {call['function']['name']!r}", {**rest, **({"tool_calls": others} if others else {})}


def turn_end(tokenizer: Any) -> int | None:
    """Return the special token with which the template ends an answer; None where it has none."""
    if not tokenizer.chat_template:
        return None
    try:
        text = render_text(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}])
    except TaskError:
        return None
    behind = tokenizer(text.rpartition(_MARK)[2].strip(), add_special_tokens=False)["input_ids"]
    return int(behind[0]) if behind and behind[0] in special_ids(tokenizer) else None


def peculiarities(tokenizer: Any) -> dict[str, bool]:
    """Tell what is peculiar to the tokenizer's template: name → whether it is so; chat_rows.COUNTED says it."""
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}
    template = str(tokenizer.chat_template)
    said = {"dated": "strftime_now" in template, "marked": re.search(r"{%-?\s*generation\b", template) is not None}
    try:
        asked, prompt = render_text(tokenizer, [question]), render_text(tokenizer, [question], prompt=True)
        answered = render_text(tokenizer, [question, answer])
    except TaskSetupError:
        raise
    except TaskError:  # it takes no such conversation
        return said
    return {**said, "headless": prompt == asked, "otherwise": not answered.startswith(prompt)}


def special_texts(tokenizer: Any) -> re.Pattern[str]:
    """Return what finds the texts that stand for special tokens: in a message they become these tokens."""
    tokens = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    texts = sorted({token for token in tokens if token}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the tokens that stand for no text: special ones, and the end token."""
    added = {at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*added, *tokenizer.all_special_ids})
