"""The CPU kernels through the pybind11 module ``_C``, over NumPy arrays: no dispatcher, every instruction set.

Each definition below is written once more in float64 NumPy, independent of ``gtp_kernels.reference``.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest

import gtp_kernels
from gtp_kernels import native

_C = pytest.importorskip("gtp_kernels._C", reason="the native module was not built")

ISAS = _C.isas()
# Rounding of sums of up to 257 float32 terms; float64 far below; float16 rounds its output once.
RTOL = {"float16": 2e-3, "float32": 3e-5, "float64": 1e-12}


@pytest.fixture(params=ISAS)
def isa(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def softmax_map(q, k, token_scales=None, scale=None):
    """The map as float32 or float64 NumPy computes it; what the threshold sees is compared by count and value."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    s = q @ np.swapaxes(k, -1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if token_scales is not None:
        with np.errstate(divide="ignore"):
            s = s + np.log(token_scales.astype(np.float64))[:, None, None, :]
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def threshold_rank(n, sparsity, semantics):
    if semantics == "official":
        return int(n * n * (1 - sparsity))
    rank = n * n - math.ceil(sparsity * n * n) + 1
    return 0 if rank <= 1 else rank


def masked(p, sparsity, semantics):
    rank = threshold_rank(p.shape[-1], sparsity, semantics)
    if rank == 0:
        return p
    flat = np.sort(p.reshape(*p.shape[:2], -1), axis=-1)
    return np.where(p < flat[..., rank - 1][..., None, None], 0.0, p)


def qkv(rng, b, h, n, d, dtype="float32"):
    return rng.standard_normal((3, b, h, n, d)).astype(dtype)


def rows(scores, p):
    diag, colsum, cls_row = scores
    yield diag, np.diagonal(p, axis1=-2, axis2=-1)
    yield colsum, p.sum(-2)
    yield cls_row, p[:, :, 0]


# --- build ------------------------------------------------------------------------------------------------------------


def test_the_module_is_the_one_meant():
    """``make sanitize`` names the folder of its own build: with any other module it would find nothing."""
    meant = os.environ.get("GTP_TESTED_FOLDER", gtp_kernels.__path__[0])
    assert os.path.dirname(_C.__file__) == meant
    assert os.path.dirname(native.LIBRARY) == meant


def test_build_info_says_what_was_built():
    info = _C.build_info()
    assert set(info) == {"version", "compiler", "isas", "isa", "cuda_archs", "torch_target"}
    assert info["isa"] in ISAS
    assert set(ISAS) <= set(info["isas"])
    assert info["torch_target"] == "2.11"


@pytest.mark.parametrize("name", ["avx9", "AVX2"])
def test_an_unknown_instruction_set_is_an_error(name):
    code = "import gtp_kernels, gtp_kernels._C as c; c.build_info()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "GTP_KERNELS_ISA": name}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert f"GTP_KERNELS_ISA is '{name}'" in done.stderr
    assert "'baseline'" in done.stderr


def test_the_variable_forces_an_instruction_set():
    code = "import gtp_kernels, gtp_kernels._C as c; print(c.build_info()['isa'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "GTP_KERNELS_ISA": "baseline"}, capture_output=True, text=True
    )
    assert done.stdout.split()[-1] == "baseline"


# --- attention --------------------------------------------------------------------------------------------------------


def with_map(q, k, token_scales=None, sparsity=1.0, semantics="official", **options):
    """(the masked map itself, scores): q and k padded with zeros to d = N or more, and v the identity."""
    b, h, n, d = q.shape
    size = max(n, d)
    pad = ((0, 0),) * 3 + ((0, size - d),)
    v = np.broadcast_to(np.eye(n, size, dtype=q.dtype), (b, h, n, size))
    out, *scores = _C.attention_with_scores(
        np.pad(q, pad), np.pad(k, pad), v, token_scales, sparsity, d**-0.5, semantics, **options
    )
    return out[..., :n], scores


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 16, 63, 65, 197])
def test_attention_without_threshold(rng, isa, dtype, n):
    for d in (1, 20, 64):
        q, k, v = qkv(rng, 2, 3, n, d, dtype)
        wide = dtype == "float64"
        scales = rng.uniform(0.5, 4, (2, n)).astype("float64" if wide else "float32")
        out, *scores = _C.attention_with_scores(q, k, v, scales, isa=isa)
        p = softmax_map(q, k, scales)
        np.testing.assert_allclose(out, p @ v.astype(np.float64), rtol=RTOL[dtype], atol=RTOL[dtype])
        for got, want in rows(scores, p):
            assert got.dtype == (np.float64 if wide else np.float32)
            np.testing.assert_allclose(
                got, want, rtol=RTOL["float64" if wide else "float32"], atol=1e-14 if wide else 1e-6
            )
        assert np.transpose(out, (0, 2, 1, 3)).flags.c_contiguous


