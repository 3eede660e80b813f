"""A conversation with an endpoint in the terminal, over the same HTTP that everyone uses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from cluster.errors import UserError

HELP = "/clear forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."


class Chat:
    """A conversation: it remembers what was said, and streams each answer through `write`."""

    def __init__(self, client: Any, model: str, system: str | None, write: Callable[[str], None]) -> None:
        self._client = client
        self.model = model
        self._write = write
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._opening)

    def clear(self) -> None:
        self.messages = list(self._opening)

    def ask(self, question: str) -> str:
        """Send a question and write the answer as it comes. Ctrl-C ends the answer, not the conversation.

        Raises UserError when the endpoint refuses or fails; the question is then forgotten.
        """
        import openai

        self.messages.append({"role": "user", "content": question})
        parts: list[str] = []
        try:
            for text in self._answer():
                parts.append(text)
                self._write(text)
        except KeyboardInterrupt:
            self._write(" [stopped]")
        except openai.APIError as error:
            self.messages.pop()
            raise UserError(_explained(error)) from None
        self._write("\n")
        self.messages.append({"role": "assistant", "content": "".join(parts)})
        return "".join(parts)

    def _answer(self) -> Iterator[str]:
        with self._client.chat.completions.create(model=self.model, messages=self.messages, stream=True) as stream:
            for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    yield chunk.choices[0].delta.content


def connect(endpoint: str, model: str | None, system: str | None, certificate: str | None = None) -> Chat:
    """Return a conversation with `model`, or with the first model there that generates text.

    `certificate`: file of the endpoint's own certificate.
    """
    import openai

    from serve.front.client import trust

    verified = openai.DefaultHttpxClient(verify=trust(certificate)) if certificate else None
    client = openai.OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0, http_client=verified)
    try:
        served = client.models.list().data
    except openai.APIError as error:
        raise UserError(f"{endpoint} does not answer ({error}); see `tandem serve status`") from None
    names = [card.id for card in served if getattr(card, "generates", True)]
    if not names:
        raise UserError(f"no model at {endpoint} generates text")
    if model is not None and model not in names:
        raise UserError(f"no model {model!r} to talk to at {endpoint}; there are: {', '.join(names)}")
    return Chat(client, model or names[0], system, _write)


def run(chat: Chat) -> None:
    """Read questions from the terminal, or lines from a pipe, until they end."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401  (line editing and history for input())

        print(f"{chat.model}: {HELP}", file=sys.stderr)
    for question in _questions("you> " if is_terminal else ""):
        if question == "/exit":
            return
        if question == "/clear":
            chat.clear()
        elif question:
            _answered(chat, question, is_terminal)


def _answered(chat: Chat, question: str, is_terminal: bool) -> None:
    try:
        chat.ask(question)
    except UserError as error:
        if not is_terminal:
            raise
        print(f"error: {error}", file=sys.stderr)


def _questions(prompt: str) -> Iterator[str]:
    while True:
        try:
            yield input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return


def _explained(error: Any) -> str:
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    hint = "; /clear starts anew" if getattr(error, "code", None) == "context_length_exceeded" else ""
    return f"{message or error}{hint}"


def _write(text: str) -> None:
    print(text, end="", flush=True)
