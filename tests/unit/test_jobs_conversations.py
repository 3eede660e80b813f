"""Conversations: what is read of an example, what is refused by name, and what is learned of the rendered text."""

import datetime
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import GenerationConfig

from jobs.data import sources
from jobs.tasks import IGNORED, TaskError, TaskSetupError, generation, get
from jobs.tasks.chat_template import render
from jobs.tasks.conversations import Conversation, conversation_of, messages_of

TEXT = 'the quick brown fox jumps over the lazy dog; {"city": "Bern"} ' * 30
QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}
TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' + ARGUMENTS + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NEEDS_A_FIRST = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def trained():
    task = get("causal-lm")({"sequence_length": 256, "tokenizer": {"train": "bpe", "vocab_size": 400}})
    task.fit(task.observe([{"text": TEXT}]))
    return task.tokenizer


@pytest.fixture
def lm(trained):
    return with_template(trained)


def with_template(tokenizer, template=None, **options):
    """A task with a template of its own; None keeps ChatML."""
    import copy

    task = get("causal-lm")({"sequence_length": 256, **options})
    task.tokenizer = copy.deepcopy(tokenizer)
    if template is not None:
        task.tokenizer.chat_template = template
    return task


def learned(task, example):
    """What of an example is learned, as text."""
    labels = task.encode([example])["labels"]
    return task.tokenizer.decode(labels[labels != IGNORED])


