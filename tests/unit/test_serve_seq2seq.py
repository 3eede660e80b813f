"""The engine of encoder-decoders: answers that do not depend on the company, beams as in transformers, refusals."""

import asyncio
import math
import random

import pytest
import torch

from jobs.tasks import greedy, seq2seq_models
from serve.api import openai_api
from serve.api.body import ApiError
from serve.engines.protocol import Engine, EngineError, GenerationRequest, RequestError, ResumingEngine, SamplingParams
from serve.engines.seq2seq.engine import Seq2SeqEngine, Seq2SeqOptions
from serve.engines.seq2seq.replica import TranslatingReplica
from serve.wire import Chunk, GenerateCall, Identity, InferCall, Inferred, Opened, Refused, Tools
from tests.unit.test_jobs_seq2seq import CONFIGS, learned

GREEDY = {"temperature": 0.0, "max_tokens": 12}


@pytest.fixture(scope="module")
def task():
    return learned()


def model_of(task, architecture):
    """Random weights, large enough that the tokens of an answer differ and some end it."""
    torch.manual_seed(5)
    model = task.build(architecture, {**CONFIGS[architecture], "tie_word_embeddings": False}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in name:
                torch.nn.init.normal_(parameter, std=0.7)
    return model


def engine_of(task, architecture="t5", **options):
    options = {"max_source": 16, "max_target": 12, "max_batch": 4, **options}
    model = model_of(task, architecture)
    start = seq2seq_models.start_token(model, task.tokenizer)
    ends = seq2seq_models.end_tokens(model, task.tokenizer)
    return Seq2SeqEngine(model, task.tokenizer, start, ends, Seq2SeqOptions(**options))


def sources(task, count=7):
    words = ["one", "two", "three", "four", "five"]
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=1 + number % 4)) for number in range(count)]
    return [tuple(task.tokenizer(text)["input_ids"]) for text in texts]


async def answered(engine, source, generated=(), **params):
    request = GenerationRequest("r", source, SamplingParams(**{**GREEDY, **params}), generated=generated)
    deltas = [delta async for delta in engine.generate(request)]
    return [token for delta in deltas for token in delta.token_ids], "".join(d.text for d in deltas), deltas[-1]


def running(engine, work):
    async def run():
        await engine.start()
        try:
            return await work()
        finally:
            await engine.stop()

    return asyncio.run(run())


def expected(task, architecture, source, most=12):
    model = model_of(task, architecture)
    ids = torch.tensor([source])
    start, ends = (find(model, task.tokenizer) for find in (seq2seq_models.start_token, seq2seq_models.end_tokens))
    return greedy.decode(model, ids, torch.ones_like(ids), start, ends, most)[0]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_answers_in_company_are_those_of_the_model_alone(task, architecture):
    engine, given = engine_of(task, architecture), sources(task)

    async def work():
        async def later(number, source):
            await asyncio.sleep(0.004 * number)
            return await answered(engine, source)

        return await asyncio.gather(*(later(number, source) for number, source in enumerate(given)))

    found = running(engine, work)
    assert engine.report()["batches"] is True
    end = task.tokenizer.eos_token_id
    assert [[t for t in tokens if t != end] for tokens, _, _ in found] == [
        expected(task, architecture, source) for source in given
    ]
    for tokens, text, last in found:
        assert text == task.tokenizer.decode(tokens, skip_special_tokens=True)
        assert last.finish_reason == ("stop" if tokens[-1] == end else "length")
        assert last.completion_tokens == len(tokens)
    assert len({text for _, text, _ in found}) > 1, "answers that depend on their sources"


@pytest.mark.parametrize("architecture", CONFIGS)
def test_beams_are_those_of_transformers(task, architecture):
    engine, given = engine_of(task, architecture, max_batch=7), sources(task)

    async def work():
        beams = [answered(engine, source, num_beams=3) for source in given]
        return await asyncio.gather(*beams, answered(engine, given[0]))

    *found, plain = running(engine, work)
    model, end = model_of(task, architecture), task.tokenizer.eos_token_id
    for source, (tokens, _, last) in zip(given, found, strict=True):
        options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 12, "max_length": None}
        theirs = model.generate(torch.tensor([source]), **options)[0].tolist()[1:]
        theirs = theirs[: theirs.index(end) + 1] if end in theirs else theirs
        assert tokens == theirs
        assert last.finish_reason == ("stop" if tokens[-1] == end else "length")
    assert [token for token in plain[0] if token != end] == expected(task, architecture, given[0])


def test_a_seed_gives_the_same_text_alone_and_in_company(task):
    engine, given = engine_of(task), sources(task)
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 7}

    async def work():
        alone = await answered(engine, given[0], **options)
        others = [answered(engine, source, temperature=1.0, seed=n) for n, source in enumerate(given)]
        company, *_ = await asyncio.gather(answered(engine, given[0], **options), *others)
        other, *_ = await asyncio.gather(answered(engine, given[0], **{**options, "seed": 8}))
        return alone, company, other

    alone, company, other = running(engine, work)
    assert alone[0] == company[0]
    assert alone[0] != other[0]


