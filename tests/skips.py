"""Every test that one way of running the suite leaves out, with the reason. What is not listed here runs.

A pattern is ``file.py::test`` or ``file.py::test[parameters]``, with ``*`` for any characters; it must match the whole
id of a test. ``test_backends.py`` fails where a pattern matches none.
"""

from __future__ import annotations

import re

INTERPRETER = "interpreter"
"""``TRITON_INTERPRET=1``: the backend ``triton`` on CPU tensors."""
GPU = "gpu"
"""The tests marked ``gpu``: the backends ``triton`` and ``cuda`` on GPU tensors."""
EMULATION = "emulation"
"""``GTP_KERNELS_EMULATE_CUDA=1``: the backend ``cuda`` on CPU tensors."""
CUDA = "cuda"
"""The backend ``cuda``, on GPU tensors and in emulation."""
CPU = "cpu"
"""Everything else: the backends ``reference`` and ``cpu``."""

# Seconds are those of two shared cores. What runs of test_patch_timm.py: a class token, none, registers, layer scale,
# norms after the branch, a grid that is not square; every option but selections; gradients, types, compilation.
_MODEL = "8 s and more; other models run the same ops"

SKIPS: dict[str, list[tuple[str, str]]] = {
    CPU: [
        (
            "test_patch_timm.py::test_compile_full_graph[reference-inductor]",
            "a minute of C++ compilation of plain PyTorch; aot_eager traces the same graph",
        ),
        ("test_patch_timm.py::test_compile_with_symbolic_sizes[reference]", "20 s; the ops' own tests compile it"),
        ("test_patch_timm_eva.py::test_compile_full_graph[reference-*]", "10 s each; those of the backend cpu run"),
    ],
    INTERPRETER: [
        ("test_export.py::*", "interpreted kernels are opaque to the compiler"),
        (
            "test_propagate.py::test_residual_step_with_many_edges_in_a_row[triton-1100-*]",
            "25 s each; rows are as long with 100 tokens",
        ),
        (
            "test_live.py::test_against_the_definition[triton-*-1-2-grid*-64-1-props*]",
            "30 s each; small tiles walk small grids in as many steps",
        ),
        *(
            (f"test_live.py::test_patched_model[triton-{model}]", _MODEL)
            for model in (
                *(f"vit-options{i}" for i in (1, 2, 3)),
                "dinov2 registers-*",
                "gap-*",
                *(f"not square-options{i}" for i in (0, 2, 3)),
            )
        ),
        ("test_live.py::test_gradients[triton]", "minutes: 500 merges; test_gradients_of_a_model runs the backward"),
        ("test_live.py::test_gradients_of_a_model[triton-dinov2 registers]", _MODEL),
        ("test_live.py::test_low_precision_weights[triton-dinov2 registers-*]", _MODEL),
        ("test_live.py::test_restored_grid_and_lineage[triton]", "its lineage is read off what the ops return"),
        *(
            (f"test_select_propagate.py::{test}", "10 s each; the launcher calls those of the three ops")
            for test in (
                "test_every_selection[triton-*]",
                "test_the_same_bits[triton-importance-*]",
                *(f"test_the_same_bits[triton-grid-*-dtype{i}]" for i in (1, 2, 3)),
                "test_two_types_and_every_norm[triton-dtypes1-*]",
                "test_many_tokens[triton-784-*]",
            )
        ),
        *(
            (f"test_patch_timm.py::test_against_plain_forward[triton-{key}]", _MODEL)
            for key in (
                "deit",
                "deit distilled",
                "dinov2",
                "clip",
                "clip quickgelu",
                "mae",
                "gap",
                "eva",
                "rms norm, swiglu",
                "registers without class token",
                "convolutional stem",
                "q/k norm, attention norm",
                "dynamic size",
            )
        ),
        *(
            (f"test_patch_timm.py::test_gradients[triton-{key}]", _MODEL)
            for key in ("deit distilled", "dinov2 registers", "clip", "res-post norm", "rms norm, swiglu")
        ),
        *(
            (f"test_patch_timm.py::{test}[triton-{key}*]", _MODEL)
            for test in ("test_low_precision_weights", "test_autocast")
            for key in ("dinov2 registers", "rms norm, swiglu")
        ),
        ("test_patch_timm.py::test_low_precision_weights[triton-res-post norm-*]", _MODEL),
        ("test_patch_timm.py::test_autocast[triton-clip]", _MODEL),
        ("test_patch_timm.py::test_autocast[triton-q/k norm, attention norm]", _MODEL),
        ("test_patch_timm.py::test_trace[triton-dinov2 registers-*]", _MODEL),
        ("test_patch_timm.py::test_trace[triton-gap-*]", _MODEL),
        ("test_patch_timm.py::test_trace[triton-vit-None]", _MODEL),
        ("test_patch_timm.py::test_a_trace_changes_no_bit[triton-*-GraphProp-*]", _MODEL),
        ("test_patch_timm.py::test_a_trace_changes_no_bit[triton-*-Mean-*]", _MODEL),
        ("test_patch_timm.py::test_a_trace_changes_no_bit[triton-dinov2 registers-None-*]", _MODEL),
        ("test_patch_timm.py::test_a_trace_changes_no_bit[triton-gap-None-*]", _MODEL),
        ("test_patch_timm.py::test_a_trace_changes_no_bit[triton-res-post norm-None-*]", _MODEL),
        ("test_patch_timm.py::test_options_against_plain_forward[triton-res-post norm-*]", _MODEL),
        (
            "test_patch_timm.py::test_options_against_plain_forward[triton-vit-{'selection': '*Attn*'}]",
            "10 s each; test_select.py has every standard",
        ),
        ("test_patch_timm.py::test_norms[triton-layernormfp32]", "10 s; the op is that of layernorm"),
        ("test_patch_timm.py::test_norms[triton-rmsnormfp32]", "10 s; the op is that of rmsnorm"),
        ("test_patch_timm.py::test_norms[triton-simplenorm]", "10 s; the op is that of rmsnorm"),
        ("test_patch_timm.py::test_dynamic_sizes[triton-size1]", "30 s; size0 and size3 run"),
        ("test_patch_timm.py::test_dynamic_sizes[triton-size2]", "30 s; size0 and size3 run"),
        ("test_patch_timm.py::test_copies_and_pickles[triton-*]", "30 s each; copies hold no kernels"),
        (
            "test_patch_timm.py::test_hooks_that_change_a_weight_are_honoured[triton]",
            "40 s; hooks are seen above the ops",
        ),
        ("test_patch_timm.py::test_random_selection_follows_the_seed[triton]", "30 s; test_select.py draws too"),
        ("test_patch_timm.py::test_dynamic_sizes_with_any_prefix[triton-*]", "30 s each; test_dynamic_sizes runs"),
        ("test_patch_timm.py::test_padded_sizes[triton]", "30 s; test_dynamic_sizes runs"),
        ("test_patch_timm.py::test_input_size_set_after_patching[triton]", "30 s; test_dynamic_sizes runs"),
        ("test_patch_timm.py::test_the_two_heads_of_a_distilled_model[triton]", _MODEL),
        ("test_patch_timm.py::test_random_selection_of_a_seed[triton]", "60 s; draws are no kernels of triton"),
        (
            "test_patch_timm.py::test_broadcasting_attention_is_image_attention[triton]",
            "20 s; test_select.py has the alias",
        ),
        (
            "test_patch_timm.py::test_a_forward_leaves_nothing_on_the_modules[triton]",
            "30 s; test_gradients runs the ops",
        ),
        ("test_patch_timm.py::test_training_mode_with_dropout[triton]", "80 s; test_gradients runs the ops"),
        ("test_patch_timm.py::test_gradient_checkpointing[triton]", "165 s; test_gradients runs the ops"),
        (
            "test_patch_timm.py::test_threads_share_one_model[triton-*]",
            "the interpreter replaces functions of triton.language while a kernel runs: one thread at a time",
        ),
        (
            "test_patch_timm.py::test_compile_full_graph[triton-inductor]",
            "interpreted kernels are opaque to the compiler: aot_eager traces the same graph",
        ),
        (
            "test_patch_timm.py::test_compile_with_symbolic_sizes[triton]",
            "120 s; test_export.py has the sizes, and the ops' tests compile them",
        ),
    ],
    GPU: [],
    EMULATION: [],
    CUDA: [
        ("test_attention.py::test_backward_matches_the_definition[cuda-*]", "it has no backward"),
        ("test_live.py::test_gradients[cuda]", "numerical gradients are of float64, which it does not take"),
        ("test_live.py::test_gradients_of_a_model[cuda-*]", "its attention has no backward"),
        ("test_patch_timm.py::test_gradients[cuda-*]", "it has no backward"),
        ("test_patch_transformers.py::test_gradients[cuda-*]", "it has no backward"),
        ("test_select_propagate.py::test_gradients_are_those_of_the_three_ops[cuda]", "it has no backward"),
    ],
}


def matches(pattern: str, test: str) -> bool:
    """Whether ``pattern`` is of ``test``, an id without its folder."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), test) is not None


def without_folder(node: str) -> str:
    """The id that patterns are about, of an id as pytest prints it."""
    file, _, test = node.partition("::")
    return f"{file.rpartition('/')[2]}::{test}"


def reason(way: str, test: str) -> str | None:
    """Why the test is left out; None where it runs."""
    return next((why for pattern, why in SKIPS[way] if matches(pattern, test)), None)
