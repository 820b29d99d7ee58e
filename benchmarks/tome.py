"""Token merging (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023) on torch's fused attention.

Written from the paper's description, as the baseline that people compare with. In every block, between the attention
and the MLP:

1. The image tokens are dealt in turn to two sets, A and B. Prefix tokens (class, registers) are in neither.
2. Every token of A draws one edge, to the token of B with the most similar key: cosine similarity of the keys' mean
   over the heads.
3. The r strongest edges stay; what they connect is merged, as the mean weighted by how many patches a token stands for.
4. The next attention adds log(size) to the logits of every key (proportional attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Matching(NamedTuple):
    """Which tokens merge, as positions among the image tokens: int64 [B, ...].

    ``source[i]`` goes into ``target[i]``; ``kept`` are the tokens of A that stay alone.
    """

    source: Tensor
    target: Tensor
    kept: Tensor


def bipartite_soft_matching(metric: Tensor, r: int) -> Matching:
    """Steps 1 to 3 over the image tokens' ``metric`` [B, n, d]; at most half of them can leave.

    Raises:
        ValueError: a negative r.
    """
    if r < 0:
        raise ValueError(f"r must not be negative; got {r}")
    metric = F.normalize(metric, dim=-1)
    a, b = metric[:, ::2], metric[:, 1::2]
    r = min(r, b.shape[1])
    if r == 0:
        every = torch.arange(0, metric.shape[1], 2, device=metric.device).expand(metric.shape[0], -1)
        return Matching(every[:, :0], every[:, :0], every)
    similarity, nearest = (a @ b.transpose(-1, -2)).max(-1)
    order = similarity.argsort(-1, descending=True)
    source, kept = order[:, :r], order[:, r:].sort(-1)[0]
    return Matching(2 * source, 2 * nearest.gather(1, source) + 1, 2 * kept)


def merge(x: Tensor, size: Tensor, matching: Matching, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Step 4's rows: prefix, the tokens of A that stay, B with what was merged into it.

    Args:
        x: [B, N, C].
        size: float32 [B, N], the patches that each token stands for.
    """
    width = x.shape[-1]
    weighted = x * size.unsqueeze(-1).to(x.dtype)
    prefix, image = weighted[:, :num_prefix], weighted[:, num_prefix:]
    image_size = size[:, num_prefix:]
    # B is every second image token, so its rows are numbered target // 2.
    row = matching.target // 2
    b = image[:, 1::2].scatter_add(1, _wide(row, width), image.gather(1, _wide(matching.source, width)))
    b_size = image_size[:, 1::2].scatter_add(1, row, image_size.gather(1, matching.source))
    out = torch.cat((prefix, image.gather(1, _wide(matching.kept, width)), b), 1)
    out_size = torch.cat((size[:, :num_prefix], image_size.gather(1, matching.kept), b_size), 1)
    return out / out_size.unsqueeze(-1).to(x.dtype), out_size


def unmerge(x: Tensor, matchings: Sequence[Matching]) -> Tensor:
    """Every original image token [B, n, C] as the row of x [B, m, C], image tokens only, that it was merged into."""
    for matching in reversed(matchings):
        alone, others = matching.kept.shape[1], x.shape[1] - matching.kept.shape[1]
        rows = torch.empty(len(x), x.shape[1] + matching.source.shape[1], dtype=torch.int64, device=x.device)
        rows.scatter_(1, matching.kept, torch.arange(alone, device=x.device).expand_as(matching.kept))
        rows[:, 1::2] = alone + torch.arange(others, device=x.device)
        rows.scatter_(1, matching.source, alone + matching.target // 2)
        x = x.gather(1, _wide(rows, x.shape[-1]))
    return x


def _wide(index: Tensor, width: int) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, width)


class ToMe(nn.Module):
    """A timm Vision Transformer with r tokens merged in every block; it shares the model's weights.

    Args:
        model: a ``timm.models.vision_transformer.VisionTransformer`` of plain blocks.
        r: tokens that leave in every block.
        proportional: whether the attention counts the patches that a token stands for (step 4).
    """

    def __init__(self, model: Any, r: int, proportional: bool = True) -> None:
        super().__init__()
        self.model, self.r, self.proportional = model, r, proportional

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images [B, 3, H, W]."""
        logits: Tensor = self.model.forward_head(self.forward_features(images))
        return logits

    def forward_features(self, images: Tensor, matchings: list[Matching] | None = None) -> Tensor:
        """The tokens that remain, after the last norm; ``matchings``, where given, takes that of every block."""
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        size = None
        for block in model.blocks:
            x, size = self._block(block, x, size, matchings)
        tokens: Tensor = model.norm(x)
        return tokens

    def _block(
        self, block: Any, x: Tensor, size: Tensor | None, matchings: list[Matching] | None
    ) -> tuple[Tensor, Tensor | None]:
        attention = block.attn
        batch, num_tokens, _ = x.shape
        qkv = attention.qkv(block.norm1(x)).reshape(batch, num_tokens, 3, attention.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attention.q_norm(q), attention.k_norm(k)
        bias = size.log()[:, None, None].to(q.dtype) if size is not None and self.proportional else None
        out = F.scaled_dot_product_attention(q, k, v, bias, scale=attention.scale)
        branch = attention.proj(attention.norm(out.transpose(1, 2).reshape(batch, num_tokens, -1)))
        x = x + block.drop_path1(block.ls1(branch))
        if self.r:
            size = torch.ones(batch, num_tokens, device=x.device) if size is None else size
            prefix = self.model.num_prefix_tokens
            matching = bipartite_soft_matching(k.mean(1)[:, prefix:], self.r)
            if matchings is not None:
                matchings.append(matching)
            x, size = merge(x, size, matching, prefix)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), size


class MergeOnly(nn.Module):
    """What ToMe adds to a model and nothing else: the matching and the merging of ``depth`` blocks, on any tokens."""

    def __init__(self, depth: int, r: int, head_size: int, num_prefix: int) -> None:
        super().__init__()
        self.depth, self.r, self.head_size, self.num_prefix = depth, r, head_size, num_prefix

    def forward(self, x: Tensor) -> Tensor:
        """The tokens that remain of x [B, N, C]; the first ``head_size`` channels stand for the keys' mean."""
        size = torch.ones(x.shape[:2], device=x.device)
        for _ in range(self.depth):
            matching = bipartite_soft_matching(x[:, self.num_prefix :, : self.head_size], self.r)
            x, size = merge(x, size, matching, self.num_prefix)
        return x