def test_limits_stops_and_penalties_are_kept(task):
    engine, source = engine_of(task), sources(task)[3]

    async def work():
        whole = await answered(engine, source)
        short = await answered(engine, source, max_tokens=2)
        stopped = await answered(engine, source, stop=(whole[1][3:5],))
        banned = await answered(engine, source, logit_bias={whole[0][0]: -100.0})
        return whole, short, stopped, banned

    whole, short, stopped, banned = running(engine, work)
    assert short[0] == whole[0][:2]
    assert short[2].finish_reason == "length"
    assert stopped[1] == whole[1][: whole[1].index(whole[1][3:5])]
    assert stopped[2].finish_reason == "stop"
    assert whole[0][0] not in banned[0]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_another_replica_goes_on_where_one_was_lost(task, options):
    engine, source = engine_of(task, "marian"), sources(task)[2]

    async def work():
        whole = await answered(engine, source, **options)
        return whole, [
            await answered(engine, source, tuple(whole[0][:cut]), **options) for cut in (1, 4, len(whole[0]))
        ]

    whole, resumed = running(engine, work)
    for tokens, text, last in resumed:
        assert (tokens, text) == whole[:2]
        assert (last.finish_reason, last.completion_tokens) == (whole[2].finish_reason, len(whole[0]))
    assert isinstance(engine, ResumingEngine)
    beams = SamplingParams(temperature=0, num_beams=2)
    assert not engine.resumes(GenerationRequest("r", source, beams, generated=(5,)))


def test_who_goes_away_frees_the_rows_for_those_who_wait(task):
    engine, given = engine_of(task, max_batch=1, max_target=4000), sources(task)

    async def work():
        endless = GenerationRequest("r", given[0], SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True))
        first = engine.generate(endless)
        await anext(first)
        waiting = asyncio.create_task(answered(engine, given[1], max_tokens=3, ignore_eos=True))
        await asyncio.sleep(0.02)
        before = engine.load()
        await first.aclose()
        tokens, _, _ = await asyncio.wait_for(waiting, 10)
        return before, tokens

    before, tokens = running(engine, work)
    assert (before.running, before.waiting) == (1, 1)
    assert len(tokens) == 3


def test_what_runs_when_the_engine_stops_is_told_so(task):
    engine, source = engine_of(task, max_target=4000), sources(task)[0]

    async def work():
        stream = engine.generate(GenerationRequest("r", source, SamplingParams(max_tokens=4000, ignore_eos=True)))
        await anext(stream)
        await engine.stop()
        with pytest.raises(EngineError, match="the engine was stopped"):
            [delta async for delta in stream]
        with pytest.raises(EngineError, match="not running"):
            await answered(engine, source)
        return engine.healthy()

    assert running(engine, work) is False
    assert isinstance(engine, Engine)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_model_whose_logits_are_no_numbers_fails_the_request_alone(task, beams):
    engine, source = engine_of(task), sources(task)[0]

    async def work():
        with torch.no_grad():
            engine._model.lm_head.weight[3] = math.nan
        with pytest.raises(EngineError, match="not finite"):
            await answered(engine, source, num_beams=beams)
        return engine.healthy(), engine.load().running

    assert running(engine, work) == (True, 0)


def test_steps_that_fail_one_after_another_end_the_engine(task):
    engine, source = engine_of(task), sources(task)[0]

    async def work():
        engine._model.forward = None
        states = []
        for _ in range(3):
            with pytest.raises(EngineError, match="the engine failed in a step"):
                await answered(engine, source)
            states.append(engine.healthy())
        return states

    assert running(engine, work)[:2] == [True, True]
    assert not engine.healthy()


