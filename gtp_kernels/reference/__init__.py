"""The definition of every op in plain PyTorch: the oracle of tests and benchmarks, and the backend ``reference``."""

from gtp_kernels.reference.attention import AttentionScores, attention_map, attention_with_scores, scores_of_map
from gtp_kernels.reference.graph import build_graph
from gtp_kernels.reference.live import live_graph, live_merge, live_select
from gtp_kernels.reference.propagate import propagate, residual_propagate_norm
from gtp_kernels.reference.select import select, select_tokens, token_importance

__all__ = [
    "AttentionScores",
    "attention_map",
    "attention_with_scores",
    "build_graph",
    "live_graph",
    "live_merge",
    "live_select",
    "propagate",
    "residual_propagate_norm",
    "scores_of_map",
    "select",
    "select_tokens",
    "token_importance",
]
