"""Torch and torchao still have what the adapters in jobs/checkpoint/, jobs/worker/ and serve/engines/torch/ rely on."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cluster import cuda_internals
from jobs.checkpoint import torch_internals as jobs_internals
from jobs.tasks import torch_internals as tasks_internals
from jobs.worker import torch_internals as worker_internals
from serve.engines.torch import torch_internals as serve_internals
from tests.support.contracts import Contract, binary_holds, has_attributes, source_mentions

CUDA = Contract("cluster/cuda_internals.py", cuda_internals.ENTRIES)
JOBS = Contract("jobs/checkpoint/torch_internals.py", jobs_internals.ENTRIES)
TASKS = Contract("jobs/tasks/torch_internals.py", tasks_internals.ENTRIES)
WORKER = Contract("jobs/worker/torch_internals.py", worker_internals.ENTRIES)
SERVE = Contract("serve/engines/torch/torch_internals.py", serve_internals.ENTRIES)
ROWS, WIDTH, GROUP = 3, 64, 32


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Return bf16 rows [3, 64] and an fp32 weight [32, 64]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, WIDTH, generator=generator).bfloat16(), torch.randn(32, WIDTH, generator=generator)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within what bf16 rounds: 2^-8 of the largest value, at a few places."""
    assert found.shape == expected.shape
    assert float((found.float() - expected).abs().max() / expected.abs().max()) < 0.02


@CUDA.check("torch.cuda.get_device_properties, torch.cuda.current_device")
def _asleep() -> None:
    """In a process of its own, which has not computed; with a GPU, a forked child computes on it."""
    code = (
        "import os, torch; from cluster import cuda_internals; from types import SimpleNamespace\n"
        "plain = torch.cuda.get_device_properties\n"
        "with cuda_internals._standing_in(SimpleNamespace(major=9)):\n"
        "    from torch._dynamo.device_interface import CudaInterface, caching_worker_device_properties as kept\n"
        "    assert torch.cuda.get_device_properties(1).major == 9 and torch.cuda.current_device() == 0\n"
        "    assert CudaInterface.get_device_properties is torch.cuda.get_device_properties is not plain\n"
        "    kept['cuda'] = [1]\n"
        "assert not kept\n"
        "torch.cuda._lazy_init = lambda: (_ for _ in ()).throw(KeyError('asked'))\n"
        "for ask in (CudaInterface.get_device_properties, torch.cuda.get_device_capability):\n"
        "    try: ask(0)\n"
        "    except KeyError: continue\n"
        "    raise AssertionError(ask)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    code = (
        "import os, torch; from cluster import cuda_internals\n"
        "with cuda_internals.asleep():\n"
        "    import torch.utils._triton; torch.utils._triton.has_triton()\n"
        "assert not cuda_internals.is_awake()\n"
        "if torch.cuda.device_count() and not os.fork():\n"
        "    os._exit(int(torch.ones(2, device='cuda').sum().item() != 2))\n"
        "elif torch.cuda.device_count():\n"
        "    assert os.wait()[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@CUDA.check("torch._dynamo.device_interface.caching_worker_device_properties")
def _kept() -> None:
    source_mentions("torch._dynamo.device_interface", 'caching_worker_device_properties["cuda"] = device_prop')


@JOBS.check("torch.distributed.distributed_c10d._get_default_store")
def _store() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        store = dist.PrefixStore("x", jobs_internals.group_store())
        store.set("a", "1")
        assert store.check(["a"])
        assert not store.check(["b"])
        assert bytes(store.get("a")) == b"1"
        assert store.delete_key("a")
    finally:
        dist.destroy_process_group()


@JOBS.check("THP_MEM_ALLOC_ENABLE")
def _pages() -> None:
    (name,) = jobs_internals.HUGE_PAGES
    binary_holds(next(Path(torch.__file__).parent.glob("lib/libc10.*")), name)


@TASKS.check("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, …_backward")
def _flash() -> None:
    given = [torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(at)) for at in range(4)]
    *qkv, gradient = (tensor.requires_grad_() for tensor in given)
    expected = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True, scale=0.3)
    made, sums = tasks_internals.flash_on_cpu(*(tensor.detach() for tensor in qkv), 0.3)
    torch.testing.assert_close(made, expected)
    assert sums.shape == (1, 2, 6)
    found = tasks_internals.flash_on_cpu_backward(
        gradient, *(tensor.detach() for tensor in (*qkv, made, sums)), scale=0.3
    )
    for mine, right in zip(found, torch.autograd.grad(expected, qkv, gradient), strict=True):
        torch.testing.assert_close(mine, right)