def contents(example):
    return [(m["role"], m["content"]) for m in messages_of(example)]


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({"messages": [QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "a"},
                                                                   {"type": "text", "text": "b"}]}]},
         [("user", "q"), ("assistant", "ab")]),
        ({"messages": [QUESTION, ANSWER], "system": "s"}, [("system", "s"), ("user", "q"), ("assistant", "a")]),
        ({"system": "s", "history": [["q0", "a0"]], "instruction": "q", "input": None, "output": "a"},
         [("system", "s"), ("user", "q0"), ("assistant", "a0"), ("user", "q"), ("assistant", "a")]),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, [("user", "q"), ("assistant", "a")]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "system", "value": "s"},
                            {"from": "gpt", "value": "a"}]},
         [("user", "q"), ("system", "s"), ("assistant", "a")]),
        ({"messages": [{**QUESTION, "id": 7, "name": None, "tool_calls": []}, ANSWER], "history": [], "tools": "[]"},
         [("user", "q"), ("assistant", "a")]),
        ({"messages": json.dumps([QUESTION, ANSWER])}, [("user", "q"), ("assistant", "a")]),
    ],
)  # fmt: skip
def test_what_stands_beside_a_conversation_is_part_of_it(example, said):
    assert contents(example) == said


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "'content' holds null, not text"),
        ({"messages": [{"role": "user", "content": 3}, ANSWER]}, "'content' holds int"),
        ({"messages": [{"role": "user", "content": True}, ANSWER]}, "'content' holds bool"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "a part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": "\ud83d"}, ANSWER]}, "half of a surrogate pair"),
        ({"messages": [{**QUESTION, "mood": "sad"}, ANSWER]}, "a message has 'mood', which is not honoured"),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": None, "function_call": {"name": "f"}}]},
            "a message has 'function_call'",
        ),
        ({"messages": [QUESTION, {**ANSWER, "weight": 0.5}]}, "'weight' of a message is 0.5"),
        ({"messages": [QUESTION, {**ANSWER, "weight": 0}]}, "all answers of the conversation have weight 0"),
        ({"messages": [QUESTION, {"role": "assistant", "content": " \n"}]}, "an answer is empty"),
        ({"messages": [{"role": "human", "content": "q"}, ANSWER]}, "unknown role 'human'.*did you mean 'user'"),
        ({"messages": [{"role": "system", "content": "t"}, QUESTION, ANSWER], "system": "s"}, "something else than"),
        ({"messages": [QUESTION, ANSWER], "history": [["a", "b"]]}, "column 'history' beside a conversation"),
        ({"messages": [QUESTION, ANSWER], "images": ["x.png"]}, "column 'images' beside a conversation"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "'chosen' and 'rejected' are a preference"),
        ({"prompt": "q", "completion": "a", "label": False}, "column 'label' beside a conversation"),
        ({"messages": [QUESTION, ANSWER], "label": 0}, "column 'label' beside a conversation"),
        ({"prompt": "q", "completion": "a", "label": "False"}, "column 'label' beside a conversation"),
        ({"prompt": "q", "completion": "a", "rejected": "b"}, "column 'rejected' beside a conversation"),
        ({"instruction": "q", "output": "a", "context": "c"}, "column 'context' beside a conversation"),
        ({"instruction": "q", "input": float("nan"), "output": "a"}, "'input' holds float"),
        ({"instruction": "q", "output": 4}, "'output' holds int"),
        ({"instruction": "q", "output": "a", "history": [["only"]]}, "expected pairs"),
        ({"messages": [QUESTION, {**ANSWER, "tool_calls": [{"function": {}}]}]}, "needs a function with a name"),
        ({"messages": [QUESTION, ANSWER], "tools": "no json"}, "'tools' holds a text that is no JSON"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(example, said):
    with pytest.raises(TaskError, match=said):
        conversation_of(example)


def test_weights_say_which_answers_are_learned(lm):
    turns = [QUESTION, {**ANSWER, "content": "fox", "weight": 0}, QUESTION, {**ANSWER, "content": "dog", "train": True}]
    assert learned(lm, {"messages": turns}) == "dog<|im_end|>"
    prompt = [QUESTION, {**ANSWER, "content": "fox"}, QUESTION]
    assert learned(lm, {"prompt": prompt, "completion": [{**ANSWER, "content": "dog"}]}) == "dog<|im_end|>"


@pytest.mark.parametrize("arguments", ["c.function.arguments", "(c.function.arguments | tojson)"])
@pytest.mark.parametrize("given", ['{"city": "Bern"}', {"city": "Bern"}])
def test_calls_of_tools_are_learned_as_the_template_writes_them(trained, arguments, given):
    task = with_template(trained, TOOLS.replace("ARGUMENTS", arguments))
    call = {**CALL, "function": {"name": "weather", "arguments": given}}
    turns = [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns += [{"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"}, ANSWER]
    expected = '<call>weather {"city": "Bern"}</call><|im_end|>a<|im_end|>'
    assert learned(task, {"messages": turns, "tools": [WEATHER]}) == expected
    sharegpt = [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(CALL["function"])}]
    sharegpt += [{"from": "observation", "value": "rain"}, {"from": "gpt", "value": "a"}]
    assert learned(task, {"conversations": sharegpt, "tools": json.dumps([WEATHER])}) == expected


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({"messages": [QUESTION, {**ANSWER, "tool_calls": [CALL]}]}, "leaves out the call of 'weather' of message 2"),
        ({"messages": [QUESTION, ANSWER], "tools": [WEATHER]}, "leaves out 'tools'"),
        ({"messages": [QUESTION, {**ANSWER, "reasoning_content": "hm"}]}, "leaves out 'reasoning_content'"),
        ({"messages": [{**QUESTION, "name": "Mara"}, ANSWER]}, "leaves out 'name' of message 1"),
    ],
)
def test_what_the_template_leaves_out_is_refused(lm, example, said):
    with pytest.raises(TaskError, match=said):
        lm.encode([example])


def test_template_that_drops_a_message_is_refused(trained):
    template = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    task = with_template(trained, template)
    with pytest.raises(TaskError, match=r"leaves out the content of message 1 \(system\)"):
        task.encode([{"messages": [{"role": "system", "content": "be kind"}, QUESTION, ANSWER]}])


