"""Operations: what several methods compute. One folder each: `api.py` (meaning, checks, dispatch), `reference.py`
(readable, the oracle), and back ends. A method calls the op, never a back end.

    from saccade import ops
    out, lse = ops.attend(q, k, v, selection)
"""

from saccade.ops.attend.api import attend
from saccade.ops.block_logits.api import block_logits
from saccade.ops.column_scores.api import column_scores
from saccade.ops.decode.api import decode
from saccade.ops.lines.api import draw_lines, fit_lines, line_scores
from saccade.ops.merge_lse.api import merge_lse
from saccade.ops.pool_and_select.api import pool_and_select, pool_blocks

__all__ = [
    "attend",
    "block_logits",
    "column_scores",
    "decode",
    "draw_lines",
    "fit_lines",
    "line_scores",
    "merge_lse",
    "pool_and_select",
    "pool_blocks",
]
