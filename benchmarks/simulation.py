"""Direct simulation of a routing rule: dense scores, masked. Slow, simple, and independent of the cache.

It is the oracle that the real path is checked against, in tests on one layer and in `fidelity.py` on whole
models. It knows no archive, no store and no blocks: every tile forms its groups anew from the whole past.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hga.config import TILE_TOKENS, HGAConfig
from hga.ops.coding import decode_differences, encode_differences
from hga.ops.nibbles import decode_nibbles, encode_nibbles
from hga.ops.ordering import content_order
from hga.ops.precision import compute_dtype, decode_rows, encode_rows, resolve_summary_dtype
from hga.ops.summaries import summarise_keys

_NEVER = float("-inf")


@torch.no_grad()
def simulate(
    config: HGAConfig,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    frequencies: Tensor | None = None,
) -> Tensor:
    """Routed attention of every position: query (Hq, T, D), key and value (Hkv, T, D) -> (Hq, T, D).

    What `HGACache` computes with prefill="routed" and dense_below=0, whatever the blocks.
    """
    heads, tokens, width = key.shape
    work = compute_dtype(key.dtype)
    q = query.view(heads, -1, tokens, width).to(work) * scale  # (H, R, T, D)
    k, v = key.to(work), value.to(work)
    stored = resolve_summary_dtype(config.summary_dtype, key.dtype)
    places = torch.arange(tokens, device=key.device).expand(heads, tokens)
    sink, chunk = config.sink_tokens, config.chunk_size
    whole = max(0, (tokens - sink) // chunk)
    ordered = places
    if config.ordering == "content" and whole:
        last = sink + whole * chunk
        inside = content_order(*(x[:, sink:last].unflatten(1, (whole, chunk)) for x in (key, value)), config.group_size)
        first = sink + torch.arange(whole, device=key.device) * chunk
        ordered = torch.cat([places[:, :sink], (inside + first[:, None]).flatten(1), places[:, last:]], 1)
    out = torch.empty_like(q)
    for start in range(0, tokens, TILE_TOKENS):
        stop = min(tokens, start + TILE_TOKENS)
        closed = max(0, (start - config.window_tokens - sink) // chunk) * chunk
        order = torch.cat([ordered[:, : sink + closed], places[:, sink + closed : stop]], 1)
        tile = q[:, :, start:stop]
        out[:, :, start:stop] = _tile(config, tile, k[:, :stop], v[:, :stop], order, start, closed, stored, frequencies)
    return out.flatten(0, 1).to(query.dtype)


def _tile(
    config: HGAConfig,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    start: int,
    closed: int,
    stored: torch.dtype,
    frequencies: Tensor | None,
) -> Tensor:
    heads, repeats, queries, width = query.shape
    size, sink, node = config.group_size, config.sink_tokens, config.node_size
    length = key.shape[1]
    position = torch.arange(start, start + queries, device=key.device)
    token = torch.arange(length, device=key.device)
    # The first position of each query's window, on the grid of groups behind the sink.
    window = sink + ((position - config.window_tokens + 1 - sink).clamp(min=0) + size - 1) // size * size
    groups = max(0, int(window[-1]) - sink) // size
    rows = order[:, sink : sink + groups * size]  # (H, groups * size) token ids
    index = rows[..., None].expand(-1, -1, width)
    grouped_keys, grouped_values = key.gather(1, index), value.gather(1, index)
    group_keys = summarise_keys(grouped_keys, size, frequencies)
    group_values = grouped_values.unflatten(1, (-1, size)).mean(2)
    archived = closed // size
    past = sink + torch.arange(1, groups + 1, device=key.device) * size  # one past each group in the order
    allowed = (past <= window[:, None]).expand(heads, repeats, queries, groups)

    per_node, nodes = node // size, closed // node
    node_keys = summarise_keys(grouped_keys[:, : nodes * node], node, frequencies)
    node_keys = decode_rows(encode_rows(node_keys, stored), key.dtype)
    node_values = grouped_values[:, : nodes * node].unflatten(1, (-1, node)).mean(2)
    if config.coded:
        node_values = decode_nibbles(encode_nibbles(node_values), key.dtype)
    else:
        node_values = decode_rows(encode_rows(node_values, stored), key.dtype)
    node_scores = torch.einsum("hrmd,hnd->hrmn", query, node_keys)
    if config.coded and nodes:
        coded = encode_differences(group_keys[:, :archived], node_keys, closed // config.chunk_size)
        rounded = decode_differences(coded, node_keys)
    else:
        rounded = decode_rows(encode_rows(group_keys[:, :archived], stored), key.dtype)
    group_keys = torch.cat([rounded, group_keys[:, archived:]], 1)
    group_scores = torch.einsum("hrmd,hgd->hrmg", query, group_keys)
    scored = torch.ones_like(allowed)
    if config.two_level and nodes > config.candidate_nodes:
        best = _best(config, node_scores, config.candidate_nodes)
        scored = torch.cat([best.repeat_interleave(per_node, -1), scored[..., archived:]], -1)
    candidates = allowed & scored
    possible = group_scores.masked_fill(~candidates, _NEVER).roll(-archived, -1)  # what is in no chunk comes first
    opened = _best(config, possible, config.routed_groups).roll(archived, -1)

    exact = ((token < sink) | (token >= window[:, None])) & (token <= position[:, None])
    exact = exact.expand(heads, repeats, queries, length).clone()
    routed = torch.zeros_like(exact)
    routed.scatter_(-1, rows[:, None, None].expand(heads, repeats, queries, -1), opened.repeat_interleave(size, -1))
    logits = [torch.einsum("hrmd,hnd->hrmn", query, key).masked_fill(~(exact | routed), _NEVER)]
    values = [value]
    if config.far_field:
        far = (group_scores + math.log(size)).masked_fill(~candidates | opened, _NEVER)
        unscored = ~scored[..., :archived:per_node]
        logits += [far, (node_scores + math.log(node)).masked_fill(~unscored, _NEVER)]
        values += [
            torch.cat([node_values.repeat_interleave(per_node, 1), group_values[:, archived:]], 1),
            node_values,
        ]
    weights = torch.softmax(torch.cat(logits, -1), -1)
    return torch.einsum("hrmn,hnd->hrmd", weights, torch.cat(values, 1))


def _best(config: HGAConfig, scores: Tensor, keep: int) -> Tensor:
    """Mark the best `keep` of each query (of each KV head's queries together where the selection is shared).

    Masses count in steps of an eighth of an octave; of equal ones the first are the best.
    """
    mass = torch.softmax(scores, -1).nan_to_num(0.0)
    possible = scores > _NEVER
    if config.selection == "shared":
        mass = mass.sum(1, keepdim=True).expand_as(mass)
    mantissa, exponent = torch.frexp(mass.clamp(min=2.0**-59))
    steps = (exponent * 8 + ((2 * mantissa - 1) * 8).floor()).masked_fill(~possible, _NEVER)
    order = steps.sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(possible).scatter_(-1, order[..., :keep], True)
    return chosen & possible
