"""The HTTP front of all models: OpenAI's routes, the Open Inference Protocol, health and status.

No model and no tokenizer live here, and nothing of Ray: a Gateway works over any Backend (its routes are in
serve/api/routes.py). The first message of a stream is awaited before the response begins, so a prompt that is refused
is a plain 4xx, and the headers name the version that really answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from serve.api import embeddings, forms, inference_api, openai_api, transcriptions
from serve.api.admission import Admission, estimate, everyone
from serve.api.answering import Forms, answered, identity_headers
from serve.api.aside import parsed
from serve.api.bodies import Bodies
from serve.api.body import ApiError, model_name, model_not_found, parse_json
from serve.api.callers import Caller, Doorkeeper, of
from serve.api.openai_api import Generation, in_session
from serve.api.responses.answer import ResponseForm
from serve.api.responses.parse import parse
from serve.api.streaming import Choices, Stream, accepted
from serve.front import exchange
from serve.metrics import watch
from serve.metrics.metrics import Metrics
from serve.metrics.record import Record
from serve.scaling.decisions import GATEWAY_ROW, Standing, as_json
from serve.wire import EmbedCall, GenerateCall, InferCall, Inferred, Refused, ReplicaState, Vectors


@dataclass(frozen=True)
class ModelCard:
    """What is known of a served model, as /v1/models tells it."""

    name: str
    task: str
    version: str
    generates: bool
    created: int
    details: Mapping[str, Any]
    """Run, dataset, evaluation, quantisation and the like."""


class Backend(Protocol):
    """Where the models are. Every method raises ApiError for an answer that is an error."""

    def generate(self, model: str, call: GenerateCall, build: str | None = None) -> Stream:
        """Stream one text: Opened first. Closing the iterator frees what the request held."""
        ...

    async def infer(self, model: str, call: InferCall) -> Inferred | Refused: ...

    async def embed(self, model: str, call: EmbedCall) -> Vectors | Refused: ...

    async def states(self) -> tuple[list[ReplicaState], Counter[str]]:
        """Return the state of every ready replica, and by model how many requests no replica has accepted yet."""
        ...


class Gateway:
    """The routes' logic over a catalog that can be replaced while requests run."""

    def __init__(
        self,
        backend: Backend,
        max_body_bytes: int,
        max_prompts: int,
        cors_origins: Sequence[str] = (),
        admission: Admission | None = None,
        doorkeeper: Doorkeeper | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.cors_origins = cors_origins
        self.doorkeeper = doorkeeper
        """Who asks for keys; None where none are needed."""
        self.host: str | None = None
        """The one name or address that it listens on; None: all of the node's."""
        self.metrics = metrics or Metrics(Record("gateway"))
        """What it counts, and how it is told."""
        self._admission = admission or everyone()
        self._backend = backend
        self._bodies = Bodies(max_body_bytes)
        self._max_prompts = max_prompts
        self.catalog: Mapping[str, ModelCard] = {}
        self.sleepers: frozenset[str] = frozenset()
        """Models that may have no replica while it is quiet: a request wakes them, so they are ready."""
        self.scaling: Callable[[], Awaitable[Mapping[str, Standing]]] = _nothing_scales

    # -- OpenAI -----------------------------------------------------------------------------------------------------

    async def chat_completions(self, request: Request) -> Response:
        body, card, size = await self._generative(request)
        generation = await parsed(size, openai_api.parse_chat, body, exchange.current().call_id)
        return await self._generate(in_session(generation, session_of(request, body)), card, size, of(request))

    async def completions(self, request: Request) -> Response:
        body, card, size = await self._generative(request)
        call_id = exchange.current().call_id
        generation = await parsed(size, openai_api.parse_completion, body, call_id, self._max_prompts)
        return await self._generate(in_session(generation, session_of(request, body)), card, size, of(request))

    async def responses(self, request: Request) -> Response:
        body, card, size = await self._generative(request)
        wanted = await parsed(size, parse, body, exchange.current().call_id)
        try:
            generation = in_session(wanted.generation, session_of(request, body))
            return await self._generate(generation, card, size, of(request), lambda _: ResponseForm(wanted))
        except ApiError as error:
            raise wanted.placed(error) from None

    async def embeddings(self, request: Request) -> Response:
        body, card, size = await self._called(request, lambda c: c.generates or bool(c.details.get("embeddings")))
        wanted = await parsed(size, embeddings.parse, body, exchange.current().call_id)
        with await self._admission.begin(of(request), card.name, *estimate(size, 0, 1)) as ticket:
            call = replace(wanted.call, **exchange.current().carried)
            vectors = accepted(await self._backend.embed(card.name, call))
            ticket.prompt(vectors.prompt_tokens)
        answer = embeddings.answer(f"{card.name}@{vectors.identity.version}", wanted, vectors)
        return JSONResponse(answer, headers=identity_headers(vectors.identity) | ticket.headers)

    async def transcriptions(self, request: Request) -> Response:
        content_type = request.headers.get("content-type")
        async with self._bodies.of(request, forms.check_form) as raw:
            size = len(raw)
            fields = await parsed(size, forms.read, raw, content_type)
        card = self._card(model_name(fields), of(request))
        if not card.details.get("transcribes"):
            message = f"{card.name!r} is a model for {card.task}, and writes no recordings down"
            raise ApiError(400, message, code="unsupported_task", param="model")
        wanted = transcriptions.parse(fields)
        now = exchange.current()
        call = InferCall(f"trsc-{now.call_id}", {transcriptions.INPUT: [wanted.file]}, **now.carried)
        with await self._admission.begin(of(request), card.name, *estimate(size, 0, 1), rows=1) as ticket:
            result = await self._backend.infer(card.name, call)
            inferred = accepted(replace(result, param="file") if isinstance(result, Refused) else result)
            ticket.predicted(1)
        content, kind = transcriptions.answer(wanted, inferred.predictions[0])
        headers = identity_headers(inferred.identity) | ticket.headers
        return Response(content, headers=headers, media_type=kind)

    def models(self, caller: Caller) -> dict[str, Any]:
        return {"object": "list", "data": [_listed(card) for card in self._cards(caller)]}

    def model(self, name: str, caller: Caller) -> dict[str, Any]:
        return _listed(self._card(name, caller))

    async def _generative(self, request: Request) -> tuple[dict[str, Any], ModelCard, int]:
        return await self._called(request, lambda card: card.generates)

    async def _called(
        self, request: Request, can: Callable[[ModelCard], bool]
    ) -> tuple[dict[str, Any], ModelCard, int]:
        """Return the body, the card of the model that it names, and how many bytes it has."""
        async with self._bodies.of(request) as raw:
            size = len(raw)
            body = await parsed(size, parse_json, raw)
        card = self._card(model_name(body), of(request))
        if not can(card):
            message = f"{card.name!r} is a model for {card.task}: call /v2/models/{card.name}/infer"
            raise ApiError(400, message, code="unsupported_task", param="model")
        return body, card, size

    async def _generate(
        self, generation: Generation, card: ModelCard, size: int, caller: Caller, form: Forms | None = None
    ) -> Response:
        """Answer in a form, that of OpenAI's choices where none is given."""
        wanted = estimate(size, generation.calls[0].max_tokens, len(generation.calls))
        with await self._admission.begin(caller, card.name, *wanted, texts=len(generation.calls)) as ticket:
            exchange.current().when_worked(ticket.worked)
            return await answered(self._backend, card.name, generation, ticket, form or partial(Choices, generation))

    # -- Open Inference Protocol ------------------------------------------------------------------------------------

    async def infer(self, name: str, version: str | None, request: Request) -> Response:
        card = self._card(name, of(request), version)
        if card.generates and not card.details.get("infers"):
            message = f"{name!r} generates text: call /v1/chat/completions or /v1/completions"
            raise ApiError(400, message, code="unsupported_task", param="model")
        lengths = request.headers.getlist(inference_api.LENGTH_HEADER)
        read = partial(inference_api.parse, model=name, version=card.version)
        async with self._bodies.of(request) as raw:
            size = len(raw)
            wanted = await parsed(size, read, raw, ", ".join(lengths) if lengths else None)
        now = exchange.current()
        call = InferCall(f"infer-{now.call_id}", wanted.inputs, **now.carried)  # the client's own `id` may be anyone's
        rows = max(map(len, wanted.inputs.values()), default=1)
        with await self._admission.begin(of(request), name, *estimate(size, 0, 1), rows=rows) as ticket:
            result = accepted(await self._backend.infer(name, call))
            ticket.predicted(rows)
        answer = inference_api.answer(name, result.identity.version, wanted, result.predictions)
        return Response(answer.content, headers=identity_headers(result.identity) | ticket.headers | answer.headers)

    async def metadata(self, name: str, version: str | None, caller: Caller) -> dict[str, Any]:
        card = self._card(name, caller, version)
        replicas, _ = await self._backend.states()
        told = [replica.description for replica in replicas if replica.model == name]
        if not told:
            raise ApiError(503, f"no replica of {name!r} is ready", code="not_ready", headers={"retry-after": "1"})
        return {"name": name, "versions": [card.version], "platform": f"tandem-{card.task}", **told[0]}

    async def index(self, request: Request) -> list[dict[str, Any]]:
        """Return the models and which are ready, as Triton's model repository lists them."""
        async with self._bodies.of(request) as raw:
            ready_only = inference_api.parse_index(raw)
        waiting = await self.unready()
        states = {name: "UNAVAILABLE" if name in waiting else "READY" for name in self.catalog}
        cards = [card for card in self._cards(of(request)) if not (ready_only and card.name in waiting)]
        return [{"name": c.name, "version": c.version, "state": states[c.name], "reason": ""} for c in cards]

    # -- health and status ------------------------------------------------------------------------------------------

    async def ready(self, name: str, version: str | None, caller: Caller) -> bool:
        self._card(name, caller, version)
        return name not in await self.unready()

    async def unready(self) -> list[str]:
        """Return the models that have no ready replica."""
        replicas, _ = await self._backend.states()
        ready = {replica.model for replica in replicas}
        return [name for name in self.catalog if name not in ready and name not in self.sleepers]

    async def health(self) -> tuple[dict[str, Any], bool]:
        """Return what anyone may know, and whether every model is ready. Where keys are asked, names need one."""
        waiting, served = await self.unready(), list(self.catalog)
        told = {"status": "starting" if waiting else "ok", "served": len(served), "ready": len(served) - len(waiting)}
        names = {"not_ready": waiting} if waiting else {"models": served}
        return told if self.doorkeeper else told | names, not waiting

    async def status(self, caller: Caller) -> dict[str, Any]:
        """Return how busy every model is: what its replicas run, what waits, and each replica's part."""
        replicas, pending = await self._backend.states()
        scaling = {name: {"scaling": as_json(standing)} for name, standing in (await self.scaling()).items()}
        front = {GATEWAY_ROW: scaling[GATEWAY_ROW]} if GATEWAY_ROW in scaling and caller.limits.models is None else {}
        return {
            card.name: _model_status(card, [each for each in replicas if each.model == card.name], pending[card.name])
            | scaling.get(card.name, {})
            for card in self._cards(caller)
        } | front

    async def exposition(self, request: Request) -> Response:
        """Return the numbers of the whole endpoint as Prometheus reads them."""
        replicas, pending = await self._backend.states()
        accept = request.headers.get("accept")
        body, content_type = await self.metrics.exposition(self.catalog, replicas, pending, accept)
        return Response(body, headers={"content-type": content_type})

    # -- inside -----------------------------------------------------------------------------------------------------

    def _cards(self, caller: Caller) -> list[ModelCard]:
        """Return the models that a caller may call; of others it does not learn that they are there."""
        return [card for card in self.catalog.values() if caller.limits.allows(card.name)]

    def _card(self, name: str, caller: Caller, version: str | None = None) -> ModelCard:
        card = self.catalog.get(name)
        if card is None or not caller.limits.allows(name):
            raise model_not_found(name, [card.name for card in self._cards(caller)])
        watch.current().model = name
        if version not in (None, card.version):
            message = f"{name!r} has no version {version!r:.60} here; served: {card.version}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return card


def session_of(request: Request, body: Mapping[str, Any]) -> str | None:
    """Return what a request has in common with others of its conversation, where its client says so.

    A session belongs to its key: what others call theirs is another one.
    """
    named = request.headers.get("x-session-id") or body.get("prompt_cache_key")
    return f"{of(request).key}:{named:.200}" if isinstance(named, str) and named else None


async def _nothing_scales() -> Mapping[str, Standing]:
    return {}


def _listed(card: ModelCard) -> dict[str, Any]:
    listed = {"id": card.name, "object": "model", "created": card.created, "owned_by": "tandem"}
    return {**listed, "task": card.task, "generates": card.generates, "version": card.version, **card.details}


def _model_status(card: ModelCard, replicas: list[ReplicaState], pending: int) -> dict[str, Any]:
    loads = [replica.load for replica in replicas]
    return {
        "version": card.version,
        "warning": card.details.get("warning"),
        "running": sum(load.running for load in loads),
        "queued": pending + sum(load.waiting for load in loads),
        "tokens_per_second": round(sum(load.tokens_per_second for load in loads), 1),
        "replicas": [
            {"replica_id": replica.replica_id, "version": replica.version, **asdict(replica.load)}
            for replica in replicas
        ],
    }
