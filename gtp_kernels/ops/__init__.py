"""Per op: the public function with its checks, the choice of backend, the fake kernel and the autograd."""

import gtp_kernels.ops.select_propagate  # noqa: F401  # an operator without a public function
from gtp_kernels.ops.attention import attention_with_scores
from gtp_kernels.ops.graph import build_graph
from gtp_kernels.ops.live import live_graph, live_merge, live_select
from gtp_kernels.ops.propagate import propagate, residual_propagate_norm
from gtp_kernels.ops.select import select, select_tokens, token_importance

__all__ = [
    "attention_with_scores",
    "build_graph",
    "live_graph",
    "live_merge",
    "live_select",
    "propagate",
    "residual_propagate_norm",
    "select",
    "select_tokens",
    "token_importance",
]
