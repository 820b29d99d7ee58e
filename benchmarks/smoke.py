"""``python -m benchmarks.smoke [cpu|cuda]``: every op once, forward and backward, on small odd shapes.

What ``compute-sanitizer`` watches. It checks only that nothing raises and that no NaN comes out; the tests do the rest.
Where ``GTP_KERNELS_BACKEND`` is ``cuda``, in half precision and forward only: it has nothing else.
"""

from __future__ import annotations

import sys

import torch

import gtp_kernels
from gtp_kernels import backends

HALF = torch.bfloat16


def smoke(device: torch.device, num_tokens: tuple[int, ...] = (17, 65, 197, 290)) -> int:
    """Runs every op on every count of tokens (1 + a number of image tokens that has a grid); how many calls that were.

    Raises:
        AssertionError: NaN came out.
    """
    calls, trains = 0, backends.forced() != "cuda"
    for count in num_tokens:
        width = next(w for w in range(int((count - 1) ** 0.5), 0, -1) if (count - 1) % w == 0)
        grid = ((count - 1) // width, width)
        generator = torch.Generator().manual_seed(count)
        q, k, v = torch.randn(3, 2, 2, count, 32, generator=generator).to(device, torch.float32 if trains else HALF)
        scales = 1 + torch.rand(2, count, generator=generator).to(device)
        for theta in (1.0, 0.6):
            leaves = [t.detach().requires_grad_(trains) for t in (q, k, v)]
            out, scores = gtp_kernels.attention_with_scores(leaves[0], leaves[1], leaves[2], scales, sparsity=theta)
            if trains:
                out.sum().backward()
            _no_nan(out, *scores, *(leaf.grad for leaf in leaves if leaf.grad is not None))
            calls += 1 + trains
        importance = gtp_kernels.token_importance(scores)
        kept, prop = gtp_kernels.select_tokens(importance, 5)
        x = torch.randn(2, count, 48, generator=generator).to(device)
        for graph_type in ("Spatial", "Semantic", "Mixed"):
            graph = gtp_kernels.build_graph(x, grid, graph_type, 4)
            leaf = x.detach().requires_grad_(trains)
            y, normed, _, _ = gtp_kernels.residual_propagate_norm(leaf, x, graph, kept, prop, token_scales=scales)
            if trains:
                y.sum().backward()
                _no_nan(leaf.grad)
            _no_nan(y, *(() if normed is None else (normed,)))
            calls += 2 + trains
        live = gtp_kernels.live_graph(graph)
        found = gtp_kernels.live_select(k, importance, live, 5, torch.ones_like(scales))
        leaf = x.detach().requires_grad_(trains)
        y, normed = gtp_kernels.live_merge(leaf, x, found)
        if trains:
            y.sum().backward()
            _no_nan(leaf.grad)
        _no_nan(y, normed, found.share, found.sizes)
        calls += 3 + trains
        y, _, _ = gtp_kernels.propagate(x, graph.to_dense() if trains else graph, kept, prop, token_scales=scales)
        _no_nan(y)
        calls += 3
    return calls


def _no_nan(*tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        assert tensor is not None
        assert not tensor.isnan().any(), "NaN came out"


if __name__ == "__main__":
    where = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    print(f"{smoke(where, (17,) if '--tiny' in sys.argv else (17, 65, 197, 290))} calls")
