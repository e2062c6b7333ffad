"""Operations: what several methods compute. One folder each: `api.py` (meaning, checks, dispatch), `reference.py`
(readable, the oracle), and back ends. A method calls the op, never a back end.

    from saccade import ops
    out, lse = ops.attend(q, k, v, selection)
"""

from saccade.ops.antidiagonal_mass.api import antidiagonal_mass
from saccade.ops.assign.api import assign
from saccade.ops.attend.api import attend
from saccade.ops.block_gate.api import Gate, Pooled, block_gate, gate_logits, pool_for_gate
from saccade.ops.block_logits.api import block_logits
from saccade.ops.choose_blocks.api import choose_blocks, cover_blocks, mass_before
from saccade.ops.column_scores.api import column_scores
from saccade.ops.decode.api import decode
from saccade.ops.dispatch import explain
from saccade.ops.exchange.api import all_heads, all_tokens, to_heads, to_tokens
from saccade.ops.fetch.api import fetch
from saccade.ops.linear_attend.api import linear_attend
from saccade.ops.lines.api import draw_lines, fit_lines, line_scores
from saccade.ops.merge_lse.api import merge_lse
from saccade.ops.nearest.api import index_keys, index_reasons
from saccade.ops.packed.api import Packed, attend_packed, pack_tokens, unpack_tokens
from saccade.ops.page_bounds.api import page_bounds, page_scores
from saccade.ops.pool_and_select.api import pool_and_select, pool_blocks
from saccade.ops.pooled_map.api import pooled_map
from saccade.ops.quantise.api import Quantised, dequantise, quantise
from saccade.ops.quantise.groups import dequantise_groups, quantise_groups
from saccade.ops.random_features.api import log_features, orthogonal_directions
from saccade.ops.ring_attend.api import ring_attend
from saccade.ops.sparse_step.api import sparse_step
from saccade.ops.topk.api import topk, topk_rows
from saccade.ops.window_votes.api import check_window, votes_of, window_votes

__all__ = [
    "Gate",
    "Packed",
    "Pooled",
    "Quantised",
    "all_heads",
    "all_tokens",
    "antidiagonal_mass",
    "assign",
    "attend",
    "attend_packed",
    "block_gate",
    "block_logits",
    "check_window",
    "choose_blocks",
    "column_scores",
    "cover_blocks",
    "decode",
    "dequantise",
    "dequantise_groups",
    "draw_lines",
    "explain",
    "fetch",
    "fit_lines",
    "gate_logits",
    "index_keys",
    "index_reasons",
    "line_scores",
    "linear_attend",
    "log_features",
    "mass_before",
    "merge_lse",
    "orthogonal_directions",
    "pack_tokens",
    "page_bounds",
    "page_scores",
    "pool_and_select",
    "pool_blocks",
    "pool_for_gate",
    "pooled_map",
    "quantise",
    "quantise_groups",
    "ring_attend",
    "sparse_step",
    "to_heads",
    "to_tokens",
    "topk",
    "topk_rows",
    "unpack_tokens",
    "votes_of",
    "window_votes",
]
