"""csrc/cuda/attention*.cuh on the emulated GPU: both forms, and the paths that the op does not choose.

What the op itself computes on all shapes is in test_attention.py, on the backend ``cuda``.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from emulated import build
from torch import Tensor

from gtp_kernels import reference
from gtp_kernels.reference.attention import threshold_rank

FORMS = ["registers", "sweeps"]
SHIM = "cuda_attention_shim.cpp"


class Attention:
    """The library's attention on bfloat16 tensors."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.workspace_bytes.restype = ctypes.c_int64
        self.library.atomic_adds.restype = ctypes.c_uint64

    def __call__(
        self, form: str, q: Tensor, k: Tensor, v: Tensor, scales: Tensor | None, rank: int, *, miss: bool = False
    ) -> tuple[Tensor, ...]:
        """out [B, N, H, d] and the three scores [B, H, N], for a scale of d ** -0.5."""
        batch, heads, tokens, size = q.shape
        sizes = (ctypes.c_int64 * 6)(batch, heads, tokens, size, rank, miss)
        # What is not written stays NaN.
        out = torch.full((batch, tokens, heads, size), torch.nan, dtype=torch.bfloat16)
        scores = torch.full((3, batch, heads, tokens), torch.nan)
        workspace = torch.full((self.library.workspace_bytes(sizes) + 16,), 0xFF, dtype=torch.uint8)
        start = -workspace.data_ptr() % 16
        error = ctypes.create_string_buffer(256)
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (q, k, v, scales)]
        results = [ctypes.c_void_p(t.data_ptr()) for t in (out, *scores, workspace[start:])]
        good = self.library.attention(FORMS.index(form), sizes, *pointers, ctypes.c_double(size**-0.5), *results, error)
        assert good, error.value.decode()
        return (out, *scores)


@pytest.fixture(scope="session")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Attention:
    return Attention(build(SHIM, tmp_path_factory.mktemp("cuda_attention")))