def test_template_that_drops_a_part_of_the_answer_is_refused(trained):
    template = (
        "{% for m in messages %}{{ m.role + m.content.split('</think>')[-1] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    turns = [QUESTION, {**ANSWER, "content": "<think>hm</think> fox"}]
    with pytest.raises(TaskError, match="leaves out a part of the answer in message 2"):
        with_template(trained, template).encode([{"messages": turns}])


def test_template_that_drops_earlier_thoughts_learns_each_answer_behind_its_own_prompt(trained):
    task = with_template(trained, THINKING)
    turns = [QUESTION, {**ANSWER, "content": "fox", "reasoning_content": "hm"}]
    turns += [QUESTION, {**ANSWER, "content": "dog", "reasoning_content": "so"}]
    first, second = render(task.tokenizer, Conversation(turns))
    assert [part.text[slice(*part.spans[0])] for part in (first, second)] == [
        "<think>hm</think>fox<|im_end|>",
        "<think>so</think>dog<|im_end|>",
    ]
    assert "hm" not in second.text, "what a server's prompt would not hold is not in the row"
    assert task.encode([{"messages": turns}])["divided"].tolist() == [1]


def test_conversation_may_begin_with_the_assistant(trained):
    turns = [{**ANSWER, "content": "fox"}, QUESTION, {**ANSWER, "content": "dog"}]
    task = with_template(trained, NEEDS_A_FIRST)
    assert learned(task, {"messages": turns}) == "fox<|im_end|>dog<|im_end|>"
    with pytest.raises(TaskError, match="refuses the conversation: roles must alternate"):
        with_template(trained, ALTERNATING).encode([{"messages": turns}])


def test_token_that_straddles_the_generation_prompt_is_learned(trained):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" \
               "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"  # fmt: skip
    task = with_template(trained, template)
    turns = [QUESTION, {**ANSWER, "content": "fox jumps"}]
    assert " fox" in [task.tokenizer.decode(t) for t in task.tokenizer("the fox")["input_ids"]], "or it tests nothing"
    assert learned(task, {"messages": turns}) == " fox jumps"
    assert task.encode([{"messages": turns}])["unended"].tolist() == [1]
    assert with_template(trained).encode([{"messages": turns}])["unended"].tolist() == [0]


def test_what_is_left_out_and_what_is_cut_is_counted(trained):
    task = with_template(trained, sequence_length=48)
    long = {"prompt": "fox " * 60, "completion": "dog"}
    cut = {"prompt": "q", "completion": "dog " * 60}
    encoded = task.encode([long, long, cut, {"prompt": "q", "completion": "a"}])
    assert (encoded["left_out"].sum(), encoded["answers_cut"].sum()) == (2, 1)
    assert len(encoded["targets"]) == 2


def test_faults_of_the_tokenizer_are_not_one_rows(trained):
    task = with_template(trained, "")
    with pytest.raises(TaskSetupError, match="no chat template"):
        task.encode([{"messages": [QUESTION, ANSWER]}])
    task = with_template(trained)
    task.tokenizer.eos_token = None
    with pytest.raises(TaskSetupError, match="no end token"):
        task.encode([{"text": "fox"}])


@pytest.mark.parametrize("turned", [False, True])
def test_each_example_has_its_own_shape(lm, turned):
    examples = [{"text": "the fox"}, {"messages": [QUESTION, ANSWER]}, {"text": "dog", "messages": None}]
    rows = lm.encode(examples[::-1] if turned else examples)
    batch = lm.collate({name: rows[name] for name in ("input_ids", "labels", "position_ids", "targets")})
    labels = [lm.tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]]
    ids = batch["input_ids"][0, : int(rows["targets"][0]) + 1]
    texts = ["dog", "the fox"] if turned else ["the fox", "dog"]
    assert lm.tokenizer.decode(ids).startswith("<|endoftext|>".join([*texts, ""]))
    assert labels[1] == "a<|im_end|>"
    assert (batch["labels"] != IGNORED).sum() == rows["targets"].sum()
    assert np.array_equal(batch["position_ids"][0], np.arange(256))


def test_text_column_that_is_named_wins(trained):
    example = {"body": "the fox", "instruction": "q", "output": "WRONG", "text": "no"}
    named = with_template(trained, text_column="body")
    assert "the fox" in named.tokenizer.decode(named.encode([example])["input_ids"][0])
    assert named.cut(example, 0.5)[0]["body"] == "the"
    assert with_template(trained).cut({"text": "no", "instruction": "q", "output": "a"}, 0.5) is None