class Hidden(torch.nn.Module):
    """A table of positions that nobody can look into."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, *args, **kwargs):
        return self.table(*args, **kwargs)


def test_rows_that_cannot_be_at_different_places_run_by_themselves(task):
    engine, given = engine_of(task, "marian"), sources(task)
    decoder = engine._model.get_decoder()
    decoder.embed_positions = Hidden(decoder.embed_positions)

    async def work():
        return await asyncio.gather(*(answered(engine, source) for source in given))

    found = running(engine, work)
    assert engine.report()["batches"] is False
    end = task.tokenizer.eos_token_id
    assert [[t for t in tokens if t != end] for tokens, _, _ in found] == [
        expected(task, "marian", source) for source in given
    ]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"logprobs": 2}, "logprobs"),
        ({"json_schema": "{}"}, "response_format"),
        ({"grammar": "start: 1"}, "tools"),
        ({"prompt_logprobs": True}, "echo"),
        ({"num_beams": 5}, "num_beams"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature"),
        ({"num_beams": 2, "stop": ("a",)}, "stop"),
        ({"num_beams": 2, "repetition_penalty": 1.2}, "repetition_penalty"),
        ({"logit_bias": {10_000: 1.0}}, "logit_bias"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(task, params, field):
    engine = engine_of(task)
    request = GenerationRequest("r", sources(task)[0], SamplingParams(**{**GREEDY, **params}))
    with pytest.raises(RequestError) as refused:
        asyncio.run(engine.check(request))
    assert refused.value.field == field


# -- the replica ------------------------------------------------------------------------------------------------------


def replica_of(task, prefix=""):
    engine = engine_of(task)
    identity = Identity("1", None)
    return TranslatingReplica(engine, identity, {"temperature": 0.0}, prefix, task.inputs(), task.outputs())


async def collected(replica, call):
    return [message async for message in replica.generate(call)]


def told(replica, *calls):
    async def work():
        await replica.start()
        try:
            return await asyncio.gather(*(collected(replica, call) for call in calls))
        finally:
            await replica.stop()

    return asyncio.run(work())


def user(text):
    return ({"role": "user", "content": text},)


def test_the_users_message_is_the_source_with_the_models_prefix(task):
    chat, plain, ids = told(
        replica_of(task, "one "),
        GenerateCall("a", user("two three"), place="messages"),
        GenerateCall("b", "two three"),
        GenerateCall("c", tuple(task.tokenizer("one two three")["input_ids"])),
    )
    tokens = task.tokenizer("one two three")["input_ids"]
    assert isinstance(chat[0], Opened)
    assert chat[0].prompt_tokens == len(tokens)
    texts = ["".join(each.text for each in messages if isinstance(each, Chunk)) for messages in (chat, plain, ids)]
    assert len(set(texts)) == 1
    shown = expected(task, "t5", tokens)
    assert texts[0] == task.tokenizer.decode(shown, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("call", "param", "said"),
    [
        ({"prompt": ({"role": "system", "content": "Be polite."}, *user("one"))}, "messages[0]", "the role system"),
        ({"prompt": (*user("one"), {"role": "assistant", "content": "un"}, *user("two"))}, "messages[0]", "role user"),
        ({"prompt": ({"role": "assistant", "content": "un"},)}, "messages[0]", "the role assistant"),
        ({"prompt": ({"role": "user", "content": "one", "name": "Ann"},)}, "messages[0].name", "text alone"),
        ({"prompt": user(" ")}, "messages", "no text to translate"),
        ({"prompt": "one", "echo": True}, "echo", "no beginning of its answer"),
        ({"prompt": user("one"), "tools": Tools(())}, "tools", "calls no functions"),
        ({"prompt": user("one"), "template_kwargs": {"a": 1}}, "chat_template_kwargs", "no chat template"),
        ({"prompt": user("one two " * 20)}, "messages", "this model reads 16 tokens"),
        ({"prompt": user("one two " * 2000)}, "messages", "this model's context is 16 tokens"),
    ],
)
def test_what_is_more_than_one_text_is_refused_by_name(task, call, param, said):
    place = "messages" if isinstance(call["prompt"], tuple) else "prompt"
    ((refused,),) = told(replica_of(task), GenerateCall("a", place=place, **call))
    assert isinstance(refused, Refused)
    assert (refused.status, refused.param) == (400, param)
    assert said in refused.message


def test_predictions_translate_each_row(task):
    replica = replica_of(task)

    async def work(*texts):
        await replica.start()
        try:
            return [await replica.infer(InferCall("i", {"text": each})) for each in texts]
        finally:
            await replica.stop()

    found, refused, number = asyncio.run(work(["one two", b"three"], ["one", "one two " * 30], [b"\xff"]))
    assert isinstance(found, Inferred)
    sources_ = [tuple(task.tokenizer(text)["input_ids"]) for text in ("one two", "three")]
    texts = [task.tokenizer.decode(expected(task, "t5", each), skip_special_tokens=True) for each in sources_]
    assert found.predictions == [{"text": text} for text in texts]
    assert (refused.status, refused.code) == (400, "context_length_exceeded")
    assert "row 1" in refused.message
    assert "not UTF-8" in number.message
    described = replica.describe()
    assert [part["name"] for part in described["inputs"] + described["outputs"]] == ["text", "text"]


# -- requests ---------------------------------------------------------------------------------------------------------

BODY = {"model": "m", "messages": [{"role": "user", "content": "one"}]}


def test_a_request_asks_for_beams_by_name():
    assert openai_api.parse_chat({**BODY, "num_beams": 4}, "1").calls[0].sampling["num_beams"] == 4
    completion = {"model": "m", "prompt": "one", "num_beams": 2}
    assert openai_api.parse_completion(completion, "1").calls[0].sampling["num_beams"] == 2
    assert "num_beams" not in openai_api.parse_chat(BODY, "1").calls[0].sampling


@pytest.mark.parametrize(
    "more", [{"num_beams": 2, "stream": True}, {"num_beams": 2, "n": 2}, {"num_beams": 0}, {"num_beams": 65}]
)
def test_beams_that_cannot_be_are_refused(more):
    with pytest.raises(ApiError) as refused:
        openai_api.parse_chat({**BODY, **more}, "1")
    assert refused.value.param == "num_beams"


def test_another_servers_name_for_beams_says_ours():
    with pytest.raises(ApiError, match="use `num_beams`"):
        openai_api.parse_chat({**BODY, "use_beam_search": True}, "1")
