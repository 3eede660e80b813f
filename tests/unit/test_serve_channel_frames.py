"""What crosses between gateways and replicas comes out as it went in; bytes that nobody sends end in FrameError."""

from __future__ import annotations

import collections
import contextlib
import inspect
import random
from typing import Any

import msgpack
import numpy as np
import pytest

from serve import wire
from serve.channel import codec
from serve.channel.codec import CLASSES, CODES, CodecError, pack, unpack
from serve.channel.frames import HEADER_BYTES, Frame, FrameError, Kind, Splitter, decode, encode

IDENTITY = wire.Identity("3", None)
SCORED = wire.ScoredToken(b"\xff", None, ((b"a", -1.5), (b"", -2.0)), 4)
TOOLS = wire.Tools(({"name": "f", "parameters": {"enum": [1, None, [2.5]]}},), ("f",), True, "f", False)
VALUES = [
    wire.GenerateCall("r", "text \ud800 ü", {"stop": ("a", "b"), "logit_bias": {5: -1.0}, "seed": 2**63}, 7, True),
    wire.GenerateCall("r", ({"role": "user", "content": [{"type": "text"}]},), tools=TOOLS, session="s", trace="t"),
    wire.GenerateCall("r", (1, 2, 3), generated=(4, 5), place="prompt[2]"),
    wire.Opened(IDENTITY, 12),
    wire.Refused(400, "no", "invalid_value", "messages"),
    wire.InferCall("r", {"texts": ["a", ["b"]], "files": [b"\x00", b""]}),
    wire.Inferred(IDENTITY, [{"label": "a", "scores": {"a": 0.5, "b": float("inf")}, "raw": b"x", "t": (1, (2,))}]),
    wire.EmbedCall("r", ("a", (1, 2)), 8, "t", "a=1"),
]
CHUNKS = [
    wire.Chunk("hé", 3, None, ids=(1, 70_000, 3)),
    wire.Chunk("", 4, "stop", (SCORED, SCORED), (wire.CallPiece(0, "f", "{"), wire.CallPiece(0, None, "}")), (9,)),
    wire.Chunk("x", 1, "tool_calls"),
]
ARRAYS = [
    np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    np.array([[1.5, np.inf]], np.float64),
    np.array([True, False]),
    np.arange(6, dtype=">i4")[::2],
    np.empty((0, 5), np.float16),
    np.array(7.5, np.float32),
    np.array(["ab", "c"]),
    np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.ndarray((3,), "S0", b""),
    np.ndarray((2, 0), "U0", b""),
]


def crossed(content: Any) -> Any:
    body = encode(Kind.MESSAGE, 3, content)[HEADER_BYTES:]
    frame = decode(body)
    assert frame.stream == 3
    return frame.content


@pytest.mark.parametrize("value", [*VALUES, *CHUNKS], ids=lambda value: type(value).__name__)
def test_it_comes_out_as_it_went_in(value: Any) -> None:
    assert repr(crossed(value)) == repr(value)  # as equality, and lists are no tuples
    assert crossed(value) == value


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype.str}{array.shape}")
def test_arrays_keep_datatype_shape_and_values_and_may_be_written_into(array: np.ndarray) -> None:
    out = crossed(wire.InferCall("r", {"x": array})).inputs["x"]
    assert (out.dtype, out.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(out, array)
    assert out.flags.writeable


@pytest.mark.parametrize(
    "scalar", [np.float32(0.1), np.int64(-3), np.bool_(True), np.str_("é"), np.str_(""), np.float64(0.2)]
)
def test_numbers_of_numpy_stay_what_they_are(scalar: Any) -> None:
    out = crossed([scalar])[0]
    assert (type(out), out) == (type(scalar), scalar)


def anything(random_: random.Random, depth: int) -> Any:
    leaves = [None, True, 0, -1, 2**63, -(2**80), 2**64, 0.1, "ü\udcff", b"\x80", (), [], {}]
    if depth == 0 or random_.random() < 0.3:
        return random_.choice(leaves)
    inside = [anything(random_, depth - 1) for _ in range(random_.randrange(4))]
    return random_.choice([inside, tuple(inside), {str(n): each for n, each in enumerate(inside)}])


@pytest.mark.parametrize("seed", range(50))
def test_nested_values_come_out_as_they_went_in(seed: int) -> None:
    value = anything(random.Random(seed), 6)
    assert repr(unpack(pack(value))) == repr(value)


def test_classes_of_somebodys_own_over_plain_ones_become_plain() -> None:
    point = collections.namedtuple("point", "x y")
    out = crossed([collections.OrderedDict(a=1), point(1, 2)])
    assert (out, type(out[0])) == ([{"a": 1}, (1, 2)], dict)


@pytest.mark.parametrize(
    ("value", "named"), [(object(), "builtins.object"), ({1}, "set"), (np.array([None]), "array of object")]
)
def test_what_has_no_code_is_refused_by_name(value: Any, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        encode(Kind.MESSAGE, 1, wire.Inferred(IDENTITY, [{"x": value}]))


def test_every_class_that_crosses_has_a_code_and_none_has_two() -> None:
    by_the_actor = {wire.Load, wire.ReplicaState, wire.Work, wire.GatewayState, wire.Fetching}
    defined = {kind for _, kind in inspect.getmembers(wire, inspect.isclass) if kind.__module__ == wire.__name__}
    assert set(CODES) == defined - by_the_actor
    assert len(CODES) == len(CLASSES)


# -- bytes that nobody sends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_spoilt_frames_are_frames_or_errors(seed: int) -> None:
    random_ = random.Random(seed)
    body = bytearray(encode(Kind.MESSAGE, 9, random_.choice([*VALUES, *CHUNKS]))[HEADER_BYTES:])
    for _ in range(random_.randrange(1, 4)):
        body[random_.randrange(len(body))] = random_.randrange(256)
    body = body[: random_.randrange(1, len(body) + 1)]
    with contextlib.suppress(FrameError):
        assert isinstance(decode(bytes(body)), Frame)


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", pack(3), pack([1]), pack([1, 2, 3, 4]), pack(["a", 1, None]), pack([7, 1, ["too", "short"]]),
     pack([6, 1, msgpack.ExtType(99, b"")]), pack([6, 1, msgpack.ExtType(18, pack(["1"]))]),
     pack([6, 1, msgpack.ExtType(2, pack(["<f8", [2], b"1234567"]))]),
     pack([6, 1, msgpack.ExtType(2, pack(["O", [1], b"12345678"]))]), b"\x93\x06\x01\xdd\xff\xff\xff\xff"],
)  # fmt: skip
def test_hostile_frames_are_errors(body: bytes) -> None:
    with pytest.raises(FrameError):
        decode(body)


