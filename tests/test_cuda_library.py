"""The native library with its CUDA kernels, without a GPU: it loads, says what it has, and refuses CPU tensors."""

from __future__ import annotations

import pytest
import torch

import gtp_kernels
from gtp_kernels import TokenGraph, backends, native

pytestmark = pytest.mark.skipif(native.cuda_missing() is not None, reason=str(native.cuda_missing()))

KEY = torch._C.DispatchKey.CUDA
TOKENS = torch.zeros(1, 5, 8)
INDEX = torch.tensor([[1, 2, 3]])
LEFT = torch.tensor([[4]])
GRAPH = (
    torch.zeros(1, 5, dtype=torch.int32),
    torch.zeros(1, 0, dtype=torch.int32),
    torch.zeros(1, 0),
    torch.arange(4, dtype=torch.int32)[None],
)
CALLS = {
    "attention_with_scores": (*torch.zeros(3, 1, 1, 5, 8).half(), None, 0.6, 1.0, "official"),
    "token_importance": (*torch.zeros(3, 1, 1, 5), "MixedAttnMax", 1, "official"),
    "select_tokens": (torch.zeros(1, 4), 1, 1, "grid"),
    "propagate": (TOKENS, *GRAPH, INDEX, LEFT, None, "GraphProp", 0.1, 1),
    "residual_propagate_norm": (
        *(TOKENS, TOKENS, None, *GRAPH, INDEX, LEFT),
        *(None, None, None, 1e-6, "layer", "GraphProp", 0.1, 1),
    ),
    "select_residual_propagate_norm": (
        *(TOKENS, TOKENS, None, *GRAPH, *torch.zeros(3, 1, 1, 5), "MixedAttnMax", 1, "grid", "official"),
        *(None, None, None, 1e-6, "layer", "GraphProp", 0.1, 1),
    ),
    "build_graph": (TOKENS, 2, 2, "Mixed", 1, 1, "official"),
    "live_graph": GRAPH[:2],
    "live_select": (torch.zeros(1, 1, 5, 8), torch.zeros(1, 4), *GRAPH[:2], GRAPH[3], torch.ones(1, 5), 1, 0.25, 1),
    "live_merge": (
        *(TOKENS, TOKENS, None, INDEX, LEFT, torch.zeros_like(LEFT), torch.ones(1, 4)),
        None,
        None,
        1e-6,
        "layer",
        1,
    ),
}


def test_the_library_says_what_it_was_built_for() -> None:
    assert native.build_info()["cuda_archs"]


@pytest.mark.parametrize("name", CALLS)
def test_kernels_for_gpus_refuse_cpu_tensors(name: str) -> None:
    operator = getattr(torch.ops.gtp_kernels, name).default
    operator(*CALLS[name])  # what the CPU kernel takes
    with pytest.raises(RuntimeError, match="is not on the GPU"):
        operator._op_dk(KEY, *CALLS[name])


def test_the_forced_backend_refuses_cpu_tensors() -> None:
    with gtp_kernels.use_backend("cuda"), pytest.raises(backends.BackendError, match="GPU tensors"):
        gtp_kernels.attention_with_scores(*torch.zeros(3, 1, 1, 5, 8).half())
    with gtp_kernels.use_backend("cuda"), pytest.raises(backends.BackendError, match="GPU tensors"):
        gtp_kernels.propagate(TOKENS, TokenGraph(*GRAPH), INDEX, LEFT)
