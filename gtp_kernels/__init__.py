"""gtp_kernels: fused kernels for graph-based token propagation (GTP) in Vision Transformers.

Shapes: B images, H heads, N tokens (prefix tokens first), d head size, C = H·d channels, R prefix tokens,
n = N − R image tokens, P propagated tokens, M semantic neighbours. ``gtp_kernels.reference`` holds the definitions.
"""

from importlib import metadata

from gtp_kernels import reference
from gtp_kernels.backends import BackendWarning, use_backend
from gtp_kernels.graph import LiveGraph, LiveSelection, TokenGraph
from gtp_kernels.ops import (
    attention_with_scores,
    build_graph,
    live_graph,
    live_merge,
    live_select,
    propagate,
    residual_propagate_norm,
    select,
    select_tokens,
    token_importance,
)
from gtp_kernels.reference import AttentionScores

try:
    __version__ = metadata.version("gtp-kernels")
except metadata.PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "AttentionScores",
    "BackendWarning",
    "LiveGraph",
    "LiveSelection",
    "TokenGraph",
    "attention_with_scores",
    "build_graph",
    "live_graph",
    "live_merge",
    "live_select",
    "propagate",
    "reference",
    "residual_propagate_norm",
    "select",
    "select_tokens",
    "token_importance",
    "use_backend",
]