HOSTILE_SHAPES: list[Any] = [
    [-1],
    [-1, 0],
    [0, -1],
    [-2, -2],
    [1.0],
    [True],
    [None],
    "",
    {},
    None,
    3,
    [2**62, 4],
    [0] * 99,
]


@pytest.mark.parametrize("datatype", ["S0", "U0", "<f8", "<f4,", "V0", "(2,0)i4", "m8[0s]", "", [], 3, b"S0"])
@pytest.mark.parametrize("shape", HOSTILE_SHAPES, ids=repr)
@pytest.mark.parametrize("code", [codec.ARRAY, codec.SCALAR])
def test_hostile_arrays_are_errors_or_values(code: int, datatype: Any, shape: Any) -> None:
    for data in (b"", b"12345678", "", None):
        with contextlib.suppress(CodecError):
            unpack(msgpack.packb(msgpack.ExtType(code, msgpack.packb([datatype, shape, data]))))


def test_an_array_of_as_many_as_there_are_ends_no_process() -> None:
    array = msgpack.ExtType(codec.ARRAY, msgpack.packb(["S0", [-1], b""]))  # numpy would divide by the item's 0 bytes
    with pytest.raises(FrameError, match="shape"):
        decode(msgpack.packb([2, 0, array]))


@pytest.mark.parametrize("value", [*VALUES, ARRAYS[0], (1,), 2**80], ids=lambda value: type(value).__name__)
def test_from_somebody_unknown_nothing_but_plain_values_is_taken(value: Any) -> None:
    with pytest.raises(FrameError, match="extension"):
        decode(encode(Kind.PROOF, 0, value)[HEADER_BYTES:], known=False)
    plain = ["1", 2, b"3", True, None, {"4": 5.0}]
    assert decode(encode(Kind.PROOF, 0, plain)[HEADER_BYTES:], known=False) == (Kind.PROOF, 0, plain)


def test_extensions_inside_each_other_do_not_exhaust_the_stack() -> None:
    data = b"\x00"
    for _ in range(5_000):
        data = msgpack.packb(msgpack.ExtType(codec.TUPLE, data))
    with pytest.raises(CodecError, match="nested"):
        unpack(data)
    with pytest.raises(CodecError):
        unpack(b"\x91" * 100_000 + b"\x00")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_frames_are_found_however_they_were_cut(size: int) -> None:
    sent = [encode(Kind.MESSAGE, number, value) for number, value in enumerate([*VALUES, *CHUNKS])]
    stream, splitter = b"".join(sent), Splitter()
    found = [body for at in range(0, len(stream), size) for body in splitter.feed(stream[at : at + size])]
    assert found == [frame[HEADER_BYTES:] for frame in sent]


def test_a_frame_that_is_too_long_is_refused_when_it_is_announced() -> None:
    splitter = Splitter(most_bytes=100)
    assert splitter.feed(b"\x00\x00\x00\x64") == []
    assert splitter.feed(b"x" * 100) == [b"x" * 100]
    with pytest.raises(FrameError, match="101"):
        splitter.feed(b"\x00\x00\x00\x65")
