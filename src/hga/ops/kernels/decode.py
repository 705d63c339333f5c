"""One decode step of one layer in a dozen kernels: no host synchronisation, no allocation but its output.

Where missing groups have to be brought (`Bring`), the host waits once, for the list of them.
"""

from __future__ import annotations

from torch import Tensor

from hga.config import HGAConfig
from hga.ops.coding import Codes
from hga.ops.decode import Bring, DecodeLayer
from hga.ops.kernels.decode_attention import attend_parts, merge_parts
from hga.ops.kernels.decode_choice import assign_slots, choose_columns, fetch_groups, score_codes, score_summaries
from hga.ops.kernels.decode_step import Step


def attend_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: DecodeLayer,
    counts: Tensor,
    config: HGAConfig,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bring: Bring | None = None,
) -> Tensor:
    """See `hga.ops.decode.attend_decode`; float16, bfloat16 or float32, contiguous K/V and queries."""
    query, new = query.contiguous(), (keys.contiguous(), values.contiguous())
    step, scratch, cap = Step(query, layer, counts, config), layer.scratch, softcap or 0.0
    groups, listed = scratch.groups, scratch.nodes
    units = config.chunk_size // config.node_size
    if listed is None:
        score_summaries(step, query, new, layer.node_keys, groups, scale, cap, units=units)
        choose_columns(step, groups, units=units, first=step.first)
    else:
        assert layer.group_keys is not None
        score_summaries(step, query, new, layer.node_keys, listed, scale, cap, units=units, pending=False)
        choose_columns(step, listed, units=units, first=0)
        if isinstance(layer.group_keys, Codes):
            score_codes(step, query, new, layer.group_keys, groups, listed, scale, cap)
        else:
            score_summaries(step, query, new, layer.group_keys, groups, scale, cap, listed=listed)
        choose_columns(step, groups, units=0, first=step.first, listed=listed)
    # Several selectors may lack the same group, and what is brought has no address before it is asked for.
    direct = bring is None and step.selectors_each == 1
    assign_slots(step, groups, groups if listed is None else listed, direct)
    if not direct:
        fetch_groups(step, bring)
    attend_parts(step, query, groups, listed, scale, cap)
    return merge_parts(step, query, sinks)