def case(tokens: int, heads: int = 2, size: int = 64, gain: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = torch.randn(3, 1, heads, tokens, size, generator=generator)
    return (gain * q).bfloat16(), k.bfloat16(), v.bfloat16(), 0.5 + torch.rand(1, tokens, generator=generator)


def check(attention: Attention, form: str, tokens: int, heads: int, size: int, sparsity: float, gain: float) -> None:
    """Against the definition; a few values at the threshold may fall on either side, which no sum shows much."""
    q, k, v, scales = case(tokens, heads, size, gain)
    rank = threshold_rank(tokens, sparsity, "official")
    out, diag, colsum, cls_row = attention(form, q, k, v, scales, rank)
    want, scores = reference.attention_with_scores(q.float(), k.float(), v.float(), scales, sparsity=sparsity)
    largest = float(want.abs().max())
    torch.testing.assert_close(out.float().transpose(1, 2), want, rtol=0.02, atol=0.01 * largest)
    for ours, theirs in ((diag, scores.diag), (colsum, scores.colsum), (cls_row, scores.cls_row)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


CASES = [
    ("registers", 64, 8, 64, 1.0, 1.0),  # more heads than blocks: one block takes several
    ("registers", 64, 8, 64, 0.6, 1.0),
    ("registers", 37, 2, 40, 0.6, 4.0),
    ("registers", 197, 1, 64, 0.6, 1.0),
    ("registers", 200, 1, 64, 0.3, 6.0),
    ("registers", 193, 3, 64, 0.6, 1.0),
    ("registers", 201, 3, 64, 0.6, 1.0),
    ("registers", 208, 1, 64, 1.0, 6.0),
    ("registers", 205, 1, 40, 0.9, 4.0),
    ("registers", 201, 1, 88, 0.6, 1.0),
    ("registers", 197, 1, 128, 0.6, 1.0),
    ("sweeps", 64, 2, 64, 0.6, 1.0),
    ("sweeps", 197, 2, 64, 0.6, 1.0),
    ("sweeps", 150, 1, 33, 0.9, 6.0),
    ("sweeps", 70, 1, 64, 1.0, 1.0),
]


@pytest.mark.parametrize("arguments", CASES)
def test_matches_definition(attention: Attention, arguments: tuple[str, int, int, int, float, float]) -> None:
    check(attention, *arguments)


def test_images_of_heads(attention: Attention) -> None:
    for heads in (*range(1, 34), 65535, 65537, 2**30 + 1, 2**31 - 1):
        for image in (0, 1, 2, 1000, (2**31 - 1) // heads):
            for head in (image * heads - 1, image * heads, image * heads + heads - 1):
                if 0 <= head < 2**31:
                    assert attention.library.image_of(heads, head) == head // heads


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [64, 197])
def test_the_search_of_the_whole_map_finds_the_same_threshold(attention: Attention, form: str, tokens: int) -> None:
    q, k, v, scales = case(tokens, heads=1)
    for sparsity in (0.02, 0.6, 0.999):
        rank = threshold_rank(tokens, sparsity, "official")
        found = attention(form, q, k, v, scales, rank)
        searched = attention(form, q, k, v, scales, rank, miss=True)
        assert all(map(torch.equal, found, searched))


@pytest.mark.parametrize("form", FORMS)
def test_every_rank_drops_so_many(attention: Attention, form: str) -> None:
    """Column sums with v of ones are row sums too: of the map [5, 5], rank − 1 values are below the threshold."""
    q, k, v, scales = case(5, heads=1)
    whole = torch.softmax((q.float() @ k.float().mT)[0, 0] / 8 + scales.log(), -1)
    for rank in range(1, 26):
        _, _, colsum, _ = attention(form, q, k, v, scales, rank)
        kept = torch.where(whole < whole.flatten().kthvalue(rank).values, 0.0, whole)
        torch.testing.assert_close(colsum[0, 0], kept.sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_ties_beyond_every_buffer(attention: Attention, form: str) -> None:
    """A constant map: the bracket holds all of it, more than there is room for; nothing is below the threshold."""
    for tokens in (64, 197):
        q = torch.zeros(1, 1, tokens, 64, dtype=torch.bfloat16)
        v = torch.ones_like(q)
        for rank in (1, tokens * tokens // 2, tokens * tokens):
            out, _, colsum, _ = attention(form, q, q, v, None, rank)
            torch.testing.assert_close(colsum, torch.ones_like(colsum), rtol=1e-5, atol=0)
            torch.testing.assert_close(out.float(), torch.ones_like(out).float(), rtol=0.01, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_nan_is_above_every_threshold(attention: Attention, form: str) -> None:
    q, k, v, scales = case(64, heads=1)
    q[0, 0, 3] = torch.nan
    rank = threshold_rank(64, 0.6, "official")
    out, diag, colsum, _ = attention(form, q, k, v, scales, rank)
    want, scores = reference.attention_with_scores(q.float(), k.float(), v.float(), scales, sparsity=0.6)
    assert torch.equal(out.transpose(1, 2).isnan(), want.isnan())
    torch.testing.assert_close(diag, scores.diag, rtol=1e-4, atol=2e-5, equal_nan=True)
    assert colsum.isnan().all()


@pytest.mark.parametrize("sparsity", [0.6, 1.0])
@pytest.mark.parametrize("tokens", [197, 201])
def test_edge_of_what_is_not_finite(attention: Attention, tokens: int, sparsity: float) -> None:
    """The queries beyond 192: a row of NaN, keys without weight in all but one warp's part, and in all."""
    rank = threshold_rank(tokens, sparsity, "official")
    q, k, v, scales = case(tokens, heads=1)
    for last in (0.0, torch.nan):
        q[0, 0, -1] += last
        for there in (range(tokens), [0], [tokens - 1], []):
            weights = torch.zeros_like(scales)
            weights[:, list(there)] = scales[:, list(there)]
            out, diag, colsum, cls_row = attention("registers", q, k, v, weights, rank)
            want, scores = reference.attention_with_scores(q.float(), k.float(), v.float(), weights, sparsity=sparsity)
            torch.testing.assert_close(out.float().transpose(1, 2), want, rtol=0.02, atol=0.03, equal_nan=True)
            for ours, theirs in ((diag, scores.diag), (colsum, scores.colsum), (cls_row, scores.cls_row)):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("tokens", [97, 105, 161, 177, 193, 197, 201, 208])
def test_the_bracket_of_the_sample_holds(attention: Attention, tokens: int) -> None:
    """A search of the whole map counts each of its values, more than once; the usual way a part of them."""
    q, k, v, scales = case(tokens, heads=2)
    for share in (0.002, 0.05, 0.1, 0.4, 0.9):
        before = attention.library.atomic_adds()
        attention("registers", q, k, v, scales, int(share * tokens * tokens))
        assert attention.library.atomic_adds() - before < tokens * tokens


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_threads_changes_nothing(attention: Attention, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, scales = case(100 if form == "sweeps" else 60)
    rank = threshold_rank(q.shape[2], 0.6, "official")
    first = attention(form, q, k, v, scales, rank)
    for seed in ("2", "3"):
        monkeypatch.setenv("GTP_EMULATED_SEED", seed)
        assert all(map(torch.equal, first, attention(form, q, k, v, scales, rank)))