@TASKS.check("torch.ops.aten._efficient_attention_forward")
def _efficient() -> None:
    """Shapes and arguments alone, forward and backward: it runs on GPUs."""
    given = [torch.empty(6, 2, width, device="meta").requires_grad_() for width in (8, 8, 16)]
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    made = tasks_internals.efficient_of_lengths(*given, bounds, 4, dropout=0.1, scale=None)
    assert made.shape == (6, 2, 16)
    assert [each.shape for each in torch.autograd.grad(made.sum(), given)] == [each.shape for each in given]
    if torch.cuda.is_available():
        real = [torch.randn(6, 2, 8, device="cuda") for _ in range(3)]
        ends = torch.tensor([0, 4, 6, 6], dtype=torch.int32, device="cuda")
        found = tasks_internals.efficient_of_lengths(*real, ends, 6, dropout=0.0, scale=None)
        for at in (slice(0, 4), slice(4, 6)):
            piece = [tensor[at].transpose(0, 1)[None] for tensor in real]
            alone = torch.nn.functional.scaled_dot_product_attention(*piece, is_causal=True)
            torch.testing.assert_close(found[at], alone[0].transpose(0, 1))


class Seen(worker_internals.TorchDispatchMode):
    """Keeps the names of operations, and what they change."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.changed: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        self.changed += worker_internals.written(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@WORKER.check("torch.utils._python_dispatch.TorchDispatchMode")
def _dispatch() -> None:
    with Seen() as seen:
        torch.empty(2, device="meta").normal_()
    assert seen.names == ["empty", "normal_"]


@WORKER.check("torch._dynamo.callback.callback_handler")
def _compiler() -> None:
    from torch._dynamo.callback import callback_handler

    heard: list[str] = []
    worker_internals.listen_to_compiler(lambda _: heard.append("begins"), lambda _: heard.append("ends"))
    try:
        doubled = torch.compile(lambda tensor: tensor * 2, backend="eager")
        assert doubled(torch.ones(2)).tolist() == [2, 2]
        assert heard == ["begins", "ends"]
    finally:
        callback_handler.clear()


@WORKER.check("torch.utils._pytree.tree_leaves, tree_map_only")
def _trees() -> None:
    assert worker_internals.tree_leaves(([1, (2,)], {"a": 3})) == [1, 2, 3]
    assert worker_internals.tree_map_only(int, lambda n: -n, ([1, "b"], {"a": 3})) == ([-1, "b"], {"a": -3})


@WORKER.check("UntypedStorage._cdata")
def _storages() -> None:
    first, second = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    assert worker_internals.storage_key(first) == worker_internals.storage_key(torch.nn.Parameter(first)[1:].data)
    assert worker_internals.storage_key(first) != worker_internals.storage_key(second)


@WORKER.check("OpOverload._schema")
def _written() -> None:
    out, a = torch.zeros(2), torch.ones(2)
    with Seen() as seen:
        torch.add(a, a, out=out)
        a.mul_(2)
    assert [tensor is expected for tensor, expected in zip(seen.changed, [out, a], strict=True)] == [True, True]


@WORKER.check("torch.ops.aten._grouped_mm")
def _grouped() -> None:
    found = []

    class Products(worker_internals.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found.append(getattr(func, "overloadpacket", None))
            return func(*args, **(kwargs or {}))

    ends = torch.tensor([8, 16], dtype=torch.int32)
    with Products():
        torch.nn.functional.grouped_mm(torch.ones(16, 16), torch.ones(2, 16, 16), offs=ends)
    assert worker_internals.GROUPED_PRODUCT in found


@WORKER.check("ScriptObject._type")
def _collectives() -> None:
    found = []

    class Groups(worker_internals.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == "c10d":
                found.append((func.overloadpacket.__name__, worker_internals.ranks_among(args)))
            return func(*args, **(kwargs or {}))

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with Groups():
            torch.distributed.all_reduce(torch.ones(2))
            torch.distributed.broadcast(torch.ones(2), src=0)
    finally:
        torch.distributed.destroy_process_group()
    assert found == [("allreduce_", 1), ("broadcast_", 1)]


@WORKER.check("methods of torch.distributed.ProcessGroup and Work, replaced")
def _heard() -> None:
    """Each collective and each wait is heard, and none once nobody listens."""
    dist, heard, ended = torch.distributed, [], []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    one, into, many = torch.ones(2), torch.empty(2), [torch.empty(2)]
    calls = {
        "all_reduce": lambda **how: dist.all_reduce(one, **how),
        "broadcast": lambda **how: dist.broadcast(one, 0, **how),
        "reduce": lambda **how: dist.reduce(one, 0, **how),
        "all_gather": lambda **how: dist.all_gather(many, one, **how),
        "all_gather_into_tensor": lambda **how: dist.all_gather_into_tensor(into, one, **how),
        "reduce_scatter_tensor": lambda **how: dist.reduce_scatter_tensor(into, one, **how),
        "all_to_all_single": lambda **how: dist.all_to_all_single(into, one, **how),
        "barrier": lambda **how: dist.barrier(**how),
    }
    try:
        stop = worker_internals.listen_to_collectives(lambda: heard.append(1) or len(heard), ended.append)
        for name, call in calls.items():
            before = len(heard)
            call()
            assert len(heard) == before + 2, f"{name} and waiting for it"
            work = call(async_op=True)
            assert len(heard) == before + 3
            work.wait()
            assert len(heard) == before + 4
        stop()
        dist.all_reduce(one)
    finally:
        dist.destroy_process_group()
    assert ended == list(range(1, 4 * len(calls) + 1)), "each is given what began with it, and none after"


@WORKER.check("torch.nn.init._no_grad_trunc_normal_")
def _truncated() -> None:
    plain, drawn = torch.empty(1000), torch.nn.Parameter(torch.empty(1000))
    torch.nn.init.trunc_normal_(plain, 1.0, 2.0, 0.0, 3.0, torch.Generator().manual_seed(7))
    with worker_internals.truncated_whole(), Seen() as seen:
        torch.nn.init.trunc_normal_(drawn, 1.0, 2.0, 0.0, 3.0, torch.Generator().manual_seed(7))
    assert torch.equal(plain, drawn)
    assert seen.names == ["trunc_normal_"]
    assert seen.changed[0].data_ptr() == drawn.data_ptr()
    before = drawn.clone()
    torch.nn.init.trunc_normal_(drawn)  # as it was again
    assert not torch.equal(before, drawn)


@SERVE.check("torch.ops.mkldnn._is_mkldnn_bf16_supported")
def _bf16() -> None:
    assert serve_internals.packs_bf16() in (True, False)


@SERVE.check("torch.ops.mkldnn._reorder_linear_weight, _linear_pointwise")
def _packed() -> None:
    x, weight = inputs()
    has_attributes(torch.ops.mkldnn, "_reorder_linear_weight", "_linear_pointwise")
    if serve_internals.packs_bf16():
        packed = serve_internals.pack_bf16(weight.bfloat16())
        near(serve_internals.linear_packed(x, packed, torch.ones(32).bfloat16()), x.float() @ weight.T + 1)


@SERVE.check("torch._weight_int8pack_mm")
def _int8() -> None:
    x, weight = inputs()
    scale = weight.abs().amax(dim=1) / 127
    quantised = (weight / scale[:, None]).round().to(torch.int8)
    found = serve_internals.multiply_int8(x, quantised, torch.ones(32, dtype=torch.bfloat16))
    near(found.float() * scale, x.float() @ weight.T)


@SERVE.check("torch._convert_weight_to_int4pack_for_cpu, _weight_int4pack_mm_for_cpu")
def _int4() -> None:
    x, _ = inputs()
    quantised = torch.arange(32 * WIDTH).reshape(32, WIDTH) % 16
    scales = torch.stack([torch.full((2, 32), 0.5), torch.ones(2, 32)], dim=-1).bfloat16()
    packed = serve_internals.pack_int4(quantised.to(torch.int32))
    near(serve_internals.multiply_int4(x, packed, GROUP, scales), x.float() @ ((quantised - 8) * 0.5 + 1).T)


@SERVE.check("torchao's Int8Tensor (qdata, scale, zero_point, block_size)")
def _torchao() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = torch.nn.Linear(WIDTH, 32)
    weight = linear.weight.detach().clone()
    quantize_(linear, Int8WeightOnlyConfig())  # as jobs/worker/quantize.py does
    stored = serve_internals.stored_int8(linear.weight)
    assert stored is not None, f"it is a {type(linear.weight).__name__}"
    near(stored[0].float() * stored[1].reshape(-1, 1), weight)


@pytest.mark.parametrize("name", JOBS.entries)
def test_torch_for_jobs(name: str) -> None:
    JOBS.verify(name)


@pytest.mark.parametrize("name", TASKS.entries)
def test_torch_for_tasks(name: str) -> None:
    TASKS.verify(name)


@pytest.mark.parametrize("name", WORKER.entries)
def test_torch_for_recording(name: str) -> None:
    WORKER.verify(name)


@pytest.mark.parametrize("name", SERVE.entries)
def test_torch_for_the_engine(name: str) -> None:
    SERVE.verify(name)
