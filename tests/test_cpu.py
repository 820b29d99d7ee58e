"""The backend ``cpu`` in a process of its own: every instruction set, any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gtp_kernels
from gtp_kernels import backends

_C = pytest.importorskip("gtp_kernels._C", reason="the native module was not built")

TESTS = Path(__file__).parent


def in_a_process_of_its_own(call: str, **environment: str) -> str:
    """Runs a function of this module; returns what it printed."""
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", f"import test_cpu; test_cpu.{call}"],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def match_definitions(isa: str) -> None:
    """Tests of the ops on one instruction set, called as the functions that they are."""
    import test_attention
    import test_graph
    import test_propagate

    assert _C.build_info()["isa"] == isa
    with gtp_kernels.use_backend("cpu"), backends.record() as ran:
        for dtype in test_attention.DTYPES:
            for sparsity, semantics in ((1.0, "official"), (0.6, "official"), (0.6, "paper")):
                test_attention.test_matches_definition("cpu", dtype, sparsity, semantics)
            for num_tokens, size in ((1, 24), (17, 64), (37, 7), (197, 64), (60, 200)):
                inputs = test_attention.inputs((1, 2, num_tokens, size), dtype)
                test_attention.check_against_definition(*inputs, 0.6, "official")
            test_graph.test_matches_definition("cpu", dtype, "Mixed", "official", 1)
            for standard in ("None", "Mean", "GraphProp"):
                test_propagate.test_matches_definition("cpu", dtype, standard, False)
                for norm in ("layer", "rms"):
                    test_propagate.test_residual_step_matches_definition("cpu", dtype, norm, standard)
        test_attention.test_nan_and_infinity_stay_where_the_definition_puts_them("cpu", 0.5)
    print(isa, Counter(op for op, _ in ran))


@pytest.mark.parametrize("isa", _C.isas())
def test_ops_on_every_instruction_set(isa: str) -> None:
    printed = in_a_process_of_its_own(f"match_definitions({isa!r})", GTP_KERNELS_ISA=isa)
    assert printed.startswith(f"{isa} Counter")


def every_op() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = random(3, 2, 5, 197, 32).to(dtype)
        for sparsity in (0.6, 1.0):
            out, scores = gtp_kernels.attention_with_scores(q, k, v, random(2, 197).square(), sparsity=sparsity)
            yield from (out, *scores)
        x = random(3, 197, 384).to(dtype).requires_grad_()
        graph = gtp_kernels.build_graph(x, (14, 14))
        yield from (graph.indptr, graph.indices, graph.values)
        kept, prop = gtp_kernels.select_tokens(random(3, 196), 16)
        out, left, scales = gtp_kernels.propagate(x, graph, kept, prop, token_scales=random(3, 197))
        yield from (out, left.token, scales, *torch.autograd.grad(out.sum(), x))
        yield from gtp_kernels.residual_propagate_norm(x, x, graph, kept, prop, norm="layer")[:2]
    # So many images that their selection is shared out.
    scores = gtp_kernels.reference.AttentionScores(*random(3, 99, 12, 197))
    importance = gtp_kernels.token_importance(scores)
    yield from (importance, *gtp_kernels.select_tokens(importance, 16))


def compare_numbers_of_threads() -> None:
    """Results on 2, 3 and 64 threads, to be equal to those on one to the bit."""
    with gtp_kernels.use_backend("cpu"):
        torch.set_num_threads(1)
        expected = list(every_op())
        for threads in (2, 3, 64):
            torch.set_num_threads(threads)
            assert torch.get_num_threads() == threads
            for i, (ours, theirs) in enumerate(zip(every_op(), expected, strict=True)):
                assert torch.equal(ours, theirs), (threads, i)
            print(threads, "threads:", len(expected), "tensors")


def test_threads_follow_torch_and_do_not_change_a_bit() -> None:
    printed = in_a_process_of_its_own("compare_numbers_of_threads()")
    assert [line.split()[0] for line in printed.splitlines()] == ["2", "3", "64"]


@pytest.mark.parametrize("channels", [4, 1024])
def test_every_bfloat16(channels: int) -> None:
    """All 65,536 values plus -0, and plus each other in another order, as torch adds and rounds them."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    order = torch.randperm(2**16, generator=torch.Generator().manual_seed(0))
    x = bits.view(torch.bfloat16).view(1, -1, channels)
    every, none = torch.arange(x.shape[1])[None], torch.zeros(1, 0, dtype=torch.int64)
    for other in (torch.full_like(x, -0.0), bits[order].view(torch.bfloat16).view(x.shape)):
        with gtp_kernels.use_backend("cpu"):
            out, *_ = gtp_kernels.residual_propagate_norm(
                x, other, None, every, none, norm="none", standard="None", num_prefix=0
            )
        want = (x.float() + other.float()).bfloat16()
        number = ~want.isnan()
        assert torch.equal(~out.isnan(), number)
        assert torch.equal(out.view(torch.int16)[number], want.view(torch.int16)[number])