def test_separate_documents_do_not_share_a_window(trained):
    task = with_template(trained, documents="separate", sequence_length=16)
    texts = ["the fox", "dog", "lazy " * 40]
    rows = task.encode([{"text": text} for text in texts])
    tokens = sum(len(task.tokenizer(text)["input_ids"]) for text in texts)
    assert rows["targets"].sum() == tokens, "of each document all but the first token, and its end"
    batch = task.collate(rows)
    starts = batch["position_ids"] == 0
    assert (batch["labels"][:, :-1][starts[:, 1:]] == IGNORED).all(), "no document's beginning is told by another"


def test_a_parents_generation_config_stays(trained):
    parent = GenerationConfig(eos_token_id=[1, 0, 7], do_sample=True, temperature=0.7, top_k=64, pad_token_id=3)
    child = generation.completed(parent, trained)
    assert child.eos_token_id == [1, 0, 7, trained.convert_tokens_to_ids("<|im_end|>")]
    assert (child.do_sample, child.temperature, child.top_k, child.pad_token_id) == (True, 0.7, 64, 3)
    assert generation.fresh(trained).eos_token_id == [0, 2]


def counts(task, *examples):
    """What is counted of conversations, without what is not there."""
    found = {key: int(column.sum()) for key, column in task.encode(examples).items() if key in task.counted}
    return {key: count for key, count in found.items() if count}


HI = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({"messages": [{**HI[0], "weight": 1}, HI[1]]}, "role 'user' has a weight or train that asks to learn it"),
        ({"conversations": [{"from": "human", "value": "a", "train": True}, {"from": "gpt", "value": "b"}]}, "asks to"),
        ({"messages": HI, "label": False}, "column 'label' beside a conversation is not honoured"),
        ({"messages": HI, "kto_tag": False}, "column 'kto_tag' beside"),
        ({"messages": HI, "loss_weight": 0.5}, "column 'loss_weight' beside"),
        ({"instruction": "a", "output": None}, "column 'output' holds null, and with 'instruction' it would be"),
        ({"instruction": "a", "output": None, "text": "b"}, "column 'output' holds null"),
        ({"prompt": None, "completion": "b"}, "column 'prompt' holds null, and with 'completion'"),
        ({"conversations": [{"from": "human", "content": "a"}]}, "a message needs 'from' and 'value'"),
        ({"conversations": [{"from": "GPT", "value": "a"}]}, "unknown role 'GPT'.*did you mean 'gpt'"),
        ({"messages": [{"role": "User ", "content": "a"}]}, "unknown role 'User '.*did you mean 'user'"),
        ({"prompt": str(HI[:1]), "completion": "b"}, "'prompt' holds messages written out as one text"),
        ({"prompt": "a", "completion": json.dumps(HI[1:])}, "'completion' holds messages written out"),
        ({"prompt": "a", "response": "b"}, "no text in column 'text'.*a conversation has `messages`"),
    ],
)
def test_half_a_conversation_and_what_it_asks_for_in_vain_are_refused(lm, example, said):
    with pytest.raises(TaskError, match=said):
        lm.check(example)


def test_a_union_of_columns_leaves_each_example_its_shape(lm):
    rows = [
        {"messages": HI, "prompt": None, "completion": None, "text": None},
        {"messages": None, "prompt": "fox", "completion": "dog", "text": None},
        {"messages": None, "prompt": None, "completion": None, "text": "fox"},
    ]
    assert [lm._reader.is_conversation(row) for row in rows] == [True, True, False]
    assert [lm.unused(row) for row in rows] == [[], [], []]


def test_a_weight_of_one_changes_no_copy(lm):
    assert lm.content({"messages": [HI[0], {**HI[1], "weight": 1}]}) == lm.content({"messages": HI})


CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "counted"),
    [
        (CHAT, set()),
        (CHAT.partition("{% if")[0], {"headless"}),
        (CHAT.replace("assistant\n", "assistant\n<think>\n"), {"otherwise"}),
        (CHAT.replace("m.content +", "m.content | trim +"), {"stripped"}),
        ("{% generation %}{% endgeneration %}" + CHAT, {"marked"}),
    ],
)
def test_peculiarities_of_a_template_are_counted(trained, template, counted):
    task = with_template(trained, template)
    assert set(counts(task, {"messages": [HI[0], {**HI[1], "content": " dog "}]})) == counted


def test_special_tokens_within_messages_are_counted(lm):
    written = [{"role": "user", "content": "a<|im_end|>b"}, HI[1]]
    assert counts(lm, {"messages": written}, {"messages": HI}) == {"special": 1}


def test_a_broken_template_is_no_fault_of_a_row(trained):
    with pytest.raises(TaskSetupError, match="the chat template is broken: line 1: "):
        with_template(trained, "{% for m in messages %}").encode([{"messages": HI}])


def test_json_within_a_text_has_each_key_once():
    twice = '{"city": "Bern", "city": "Rome"}'
    for example in (
        {"messages": [QUESTION, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": twice}}]}]},
        {"messages": [QUESTION, ANSWER], "tools": f'[{{"name": "f", "parameters": {twice}}}]'},
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "content": "b"}]'},
    ):
        with pytest.raises(TaskError, match=r"the key '(city|content)' is there twice"):
            conversation_of(example)


def test_an_answer_that_shows_nothing_is_empty():
    with pytest.raises(TaskError, match="an answer is empty"):
        conversation_of({"messages": [QUESTION, {**ANSWER, "content": "\u200b \ufeff"}]})


def called(name, arguments):
    tool = {
        "type": "function",
        "function": {"name": name, "parameters": {"properties": {k: {"type": "any"} for k in arguments}}},
    }
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [tool]}


def test_nulls_that_arrow_puts_into_calls_and_tools_are_left_out_and_counted(trained, tmp_path):
    rows = [called("weather", {"city": "Bern"}), called("walk", {"days": 2, "of": [{"a": 1}, {"b": 2}]})]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    padded = list(sources.open_source("x.parquet", tmp_path).examples())
    read = [conversation_of(example) for example in padded]
    assert [c.messages[1]["tool_calls"][0]["function"]["arguments"] for c in read] == [
        {"city": "Bern"},
        {"days": 2, "of": [{"a": 1}, {"b": 2}]},
    ]
    assert [list(c.tools[0]["function"]["parameters"]["properties"]) for c in read] == [["city"], ["days", "of"]]
    assert [c.padded for c in read] == [True, True]
    assert pickle.loads(pickle.dumps(padded[0])).padded
    task = with_template(trained, TOOLS.replace("ARGUMENTS", "(c.function.arguments | tojson)"))
    assert task.encode(padded)["padded"].sum() == 2
    assert "null" not in learned(task, padded[0])
    assert not conversation_of({"messages": [QUESTION, ANSWER]}).padded


def test_nulls_in_json_are_meant(tmp_path):
    row = called("weather", {"city": None})
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    as_text = [{**turn, "tool_calls": json.dumps(turn["tool_calls"])} if "tool_calls" in turn else turn
               for turn in row["messages"]]  # fmt: skip
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"messages": as_text}]), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.parquet"):
        example = next(sources.open_source(name, tmp_path).examples())
        conversation = conversation_of(example)
        assert conversation.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": None}
        assert not conversation.padded


@pytest.mark.parametrize(
    "value", [float("nan"), float("-inf"), datetime.date(2020, 1, 1), b"x", {"deep": [float("nan")]}]
)
def test_what_json_cannot_say_is_no_argument_and_no_part_of_a_tool(value):
    example = called("f", {"a": value})
    with pytest.raises(TaskError, match="the arguments of 'f' are no JSON"):
        conversation_of(example)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": value}}}
    with pytest.raises(TaskError, match="the parts of the tool 'f' are no JSON"):
        conversation_of({"messages": [QUESTION, ANSWER], "tools": [tool]})


def test_not_a_number_is_no_json_in_a_text_either():
    with pytest.raises(TaskError, match="NaN is no number"):
        conversation_of(called("f", '{"a": NaN}'))