@pytest.mark.parametrize("force_miss", [False, True])
@pytest.mark.parametrize("semantics", ["official", "paper"])
@pytest.mark.parametrize("sparsity", [1e-18, 0.05, 0.6, 0.9999, 1 - 1e-12])  # ranks 0 and N * N among them
def test_threshold_keeps_the_documented_number(rng, isa, sparsity, semantics, force_miss):
    sizes = [(1, "float32"), (3, "float64"), (5, "float32"), (15, "float32"), (33, "float64"), (64, "float32")]
    for n, dtype in [*sizes, (65, "float32"), (197, "float32")]:
        q, k, _ = qkv(rng, 1, 2, n, min(n, 5), dtype)
        full, _ = with_map(q, k, isa=isa)
        p, scores = with_map(q, k, None, sparsity, semantics, force_miss=force_miss, isa=isa)
        np.testing.assert_allclose(full, softmax_map(q, k), rtol=1e-5, atol=1e-9)
        # The definition applied to the very values that the kernel saw: equal to the bit.
        np.testing.assert_array_equal(p, masked(full, sparsity, semantics))
        np.testing.assert_array_equal(scores[0], np.diagonal(p, axis1=-2, axis2=-1))
        np.testing.assert_array_equal(scores[2], p[:, :, 0])
        np.testing.assert_allclose(scores[1], p.sum(-2, dtype=np.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("force_miss", [False, True])
def test_maps_of_many_tokens_are_computed_again(rng, isa, force_miss):
    n = 1543  # beyond the 1,536 up to which the map is kept
    q, k, v = qkv(rng, 1, 1, n, 8)
    full = softmax_map(q, k)
    out, *scores = _C.attention_with_scores(q, k, v, None, 0.6, force_miss=force_miss, isa=isa)
    threshold = np.sort(full.reshape(-1))[threshold_rank(n, 0.6, "official") - 1]
    unsure = np.where(np.abs(full - threshold) < 1e-5 * threshold, full, 0)
    p = np.where(full < threshold, 0, full)
    for (ours, want), (_, slack) in zip(rows(scores, p), rows(scores, unsure), strict=True):
        assert (np.abs(ours - want) <= 1e-5 * want + 1e-9 + slack).all()
    assert (np.abs(out - p @ v) <= 1e-5 + unsure @ np.abs(v)).all()
    # Some hundred of the 2,380,849 values are too close to T to tell, not more.
    assert 0 < (unsure > 0).sum() < 1000


@pytest.mark.parametrize("force_miss", [False, True])
@pytest.mark.parametrize("n", [7, 66, 130])
def test_threshold_among_ties(rng, isa, n, force_miss):
    """q = 0: the map is s_j / sum(s) in every row, so that each value stands in it at least N times."""
    q = np.zeros((1, 1, n, 4), "float32")
    for scales in (np.ones(n), np.arange(n) % 4, rng.integers(0, 2, n), rng.integers(1, 100, n)):
        if not scales.any():
            continue
        scales = scales[None].astype("float32")
        full, _ = with_map(q, q, scales, isa=isa)
        assert not np.isnan(full).any()
        for sparsity in (0.01, 0.3, 0.5, 0.75, 0.99):
            p, _ = with_map(q, q, scales, sparsity, force_miss=force_miss, isa=isa)
            np.testing.assert_array_equal(p, masked(full, sparsity, "official"))


def test_threshold_of_skewed_maps(rng, isa):
    """Rows of very different sharpness, in blocks: what a sample of one vector per row sees worst."""
    n = 197
    q, k, _ = qkv(rng, 1, 3, n, 8)
    q[:, :, : n // 2] *= 40
    q[:, 1, ::3] = 0
    k[:, 2, :100] += 3
    full, _ = with_map(q, k, isa=isa)
    for sparsity in (0.02, 0.25, 0.6, 0.97):
        p, _ = with_map(q, k, None, sparsity, isa=isa)
        np.testing.assert_array_equal(p, masked(full, sparsity, "official"))


def extreme_maps(dtype):
    """Name: (q, k, token_scales), for 70 tokens. The logits are exact in any order of summation."""
    n, wide = 70, dtype == "float64"
    j = np.arange(n)
    q, k = np.zeros((2, 1, 1, n, 4), dtype)

    def along_first_axis(queries, keys):
        a, b = q.copy(), k.copy()
        a[..., 0], b[..., 0] = queries, keys
        return a, b, None

    yield "all equal", (q, k, None)
    yield "one huge value", along_first_axis(j == 5, 160 * (j == 9))
    one_hot = np.eye(64, dtype=dtype)[j % 64][None, None]
    yield "one huge value in every row", (one_hot, 640 * one_hot, None)
    yield "subnormal and zero", along_first_axis(1 + j % 3, -(22 if wide else 3) * j)
    yield "subnormal inputs", along_first_axis(2.0 ** (-1030 if wide else -130), 2.0 ** (1015 if wide else 121) * j)
    keys = np.where(j == 3, np.inf, j % 4)
    yield "infinite key", along_first_axis(np.where(j < 10, 1, -1), keys)
    yield "infinite queries", along_first_axis(np.where(j % 7 == 0, -np.inf, j % 5), 1 + j % 2)
    yield "NaN key", along_first_axis(j % 3, np.where(j == 3, np.nan, j % 4))
    yield "NaN queries", along_first_axis(np.where(j % 9 == 0, np.nan, j % 3), j % 4)
    scales = np.where(j % 5 == 0, 0, np.where(j % 5 == 1, 1e-40, np.where(j % 5 == 2, 1e38, 1.5 + j)))
    yield "scales from nothing to 1e38", (*along_first_axis(j % 3, j % 4)[:2], scales[None].astype("float32"))
    yield "infinite scale", (q, k, np.where(j == 3, np.inf, 1)[None].astype("float32"))


@pytest.mark.parametrize("force_miss", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name, _ in extreme_maps("float32")])
def test_extreme_maps(isa, name, dtype, force_miss):
    q, k, scales = dict(extreme_maps(dtype))[name]
    full, _ = with_map(q, k, scales, isa=isa)
    with np.errstate(invalid="ignore", divide="ignore"):
        want = softmax_map(q, k, scales)
    tiny = 8 * np.finfo(dtype).smallest_subnormal
    # A logarithm of 1e38 is 87: its rounding is a relative error of the weights.
    rtol = (1e-12 if dtype == "float64" else 1e-5) if scales is None else 3e-5
    np.testing.assert_allclose(full, want, rtol=rtol, atol=tiny)
    for semantics in ("official", "paper"):
        for sparsity in (1e-18, 0.02, 0.3, 0.6, 0.97, 1 - 1e-12):
            p, scores = with_map(q, k, scales, sparsity, semantics, force_miss=force_miss, isa=isa)
            np.testing.assert_array_equal(p, masked(full, sparsity, semantics))
            for got, expected in zip(
                scores, (np.diagonal(p[0, 0]), p[0, 0].sum(0, dtype="float64"), p[0, 0, 0]), strict=True
            ):
                np.testing.assert_allclose(got[0, 0], expected, rtol=1e-5, atol=tiny)


def clear_sparsity(p):
    """One whose threshold lies above the widest gap of the middle of one map: rounding does not move it."""
    flat = np.sort(p.ravel())
    low, high = 2 * flat.size // 5, 3 * flat.size // 5
    rank = low + 2 + int(np.argmax(flat[low + 1 : high] / flat[low : high - 1]))
    return 1 - (rank + 0.5) / flat.size


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("d", [8, 9, 16, 17, 24, 31, 40, 48, 63, 65, 80, 96, 127, 128, 160, 192, 255, 256])
def test_head_sizes(rng, isa, dtype, d):
    for n in (1, 5, 37):
        q, k, v = qkv(rng, 1, 1, n, d, dtype)
        full = softmax_map(q, k)
        for sparsity in (1.0, clear_sparsity(full)) if n > 1 else (1.0, 0.5):
            out, *scores = _C.attention_with_scores(q, k, v, None, sparsity, isa=isa)
            p = masked(full, sparsity, "official")
            np.testing.assert_allclose(out, p @ v.astype(np.float64), rtol=RTOL[dtype], atol=RTOL[dtype])
            for got, want in rows(scores, p):
                np.testing.assert_allclose(got, want, rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_values_that_are_not_finite_reach_every_row(rng, isa, sparse):
    """0 times infinity is NaN, as in the definition: a weight below the threshold still multiplies its value."""
    q, k, v = qkv(rng, 1, 1, 37, 24)
    v[0, 0, 5, 2] = np.nan
    v[0, 0, 7, 3] = np.inf
    v[0, 0, [8, 9], 4] = np.inf, -np.inf
    v[0, 0, 10] = 1e-42
    full = softmax_map(q, k)
    sparsity = clear_sparsity(full) if sparse else 1.0
    with np.errstate(invalid="ignore"):
        want = np.einsum("bhij,bhjd->bhid", masked(full, sparsity, "official"), v.astype(np.float64))
    out = _C.attention_with_scores(q, k, v, None, sparsity, isa=isa)[0]
    np.testing.assert_allclose(out, want, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("force_miss", [False, True])
def test_nan_counts_as_the_largest_value_and_stays(rng, isa, force_miss):
    n = 70
    q, k, _ = qkv(rng, 1, 1, n, 4)
    q[0, 0, :10] = np.nan
    full, _ = with_map(q, k, isa=isa)
    assert np.isnan(full[0, 0, :10]).all()
    assert not np.isnan(full[0, 0, 10:]).any()
    for sparsity in (0.1, 0.5, 0.9):  # with 0.1 the threshold itself is NaN, below which nothing is
        p, _ = with_map(q, k, None, sparsity, force_miss=force_miss, isa=isa)
        rank = threshold_rank(n, sparsity, "official")
        threshold = np.sort(full.ravel())[rank - 1]  # NumPy sorts NaN last
        np.testing.assert_array_equal(p, np.where(full < threshold, 0, full))


def test_infinite_logits_are_those_of_softmax(isa):
    n = 20
    q = np.ones((1, 1, n, 1), "float32")
    k = np.zeros((1, 1, n, 1), "float32")
    k[0, 0, 3] = -np.inf
    p, _ = with_map(q, k, isa=isa)
    np.testing.assert_allclose(p[0, 0, :, 3], 0)
    np.testing.assert_allclose(p[0, 0, :, 4], 1 / (n - 1), rtol=1e-6)
    k[0, 0, 3] = np.inf
    assert np.isnan(with_map(q, k, isa=isa)[0]).all()
    assert np.isnan(with_map(q, 0 * q, np.zeros((1, n), "float32"), isa=isa)[0]).all()


def test_exp_is_within_two_ulp(isa):
    """Keys 0 and 1 against queries -x, every other key scaled away: p_1 is exp(-x) / (1 + exp(-x))."""
    size = 201
    x = np.random.default_rng(0).permutation(np.linspace(0, 104, 10 * size, dtype="float32"))
    q = -x.reshape(10, 1, size, 1)
    k = np.zeros_like(q)
    k[:, :, 1] = 1
    scales = np.zeros((10, size), "float32")
    scales[:, :2] = 1
    p, _ = with_map(q, k, scales, isa=isa)
    e = np.exp(q[..., 0].astype(np.float64))
    want = e / (1 + e)
    # Two ulp of exp, and one each of the sum, the reciprocal and the product.
    error = np.abs(p[..., 1] - want) / np.spacing(want.astype("float32"))
    assert error.max() <= 5


def test_any_strides(rng, isa):
    q, k, v = qkv(rng, 2, 3, 37, 16)
    want = _C.attention_with_scores(q, k, v, None, 0.6, isa=isa)
    views = (
        np.ascontiguousarray(q.transpose(3, 2, 0, 1)).transpose(2, 3, 1, 0),
        np.ascontiguousarray(k[:, :, ::-1])[:, :, ::-1],
        np.repeat(v, 2, axis=3)[..., ::2],
    )
    for got, expected in zip(_C.attention_with_scores(*views, None, 0.6, isa=isa), want, strict=True):
        np.testing.assert_array_equal(got, expected)


def gradients(grad_out, q, k, v, token_scales, dropped):
    """The definition in float64; `dropped` is the complement of the mask [B, H, N, N]."""
    grad_out, q, k, v = (x.astype(np.float64) for x in (grad_out, q, k, v))
    scale = q.shape[-1] ** -0.5
    with np.errstate(invalid="ignore"):
        p = softmax_map(q, k, token_scales)
        grad = np.where(dropped, 0, grad_out @ np.swapaxes(v, -1, -2))
        steps = p * (grad - (p * grad).sum(-1, keepdims=True)) * scale
        transposed = np.swapaxes(steps, -1, -2)
        return steps @ k, transposed @ q, np.swapaxes(np.where(dropped, 0, p), -1, -2) @ grad_out


def dropped_by(q, k, token_scales, sparsity, semantics, isa):
    """What the kernel's own map drops: an entry within rounding of the threshold may fall on either side of it."""
    wide = [x.astype("float64" if x.dtype == np.float64 else "float32") for x in (q, k)]
    full, _ = with_map(*wide, token_scales, isa=isa)
    rank = threshold_rank(q.shape[2], sparsity, semantics)
    if rank == 0:
        return np.zeros(full.shape, bool)
    # NumPy sorts NaN last, and nothing is below a threshold that is NaN.
    return full < np.sort(full.reshape(*full.shape[:2], -1), axis=-1)[..., rank - 1][..., None, None]


def check_gradients(isa, grad_out, q, k, v, token_scales, sparsity, semantics="official", **options):
    got = _C.attention_with_scores_backward(
        grad_out, q, k, v, token_scales, sparsity, None, semantics, isa=isa, **options
    )
    dropped = dropped_by(q, k, token_scales, sparsity, semantics, isa)
    for ours, want in zip(got, gradients(grad_out, q, k, v, token_scales, dropped), strict=True):
        assert ours.dtype == q.dtype
        assert ours.flags.c_contiguous
        # Sums of terms of either sign: the error follows the largest gradients.
        largest = np.abs(want[np.isfinite(want)]).max(initial=0)
        np.testing.assert_allclose(ours, want, rtol=RTOL[q.dtype.name], atol=RTOL[q.dtype.name] * largest)
    return got


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("n", [1, 5, 17, 63, 197, 257])
@pytest.mark.parametrize("d", [8, 24, 64, 80])
def test_attention_backward(rng, isa, dtype, n, d):
    q, k, v = qkv(rng, 2, 2, n, d, dtype)
    grad_out = rng.standard_normal(q.shape).astype(dtype)
    scales = rng.uniform(0.5, 4, (2, n)).astype("float64" if dtype == "float64" else "float32")
    check_gradients(isa, grad_out, q, k, v, scales, 1.0)
    check_gradients(isa, grad_out, q, k, v, None, 0.6, "paper")
    for sparsity in (0.6, 0.001):
        for force_miss in (False, True):
            check_gradients(isa, grad_out, q, k, v, scales, sparsity, force_miss=force_miss)


@pytest.mark.parametrize("n", [1537, 1543])
@pytest.mark.parametrize("sparsity", [1.0, 0.6])
def test_attention_backward_computes_the_rows_of_many_tokens_again(rng, isa, n, sparsity):
    q, k, v = qkv(rng, 1, 1, n, 8)
    grad_out = rng.standard_normal(q.shape).astype("float32")
    scales = rng.uniform(0.5, 4, (1, n)).astype("float32")
    check_gradients(isa, grad_out, q, k, v, scales, sparsity)


@pytest.mark.parametrize("force_miss", [False, True])
@pytest.mark.parametrize("n", [7, 66, 130])
def test_attention_backward_keeps_ties(rng, isa, n, force_miss):
    q = np.zeros((1, 1, n, 4), "float32")
    k, v, grad_out = qkv(rng, 1, 1, n, 4)
    for scales in (np.ones(n), 1 + np.arange(n) % 3):
        scales = scales[None].astype("float32")
        kept = []
        for sparsity in (0.99, 0.5, 0.01):
            grad_q, grad_k, grad_v = check_gradients(isa, grad_out, q, k, v, scales, sparsity, force_miss=force_miss)
            assert np.abs(grad_q).max() > 0
            assert not grad_k.any()
            kept.append(int((np.abs(grad_v).max(-1) > 0).sum()))
        assert kept[0] == n
        assert (kept[2] == n) == bool((scales == 1).all())


@pytest.mark.parametrize("sparsity", [1.0, 0.9, 0.5, 0.1])  # with 0.1 the threshold is NaN: it drops nothing
@pytest.mark.parametrize("force_miss", [False, True])
def test_nan_and_infinity_reach_the_gradients_that_they_should(rng, isa, sparsity, force_miss):
    n = 70
    q, k, v = qkv(rng, 1, 2, n, 20)
    grad_out = rng.standard_normal(q.shape).astype("float32")
    q[0, 0, :10] = np.nan
    grad_out[0, 1, 5] = np.inf
    grad_q, grad_k, grad_v = check_gradients(isa, grad_out, q, k, v, None, sparsity, force_miss=force_miss)
    assert np.isnan(grad_q[0, 0, :10]).all()
    assert np.isfinite(grad_q[0, 0, 10:]).all()
    assert np.isnan(grad_v[0, 0]).all()  # a map that is NaN stays
    assert np.isnan(grad_k[0]).all()
    assert np.isnan(grad_q[0, 1, 5]).all()
    assert np.isfinite(np.delete(grad_q[0, 1], 5, 0)).all()


def test_backward_of_any_strides(rng, isa):
    for dtype in ("float16", "float32", "float64"):
        q, k, v = qkv(rng, 2, 3, 37, 16, dtype)
        grad_out = rng.standard_normal(q.shape).astype(dtype)
        want = _C.attention_with_scores_backward(grad_out, q, k, v, None, 0.6, isa=isa)
        views = (
            np.ascontiguousarray(grad_out.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
            np.ascontiguousarray(q.transpose(3, 2, 0, 1)).transpose(2, 3, 1, 0),
            np.ascontiguousarray(k[:, :, ::-1])[:, :, ::-1],
            np.repeat(v, 2, axis=3)[..., ::2],
        )
        strided = [np.ascontiguousarray(x.transpose(3, 2, 0, 1)).transpose(2, 3, 1, 0) for x in (grad_out, q, k, v)]
        for arrays in (views, strided):
            got = _C.attention_with_scores_backward(*arrays, None, 0.6, isa=isa)
            for ours, expected in zip(got, want, strict=True):
                np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("threads", [2, 3, 64])
def test_threads_do_not_change_a_bit(rng, isa, threads):
    q, k, v = qkv(rng, 3, 5, 70, 16)
    x = rng.standard_normal((3, 1 + 36, 300)).astype("float32")
    graph = csr(x, 6, 6)
    kept, prop = _C.select_tokens(rng.standard_normal((3, 36)), 9)
    scales = rng.uniform(1, 2, (3, 37)).astype("float32")
    grad = rng.standard_normal((3, 28, 300)).astype("float32")

    def everything(threads):
        yield from _C.attention_with_scores(q, k, v, None, 0.6, threads=threads, isa=isa)
        yield from _C.attention_with_scores_backward(v, q, k, v, None, 0.6, threads=threads, isa=isa)
        yield from _C.build_graph(x, 6, 6, threads=threads, isa=isa)
        yield from _C.residual_propagate_norm(x, x, None, graph, kept, prop, scales, threads=threads, isa=isa)
        yield _C.propagate_backward(grad, graph, kept, prop, threads=threads, isa=isa)
        yield from _C.propagate_dense(x, rng_weight, kept, prop, scales, threads=threads, isa=isa)

    rng_weight = rng.standard_normal((3, 36, 36)).astype("float32")
    for one, many in zip(everything(1), everything(threads), strict=True):
        np.testing.assert_array_equal(one, many)


# --- importance and selection -----------------------------------------------------------------------------------------

STANDARDS = {
    "CLSAttn": lambda diag, colsum, cls_row, over: over(cls_row),
    "IMGAttn": lambda diag, colsum, cls_row, over: over(colsum),
    "DiagAttn": lambda diag, colsum, cls_row, over: over(diag),
    "MixedAttn": lambda diag, colsum, cls_row, over: over(diag) * over(colsum),
    "SumAttn": lambda diag, colsum, cls_row, over: over(diag) + over(colsum),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("semantics", ["official", "paper"])
def test_importance(rng, dtype, semantics):
    diag, colsum, cls_row = rng.uniform(0, 1, (3, 2, 5, 9)).astype(dtype)
    colsum[1, 2, 4] = np.nan
    for name, formula in STANDARDS.items():
        for aggregate, over in (("Mean", np.mean), ("Max", np.max)):
            if name + aggregate == "SumAttnMean":
                continue
            got = _C.token_importance(diag, colsum, cls_row, name + aggregate, 2, semantics)
            psi = colsum - diag if semantics == "paper" else colsum
            want = formula(diag, psi, cls_row, lambda t, over=over: over(t, axis=1))[:, 2:]
            np.testing.assert_allclose(got, want, rtol=RTOL[dtype])
            assert got.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_selection_fixes_ties_and_nan(dtype):
    nan, inf = np.nan, np.inf
    importance = np.array([[2, nan, 0.0, -inf, -0.0, nan, 2, inf]], dtype)
    falling = [7, 0, 6, 2, 4, 3, 1, 5]
    for num_prop in range(9):
        kept, prop = _C.select_tokens(importance, num_prop, 3, "importance")
        assert (kept[0] - 3).tolist() == falling[: 8 - num_prop]
        assert (prop[0] - 3).tolist() == falling[8 - num_prop :]
        kept, prop = _C.select_tokens(importance, num_prop, 3, "grid")
        assert (kept[0] - 3).tolist() == sorted(falling[: 8 - num_prop])
        assert (prop[0] - 3).tolist() == sorted(falling[8 - num_prop :])


# --- graph ------------------------------------------------------------------------------------------------------------


def csr(x, height, width, **options):
    indptr, indices, values = _C.build_graph(x, height, width, **options)
    token = np.tile(np.arange(height * width, dtype="int32"), (x.shape[0], 1))
    return indptr, indices, values, token


def dense(graph):
    indptr, indices, values, token = graph
    n = indptr.shape[1] - 1
    full = np.zeros((len(indptr), n, n))
    for b, weights in enumerate(full):
        for i in range(n):
            row = slice(indptr[b, i], indptr[b, i + 1])
            assert (np.diff(indices[b, row]) > 0).all()
            weights[i, indices[b, row]] = values[b, row]
    return np.stack([w[np.ix_(t, t)] for w, t in zip(full, token, strict=True)])


def adjacency(x, height, width, graph_type, neighbours):
    n = height * width
    a = np.zeros((len(x), n, n), bool)
    y, u = np.divmod(np.arange(n), width)
    if graph_type != "Semantic":
        a |= (abs(y[:, None] - y) <= 1) & (abs(u[:, None] - u) <= 1) & ~np.eye(n, dtype=bool)
    if graph_type != "Spatial":
        x = x[:, -n:].astype(np.float64)
        unit = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        similarity = unit @ unit.transpose(0, 2, 1)
        for b in range(len(x)):
            for i in range(n):
                others = [j for j in range(n) if j != i]
                a[b, i, sorted(others, key=lambda j: (-similarity[b, i, j], j))[:neighbours]] = True
    return a


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("graph_type", ["Spatial", "Semantic", "Mixed"])
@pytest.mark.parametrize(("height", "width", "m"), [(1, 1, 0), (1, 7, 2), (5, 3, 8), (6, 6, 0), (7, 5, 3)])
def test_graph(rng, isa, dtype, graph_type, height, width, m):
    n = height * width
    for prefix, semantics in ((0, "official"), (0, "paper"), (2, "official")):
        x = rng.standard_normal((2, n + prefix, 19)).astype(dtype)
        neighbours = min(m + (prefix == 0 and semantics == "official"), n - 1)
        graph = csr(
            x, height, width, graph_type=graph_type, num_neighbours=m, num_prefix=prefix, semantics=semantics, isa=isa
        )
        a = adjacency(x, height, width, graph_type, neighbours)
        degree = a.sum(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            want = a / np.sqrt(degree[:, :, None] * degree[:, None, :])
        np.testing.assert_allclose(dense(graph), np.nan_to_num(want, posinf=0), rtol=1e-6)
        grid = int(adjacency(x, height, width, "Spatial", 0)[0].sum())
        capacity = {"Spatial": grid, "Semantic": n * neighbours, "Mixed": min(grid + n * neighbours, n * (n - 1))}
        assert graph[1].shape == graph[2].shape == (2, capacity[graph_type])
        for b in range(2):
            assert not graph[1][b, graph[0][b, -1] :].any()
            assert not graph[2][b, graph[0][b, -1] :].any()


def test_semantic_ties_go_to_the_lower_index_and_nan_comes_last(isa):
    x = np.zeros((1, 6, 4), "float32")
    x[0, [0, 2, 5], 0] = 1  # equal tokens
    x[0, 1] = np.nan
    x[0, 3, 1] = 1
    indptr, indices, _ = _C.build_graph(x, 2, 3, "Semantic", 2, 0, "paper", isa=isa)
    assert indptr.tolist() == [[0, 2, 4, 6, 8, 10, 12]]
    assert indices.reshape(6, 2).tolist() == [[2, 5], [0, 2], [0, 5], [0, 2], [0, 2], [0, 2]]


# --- propagation ------------------------------------------------------------------------------------------------------


def propagated(x, weight, kept, prop, scales, standard, alpha, prefix):
    """The definition for one image in float64; weight [n, n] over the current rows."""
    parts, sums = [x[:prefix]], [scales[:prefix]]
    w = (
        alpha * weight[np.ix_(kept - prefix, prop - prefix)]
        if standard == "GraphProp"
        else np.zeros((len(kept), len(prop)))
    )
    parts.append(x[kept] + w @ x[prop])
    sums.append(scales[kept] + w @ scales[prop])
    if standard == "Mean" and len(prop):
        parts.append(x[prop].mean(0, keepdims=True))
        sums.append(scales[prop].sum(keepdims=True))
    return np.concatenate(parts), np.concatenate(sums)


def problem(rng, dtype, channels=33, prefix=2, gone=4, num_prop=7, batch=3):
    """x over a 5 x 6 grid whose graph has lost `gone` tokens already, in an order of its own."""
    graph = csr(rng.standard_normal((batch, 30, 8)).astype("float32"), 5, 6, num_prefix=0, num_neighbours=4)
    token = np.stack([rng.permutation(30)[: 30 - gone] for _ in range(batch)]).astype("int32")
    n = 30 - gone
    x = rng.standard_normal((batch, prefix + n, channels)).astype(dtype)
    kept, prop = _C.select_tokens(rng.standard_normal((batch, n)), num_prop, prefix, "importance")
    scales = rng.uniform(1, 3, (batch, prefix + n)).astype("float32")
    return x, (*graph[:3], token), kept, prop, scales


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("standard", ["None", "Mean", "GraphProp"])
@pytest.mark.parametrize("num_prop", [0, 1, 7, 25])
def test_propagate(rng, isa, dtype, standard, num_prop):
    x, graph, kept, prop, scales = problem(rng, dtype, num_prop=num_prop)
    given = graph if standard == "GraphProp" else None
    out, token, out_scales = _C.propagate(x, given, kept, prop, scales, standard, 0.3, 2, isa=isa)
    for b, weight in enumerate(dense(graph)):
        want, want_scales = propagated(
            x[b].astype(np.float64), weight, kept[b], prop[b], scales[b].astype(np.float64), standard, 0.3, 2
        )
        np.testing.assert_allclose(out[b], want, rtol=RTOL[dtype], atol=RTOL[dtype])
        np.testing.assert_allclose(out_scales[b], want_scales, rtol=1e-6)
        if standard == "GraphProp":
            np.testing.assert_array_equal(token[b], graph[3][b][kept[b] - 2])
    if standard != "GraphProp":
        assert token.shape == (0,)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("standard", ["None", "Mean", "GraphProp"])
@pytest.mark.parametrize("channels", [1, 33, 600])
def test_backward_is_the_transpose(rng, isa, dtype, standard, channels):
    x, graph, kept, prop, _ = problem(rng, dtype, channels=channels)
    given = graph if standard == "GraphProp" else None
    out, *_ = _C.propagate(x, given, kept, prop, None, standard, 0.3, 2, isa=isa)
    grad = rng.standard_normal(out.shape).astype(dtype)
    back = _C.propagate_backward(grad, given, kept, prop, standard, 0.3, 2, isa=isa)
    assert back.shape == x.shape
    forward = (out.astype(np.float64) * grad).sum((-1, -2))
    np.testing.assert_allclose(
        (x.astype(np.float64) * back).sum((-1, -2)), forward, rtol=1e-4, atol=1e-3 if dtype == "float32" else 1e-10
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("num_prop", [0, 7])
def test_dense(rng, isa, dtype, num_prop):
    x, graph, kept, prop, scales = problem(rng, dtype, num_prop=num_prop)
    weight = dense(graph).astype("float32").transpose(0, 2, 1)  # strided
    out, weight_out, out_scales = _C.propagate_dense(x, weight, kept, prop, scales, 0.3, 2, isa=isa)
    for b in range(len(x)):
        want, want_scales = propagated(
            x[b].astype(np.float64), weight[b], kept[b], prop[b], scales[b].astype(np.float64), "GraphProp", 0.3, 2
        )
        np.testing.assert_allclose(out[b], want, rtol=max(RTOL[dtype], 1e-7), atol=max(RTOL[dtype], 1e-7))
        np.testing.assert_allclose(out_scales[b], want_scales, rtol=1e-6)
        np.testing.assert_array_equal(weight_out[b], weight[b][np.ix_(kept[b] - 2, kept[b] - 2)])


@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("float64", "float32"), ("float16", "float32"), ("float16", "float16")]
)
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("standard", ["None", "Mean", "GraphProp"])
def test_residual_propagate_norm(rng, isa, dtypes, norm, standard):
    x, graph, kept, prop, scales = problem(rng, dtypes[0], channels=70)
    branch = rng.standard_normal(x.shape).astype(dtypes[1])
    gamma, weight, bias = rng.standard_normal((3, 70)).astype("float32")
    given = graph if standard == "GraphProp" else None
    out, normed, _, out_scales = _C.residual_propagate_norm(
        x, branch, gamma, given, kept, prop, scales, weight, None if norm == "rms" else bias, 1e-5, norm, standard,
        0.3, 2, isa=isa,
    )  # fmt: skip
    dtype = np.promote_types(*dtypes).name
    assert out.dtype == dtype
    y = x.astype(np.float64) + gamma.astype(np.float64) * branch
    for b, w in enumerate(dense(graph)):
        want, want_scales = propagated(y[b], w, kept[b], prop[b], scales[b].astype(np.float64), standard, 0.3, 2)
        np.testing.assert_allclose(out[b], want, rtol=RTOL[dtype], atol=max(RTOL[dtype], 1e-6 * (dtype == "float32")))
        np.testing.assert_allclose(out_scales[b], want_scales, rtol=1e-6)
    if norm == "none":
        assert normed.shape == (0,)
        return
    # The norm reads what was written, rounding included.
    wide = out.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True) if norm == "layer" else wide
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + (bias if norm == "layer" else 0)
    np.testing.assert_allclose(normed, want, rtol=RTOL[dtype], atol=max(RTOL[dtype], 1e-12))


@pytest.mark.parametrize("channels", [4, 1024])  # less than a vector of them, and whole ones
def test_every_float16(rng, isa, channels):
    """All 65,536 values plus -0, and plus each other in another order: what is read, rounded, and overflows."""
    bits = np.arange(2**16, dtype="uint16")
    x = bits.view("float16").reshape(1, -1, channels)
    every, none = np.arange(x.shape[1])[None], np.zeros((1, 0), "int64")
    for other in (np.full_like(x, -0.0), rng.permutation(bits).view("float16").reshape(x.shape)):
        out, *_ = _C.residual_propagate_norm(
            x, other, None, None, every, none, norm="none", standard="None", num_prefix=0, isa=isa
        )
        with np.errstate(invalid="ignore", over="ignore"):
            want = (x.astype("float32") + other.astype("float32")).astype("float16")
        number = ~np.isnan(want)
        np.testing.assert_array_equal(np.isnan(out), ~number)
        np.testing.assert_array_equal(out.view("uint16")[number], want.view("uint16")[number])


def test_rows_without_an_edge_are_copied(rng, isa):
    """alpha times an empty sum is not computed: an infinite alpha makes no NaN, and the row is equal to the bit."""
    x, graph, kept, prop, scales = problem(rng, "float32")
    empty = (np.zeros_like(graph[0]), *graph[1:])
    out, _, out_scales = _C.propagate(x, empty, kept, prop, scales, "GraphProp", math.inf, 2, isa=isa)
    np.testing.assert_array_equal(out[:, 2:], np.take_along_axis(x, kept[..., None], 1))
    np.testing.assert_array_equal(out_scales[:, 2:], np.take_along_axis(scales, kept, 1))


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_sizes(isa, batch):
    q = np.zeros((batch, 0, 5, 4), "float32")
    assert _C.attention_with_scores(q, q, q, None, 0.6, isa=isa)[0].shape == q.shape
    q = np.zeros((0, 2, 5, 4), "float32")
    assert _C.attention_with_scores(q, q, q, None, 0.6, isa=isa)[1].shape == (0, 2, 5)
    assert _C.attention_with_scores_backward(q, q, q, q, None, 0.6, isa=isa)[2].shape == q.shape
    x = np.zeros((0, 5, 3), "float32")
    none = np.zeros((0, 2), "int64")
    graph = csr(x, 2, 2, num_neighbours=2, isa=isa)
    assert _C.propagate(x, graph, none, none, isa=isa)[0].shape == (0, 3, 3)


# --- no argument reads or writes outside an array ---------------------------------------------------------------------


def broken(graph, part, value):
    arrays = [a.copy() for a in graph]
    arrays[part].reshape(-1)[5] = value
    return tuple(arrays)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (0, -1, "indptr and indices"),
        (0, 2**31 - 1, "indptr and indices"),
        (1, -7, "indptr and indices"),
        (1, 30, "indptr and indices"),
        (3, -1, r"token\[0, 5\] is -1"),
        (3, 30, r"token\[0, 5\] is 30"),
    ],
)
def test_a_bad_graph_is_an_error(rng, isa, part, value, message):
    x, graph, kept, prop, _ = problem(rng, "float32", gone=0)
    identity = np.tile(np.arange(30, dtype="int32"), (3, 1))
    kept, prop = np.sort(kept), np.sort(prop)
    graph = broken((*graph[:3], identity), part, value)
    if part == 1:  # an edge of a row that is walked
        graph[1].reshape(3, -1)[:] = value
    if part == 0:
        graph[0][:, 1:-1] = value
    with pytest.raises(ValueError, match=message):
        _C.propagate(x, graph, kept, prop, None, num_prefix=2, isa=isa)
    with pytest.raises(ValueError, match=message):
        _C.propagate_backward(x[:, : 2 + kept.shape[1]], graph, kept, prop, num_prefix=2, isa=isa)


@pytest.mark.parametrize("standard", ["None", "Mean", "GraphProp"])
@pytest.mark.parametrize("value", [-1, 1, 28, 2**40])
def test_an_index_out_of_range_is_an_error(rng, isa, standard, value):
    x, graph, kept, prop, _ = problem(rng, "float32")
    graph = graph if standard == "GraphProp" else None
    for name, wrong in (("index_kept", kept.copy()), ("index_prop", prop.copy())):
        wrong[1, 2] = value
        pair = (wrong, prop) if name == "index_kept" else (kept, wrong)
        with pytest.raises(ValueError, match=rf"{name}\[1, 2\] is {value}; it must be in \[2, 28\)"):
            _C.propagate(x, graph, *pair, None, standard, 0.1, 2, isa=isa)


def test_wrong_arguments_are_named(rng):
    q, k, v = qkv(rng, 1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"k has shape \(1, 2, 4, 4\); it must be \(1, 2, 5, 4\)"):
        _C.attention_with_scores(q, k[:, :, 1:], v)
    with pytest.raises(ValueError, match="sparsity is nan"):
        _C.attention_with_scores(q, k, v, None, math.nan)
    with pytest.raises(ValueError, match="semantics is 'printed'; it must be one of 'official', 'paper'"):
        _C.attention_with_scores(q, k, v, semantics="printed")
    with pytest.raises(ValueError, match="q has dtype int64"):
        _C.attention_with_scores(q.astype("int64"), k, v)
    with pytest.raises(ValueError, match=r"grad_out has shape \(1, 2, 4, 4\); it must be \(1, 2, 5, 4\)"):
        _C.attention_with_scores_backward(v[:, :, 1:], q, k, v)
    with pytest.raises(ValueError, match="grad_out must have q's dtype"):
        _C.attention_with_scores_backward(v.astype("float64"), q, k, v)
    with pytest.raises(ValueError, match="num_prop is 6"):
        _C.select_tokens(np.zeros((1, 5)), 6)
    with pytest.raises(ValueError, match=r"height \* width is 6"):
        _C.build_graph(np.zeros((1, 5, 3), "float32"), 2, 3)
    with pytest.raises(RuntimeError, match="'avx9'"):
        _C.attention_with_scores(q, k, v, isa="avx9")
