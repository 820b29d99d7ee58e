"""``python smoke.py [RELEASE]``: an installed wheel, in an environment that has no source tree. Run by matrix.py.

The ops on the native CPU kernels against the reference, a compiled op, and a patched model of two blocks, with live
edges too, traced by the compiler's front end as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

import gtp_kernels
import gtp_vit
from gtp_kernels import backends, native


def ops() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 50, 16, generator=generator)
    x = torch.randn(2, 50, 48, generator=generator)
    results = {}
    for backend in ("cpu", "reference"):
        with gtp_kernels.use_backend(backend), backends.record() as ran:
            out, scores = gtp_kernels.attention_with_scores(q, k, v, sparsity=0.6)
            kept, prop = gtp_kernels.select(scores, num_prop=7)
            graph = gtp_kernels.build_graph(x, (7, 7), num_neighbours=4)
            y, _, scales = gtp_kernels.propagate(x, graph, kept, prop, token_scales=torch.ones(2, 50))
        assert {name for _, name in ran} == {backend}, ran
        results[backend] = (out, *scores, kept, prop, graph.to_dense(), y, scales)
    for mine, definition in zip(results["cpu"], results["reference"], strict=True):
        torch.testing.assert_close(mine, definition, rtol=1e-4, atol=1e-5)
    # A compiler of C++ may be missing where a wheel is installed: this traces, and compiles nothing.
    step = torch.compile(
        lambda q: gtp_kernels.attention_with_scores(q, q, q, sparsity=0.6)[0], fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(step(q), gtp_kernels.attention_with_scores(q, q, q, sparsity=0.6)[0])


def model() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    # Layers of a size from which on they are fused.
    config = ViTConfig(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=1536, image_size=128,
        patch_size=16,
    )  # fmt: skip
    vit = ViTForImageClassification(config).eval()
    images = torch.randn(2, 3, 128, 128)
    with torch.inference_mode():
        plain = vit(images).logits
        for propagation in ("GraphProp", "LiveGraph"):
            gtp_vit.patch(vit, num_prop=3, num_neighbours=4, propagation=propagation)
            patched = vit(images).logits
            traced: set[str] = set()

            def trace(
                graph: torch.fx.GraphModule, inputs: list[object], traced: set[str] = traced
            ) -> Callable[..., object]:
                traced |= {str(node.target) for node in graph.graph.nodes}
                return graph.forward

            torch._dynamo.reset()
            compiled = torch.compile(vit, fullgraph=True, backend=trace)
            torch.testing.assert_close(compiled(images).logits, patched, rtol=1e-4, atol=1e-4)
            if torch.backends.mkldnn.is_available():
                assert any(name.startswith("gtp_vit.linear") for name in traced), traced
            with gtp_kernels.use_backend("reference"):
                torch.testing.assert_close(patched, vit(images).logits, rtol=1e-4, atol=1e-4)
            gtp_vit.unpatch(vit)
            assert torch.equal(vit(images).logits, plain)
            assert not torch.equal(patched, plain)


if __name__ == "__main__":
    release = sys.argv[1] if len(sys.argv) > 1 else torch.__version__
    assert torch.__version__.startswith(release), f"torch is {torch.__version__}, not {release}"
    assert Path(sys.prefix) in Path(gtp_kernels.__file__).parents, gtp_kernels.__file__
    assert native.missing is None, native.missing
    build = native.build_info()
    assert build, "the module _C does not load"
    ops()
    model()
    print(f"torch {torch.__version__} (CUDA {torch.version.cuda}): {build['isa']}, built for {build['torch_target']}")
