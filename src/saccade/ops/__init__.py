"""Operations: what several methods compute. One folder each: `api.py` (meaning, checks, dispatch), `reference.py`
(readable, the oracle), and back ends. A method calls the op, never a back end.

    from saccade import ops
    out, lse = ops.attend(q, k, v, selection)
"""

from saccade.ops.attend.api import attend
from saccade.ops.block_logits.api import block_logits
from saccade.ops.column_scores.api import column_scores
from saccade.ops.decode.api import decode
from saccade.ops.dispatch import explain
from saccade.ops.lines.api import draw_lines, fit_lines, line_scores
from saccade.ops.merge_lse.api import merge_lse
from saccade.ops.nearest.api import index_keys, index_reasons
from saccade.ops.packed.api import Packed, attend_packed, pack_tokens, unpack_tokens
from saccade.ops.page_bounds.api import page_bounds, page_scores
from saccade.ops.pool_and_select.api import pool_and_select, pool_blocks
from saccade.ops.quantise.api import Quantised, dequantise, quantise
from saccade.ops.quantise.groups import dequantise_groups, quantise_groups
from saccade.ops.sparse_step.api import sparse_step
from saccade.ops.topk.api import topk
from saccade.ops.window_votes.api import check_window, votes_of, window_votes

__all__ = [
    "Packed",
    "Quantised",
    "attend",
    "attend_packed",
    "block_logits",
    "check_window",
    "column_scores",
    "decode",
    "dequantise",
    "dequantise_groups",
    "draw_lines",
    "explain",
    "fit_lines",
    "index_keys",
    "index_reasons",
    "line_scores",
    "merge_lse",
    "pack_tokens",
    "page_bounds",
    "page_scores",
    "pool_and_select",
    "pool_blocks",
    "quantise",
    "quantise_groups",
    "sparse_step",
    "topk",
    "unpack_tokens",
    "votes_of",
    "window_votes",
]
