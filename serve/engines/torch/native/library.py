"""The kernels' C functions and structs, as kernels/model.h and kernels/api.cpp define them."""

from __future__ import annotations

import ctypes
import weakref
from ctypes import POINTER, Structure, c_double, c_float, c_int, c_int32, c_size_t, c_void_p
from functools import cache
from typing import Any

import numpy as np
import torch

from serve.engines.torch.native import build

KINDS = {"bf16": 0, "int8": 1, "int4": 2}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
NORMS = {"rms": 0, "layer": 1}


class CLinear(Structure):
    _fields_ = (
        ("kind", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("data", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
    )


class CNorm(Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class CLayer(Structure):
    _fields_ = (
        *((name, CLinear) for name in ("qkv", "out", "up", "down")),
        *((name, CNorm) for name in ("before_attention", "after_attention", "before_mlp", "after_mlp")),
        *((name, c_void_p) for name in ("query_norm", "key_norm", "cosine", "sine", "keys", "values")),
        ("window", c_int32),
        ("unused", c_int32),
    )


class CModel(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "head_width")),
        *((name, c_int32) for name in ("rotary_dim", "vocabulary", "norm_kind", "activation", "gated", "unused")),
        *((name, c_float) for name in ("epsilon", "attention_scale", "attention_softcap", "logit_softcap")),
        *((name, c_float) for name in ("embedding_scale", "unused_float")),
        ("embedding", c_void_p),
        ("positions", c_void_p),
        ("final_norm", CNorm),
        ("head", CLinear),
        ("layer", POINTER(CLayer)),
    )


class CBatch(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("tokens", "sequences", "most_blocks", "wanted", "hidden_wanted", "unused")),
        *((name, c_void_p) for name in ("token", "position", "slot", "query_start", "context", "blocks")),
        *((name, c_void_p) for name in ("logits_at", "hidden_at")),
    )


@cache
def load() -> Any:
    """Return the library with its functions' types set, compiled first if need be. Raises build.BuildError."""
    library = ctypes.CDLL(str(build.library()))
    sizes = (c_int * 4)()
    library.tandem_sizes(sizes)
    expected = [ctypes.sizeof(struct) for struct in (CLinear, CLayer, CModel, CBatch)]
    assert list(sizes) == expected, f"structs of {list(sizes)} bytes in C, {expected} in Python"
    _declare(library)
    return library


def _declare(library: Any) -> None:
    functions: dict[str, tuple[Any, list[Any]]] = {
        "tandem_tiles": (c_int, []),
        "tandem_allocate": (c_void_p, [c_size_t]),
        "tandem_free": (None, [c_void_p, c_size_t]),
        "tandem_packed_bytes": (c_size_t, [c_int] * 3),
        "tandem_pack_bf16": (None, [c_void_p, *[c_int] * 4, c_void_p]),
        "tandem_pack_int8": (None, [c_void_p, *[c_int] * 4, c_void_p]),
        "tandem_pack_int4": (None, [c_void_p, c_void_p, *[c_int] * 3, c_void_p]),
        "tandem_create": (c_void_p, [POINTER(CModel), c_int]),
        "tandem_destroy": (None, [c_void_p]),
        "tandem_step": (None, [c_void_p, POINTER(CBatch), c_void_p, c_void_p]),
        "tandem_profile": (None, [c_void_p, POINTER(c_double)]),
        "tandem_read_rate": (c_double, [c_int, c_size_t, c_int]),
        "tandem_linear": (None, [POINTER(CLinear), c_void_p, *[c_int] * 3, c_void_p]),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def allocate(size_bytes: int) -> torch.Tensor:
    """Return zeros, uint8 [size_bytes], in huge pages, taken page by page when touched; freed with the tensor."""
    library = load()
    address = library.tandem_allocate(size_bytes)
    if not address:
        raise MemoryError(f"no {size_bytes:,} bytes of memory")
    array = np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))
    weakref.finalize(array, library.tandem_free, address, size_bytes)
    return torch.from_numpy(array)


def tiles() -> bool:
    """Whether AMX is there and the kernel lets this process use it."""
    return bool(load().tandem_tiles())


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Return the address of a contiguous tensor of any shape; None stays None."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def profile(engine: int) -> dict[str, float]:
    """Return and reset the engine's seconds by part."""
    seconds = (c_double * 3)()
    load().tandem_profile(engine, seconds)
    return dict(zip(("linear", "attention", "rest"), seconds, strict=True))


def read_rate(threads: int, size_bytes: int, passes: int = 5) -> float:
    """Return how many bytes per second of memory the threads can read, the best of some passes over so many bytes."""
    return float(load().tandem_read_rate(threads, size_bytes, passes))
