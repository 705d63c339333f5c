"""The search for a better rule: variants of HGA's rule, simulated on dense K/V, at total cost.

    python benchmarks/frontier.py --model FOLDER --gguf-file FILE --document FILE --tokens 16384 \\
        --variants 'g4;g4+vote=global;t2;quest' --budget 1/32 [--errors]

One JSON line a variant: gap to dense in nats (second half), attended and fetched shares, summary bytes over bytes of
16-bit K/V. With --errors no losses but, from one dense reading, each layer's output error: quick, for a first look.
A variant is a base (of `BASES`, or a preset) with changes of fields behind plus signs, or another system's rule.
`variants/` holds lists of them.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hga
from hga.config import PRESETS
from hga.evals.nll import evaluate_nll
from hga.evals.recall import measure_recall
from hga.evals.rules.peers import PEERS
from hga.evals.rules.simulated import SimulatedRule
from hga.evals.rules.tile import Attended, Tile
from hga.ops.nibbles import decode_nibbles, encode_nibbles, nibble_bytes
from hga.ops.ordering import content_order
from hga.ops.precision import decode_rows, encode_rows
from hga.ops.routing import NEVER, score
from hga.ops.summaries import mean_rows

_STEPS = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335}
"""Step of the uniform quantiser of a normal variable with least squared error, in standard deviations, by bits."""


@dataclass(frozen=True, kw_only=True)
class Variant(SimulatedRule):
    """HGA's rule with more choices than `HGAConfig` has.

    key_code, value_code: how summaries are kept. "exact"; "fp8": a scale a row; or a letter and the bits of a number:
    the chunk's mean is taken off, channels are divided by their spread to the power of 0 ("h"), 1/2 ("n") or 1 ("w")
    and mixed by a Hadamard matrix, and a row has a step of its own; with a "t" behind, what is coded is the difference
    to the mean of 16 tokens, which has 4 bits; with "f" and a size behind, the difference to the mean of so many
    tokens, which is kept in fp8. A capital letter leaves the mixing out: "W2f16" is how hga codes groups' keys, and
    "row4" how it codes nodes' values: 4 bits and the best of some steps a row, nothing taken off.
    value_size: tokens of a mean value (a multiple of group_size).
    vote: how the R heads of a KV head agree: "local" adds softmax masses over the candidates, as hga does;
    "global" adds shares of the whole attention, sink and window included; "max" takes the largest of those;
    "turns": heads name their best in turn; "head": each head chooses for itself. pool: "layer" lets the KV heads of a
    layer share one budget.
    gain: what a group is chosen by: "mass", or mass times the spread of its "key"s, "value"s or "both"; counted as one
    more byte a group each (and kept exactly here). lift: the far field's mass is raised by half the variance of its
    logits, as the spread of keys tells it, at most this many nats. top_p: no more groups are opened once this share of
    the attention is exact, as the summaries tell. node_size, overselection: as in HGAConfig; 0 for one level.
    """

    budget_tokens: int
    sink_tokens: int = 16
    window_tokens: int = 64
    chunk_size: int = 256
    group_size: int = 4
    value_size: int = 4
    key_code: str = "fp8"
    value_code: str = "fp8"
    vote: str = "local"
    pool: str = "head"
    gain: str = "mass"
    lift: float = 0.0
    top_p: float = 1.0
    node_size: int = 0
    overselection: int = 0
    far_field: bool = True

    def metadata_share(self, width: int, tokens: int) -> float:
        """Key, value and node summaries, and spreads."""

        def row(code: str) -> float:
            whole = {"exact": 2.0 * width, "fp8": width + 2.0, "row4": nibble_bytes(width)}
            return whole.get(code) or width * int(code[1]) / 8 + 1

        def unit(code: str, size: int) -> float:
            if code in ("exact", "fp8", "row4"):
                return row(code) / size
            beside = (2 if code[0] == "h" else 4) * width / self.chunk_size
            return row(code) / size + beside + (row("h4") / 16 if code[-1] == "t" else 0)

        if "f" in self.key_code[1:]:  # not fp8
            code, of = self.key_code.split("f")
            total = row(code) / self.group_size + (width + 2) / int(of)
            total += 2 * width / self.chunk_size if code[0] not in "hH" else 0
            return (total + unit(self.value_code, self.value_size)) / (4 * width)
        total = unit(self.key_code, self.group_size)
        total += unit(self.value_code, self.value_size) if self.far_field else 0
        total += unit(self.key_code, self.node_size) if self.node_size else 0
        spreads = {"mass": 0, "both": 2}.get(self.gain, 1)
        if self.lift and self.gain not in ("key", "both"):
            spreads += 1
        return (total + spreads / self.group_size) / (4 * width)

    def attend(self, tile: Tile) -> Attended:
        """Route one tile."""
        size, sink = self.group_size, self.sink_tokens
        chunks = max(0, (tile.start - self.window_tokens - sink) // self.chunk_size)
        closed = chunks * self.chunk_size
        starts = sink + ((tile.positions - self.window_tokens + 1 - sink).clamp(min=0) + size - 1) // size * size
        groups = -(-max(0, tile.key.shape[1] - self.window_tokens - sink) // size)
        order = tile.once("order", chunks, lambda a, b: self._order(tile, a, b)).flatten(1)
        pending = torch.arange(sink + closed, sink + groups * size, device=order.device)
        rows = torch.cat([order, pending.expand(order.shape[0], -1)], 1)
        ends = sink + torch.arange(1, groups + 1, device=rows.device) * size
        allowed = ends <= starts[:, None]

        keys = self._rows(tile, "key", size, self.key_code, chunks, pending)
        scores = score(tile.query, keys).masked_fill(~allowed, NEVER)  # (H, R, M, G)
        token = torch.arange(tile.key.shape[1], device=rows.device)
        near = ((token < sink) | (token >= starts[:, None])) & tile.causal
        lifted = scores
        spread_of_keys = spread_of_values = None
        if self.lift or self.gain in ("key", "both"):
            spread_of_keys = self._spread(tile, "key", chunks, pending)
        if self.gain in ("value", "both"):
            spread_of_values = self._spread(tile, "value", chunks, pending)
        if self.lift and spread_of_keys is not None:
            power = tile.query.square().mean(-1, keepdim=True)  # (H, R, M, 1)
            lifted = scores + (power * spread_of_keys.square()[:, None, None] / 2).clamp(max=self.lift)
        candidates = scores > NEVER
        node_scores = node_values = None
        if self.node_size:
            lifted, candidates, node_scores = self._descend(tile, lifted, candidates, chunks, pending)
        gains = lifted.masked_fill(~candidates, NEVER)
        for spread in (spread_of_keys if self.gain in ("key", "both") else None, spread_of_values):
            if spread is not None:
                gains = gains + spread.clamp(min=1e-6).log()[:, None, None]
        opened = self._choose(tile, near, lifted, gains)

        exact = torch.zeros(*opened.shape[:3], tile.key.shape[1], dtype=torch.bool, device=rows.device)
        exact.scatter_(-1, rows[:, None, None].expand(*opened.shape[:3], -1), opened.repeat_interleave(size, -1))
        exact |= near
        if not self.far_field:
            return tile.attend(exact)
        far = (lifted + math.log(size)).masked_fill(~candidates | opened, NEVER)
        whole = self._rows(tile, "value", self.value_size, self.value_code, chunks, pending[:0])
        values = [whole.repeat_interleave(self.value_size // size, 1), mean_rows(tile.value[:, pending], size)]
        if node_scores is not None:
            per_node = self.node_size // self.value_size
            node_values = whole.unflatten(1, (-1, per_node)).mean(2) if per_node > 1 else whole
            far = torch.cat([far, node_scores + math.log(self.node_size)], -1)
            values.append(node_values)
        return tile.attend(exact, far, torch.cat(values, 1))

    def _descend(
        self, tile: Tile, scores: Tensor, candidates: Tensor, chunks: int, pending: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep as candidates the groups of the best nodes; the scores of the other nodes."""
        keys = self._rows(tile, "key", self.node_size, self.key_code, chunks, pending[:0])
        node_scores = score(tile.query, keys)
        routed = (self.budget_tokens - self.sink_tokens - self.window_tokens) // self.group_size * self.group_size
        keep = -(-self.overselection * routed // self.node_size)
        if keep >= node_scores.shape[-1]:
            return scores, candidates, None
        best = self._choose(tile, None, node_scores, node_scores, keep).expand_as(node_scores)
        scored = best.repeat_interleave(self.node_size // self.group_size, -1)
        scored = torch.cat([scored, torch.ones_like(candidates[..., scored.shape[-1] :])], -1)
        return scores, candidates & scored, node_scores.masked_fill(best, NEVER)

    def _choose(
        self, tile: Tile, near: Tensor | None, scores: Tensor, gains: Tensor, keep: int | None = None
    ) -> Tensor:
        """Mark the chosen groups: bool (H, R', M, G)."""
        if keep is None:
            keep = (self.budget_tokens - self.sink_tokens - self.window_tokens) // self.group_size
        allowed = gains > NEVER
        heads, count = gains.shape[0], gains.shape[3]
        if self.vote == "local" or near is None:
            total = torch.logsumexp(gains, -1, keepdim=True)
        else:
            beside = torch.logsumexp(tile.logits.masked_fill(~near, NEVER), -1, keepdim=True)
            archive = torch.logsumexp(scores, -1, keepdim=True) + math.log(self.group_size)
            total = torch.logaddexp(beside, archive)
        mass = (gains - total).exp().nan_to_num(0.0)
        if self.vote in ("local", "global"):
            mass, allowed = mass.sum(1, keepdim=True), allowed[:, :1]
        elif self.vote == "max":
            mass, allowed = mass.amax(1, keepdim=True), allowed[:, :1]
        elif self.vote == "turns":
            ranks = mass.argsort(-1, descending=True).argsort(-1) * mass.shape[1]
            named = (ranks + torch.arange(mass.shape[1], device=mass.device)[:, None, None]).amin(1, keepdim=True)
            mass, allowed = 1 / (1.0 + named), allowed[:, :1]
        mass = mass.masked_fill(~allowed, -1.0)
        chosen = torch.zeros_like(allowed)
        if self.pool == "layer" and near is not None:
            flat = mass.permute(1, 2, 0, 3).flatten(2)  # (R', M, H * G)
            best = flat.topk(min(keep * heads, flat.shape[-1]), -1).indices
            taken = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, best, True)
            chosen = taken.unflatten(2, (heads, count)).permute(2, 0, 1, 3)
        else:
            best = mass.topk(min(keep, count), -1).indices
            chosen.scatter_(-1, best, self._worth_opening(tile, near, scores, best))
        return chosen & allowed

    def _worth_opening(self, tile: Tile, near: Tensor | None, scores: Tensor, best: Tensor) -> Tensor:
        """bool like best (H, R', M, K), groups in the order of their gains: those before `top_p` is reached."""
        if self.top_p >= 1 or near is None:
            return torch.ones_like(best, dtype=torch.bool)
        beside = torch.logsumexp(tile.logits.masked_fill(~near, NEVER), -1, keepdim=True)
        archive = torch.logsumexp(scores, -1, keepdim=True) + math.log(self.group_size)
        total = torch.logaddexp(beside, archive)
        mass, recalled = (scores + math.log(self.group_size) - total).exp(), (beside - total).exp()
        if best.shape[1] == 1:
            mass, recalled = mass.mean(1, keepdim=True), recalled.mean(1, keepdim=True)
        mass = mass.gather(-1, best)
        return recalled + mass.cumsum(-1) - mass < self.top_p

    def _order(self, tile: Tile, first: int, last: int) -> Tensor:
        """Token ids of chunks (H, chunks, C), ordered by content."""
        starts = self.sink_tokens + torch.arange(first, last, device=tile.key.device) * self.chunk_size
        where = slice(self.sink_tokens + first * self.chunk_size, self.sink_tokens + last * self.chunk_size)
        if first == last:
            return starts.new_empty(tile.key.shape[0], 0, self.chunk_size)
        parts = (x[:, where].unflatten(1, (-1, self.chunk_size)) for x in (tile.key, tile.value))
        return content_order(*parts, self.group_size) + starts[:, None]

    def _sorted(self, tile: Tile, name: str, first: int, last: int) -> Tensor:
        x = getattr(tile, name)
        index = tile.notes["order"][:, first:last].flatten(1)[..., None].expand(-1, -1, x.shape[-1])
        return x.gather(1, index).unflatten(1, (-1, self.chunk_size))

    def _rows(self, tile: Tile, name: str, size: int, code: str, chunks: int, pending: Tensor) -> Tensor:
        """Means of every `size` tokens, closed ones as they are kept: (H, units, D)."""

        def make(a: int, b: int) -> Tensor:
            return recode(mean_rows(self._sorted(tile, name, a, b), size), code, size)

        made = tile.once(f"{name} {size}", chunks, make).flatten(1, 2)
        return torch.cat([made, mean_rows(getattr(tile, name)[:, pending], size)], 1)

    def _spread(self, tile: Tile, name: str, chunks: int, pending: Tensor) -> Tensor:
        """Root mean square distance of a group's rows from their mean (H, G)."""

        def of(rows: Tensor) -> Tensor:
            units = rows.unflatten(-2, (-1, self.group_size))
            return (units - units.mean(-2, keepdim=True)).square().sum(-1).mean(-1).sqrt()

        def make(a: int, b: int) -> Tensor:
            return of(self._sorted(tile, name, a, b))

        made = tile.once(f"spread of {name}", chunks, make).flatten(1)
        return torch.cat([made, of(getattr(tile, name)[:, pending])], 1)


def recode(rows: Tensor, code: str, size: int) -> Tensor:
    """Rows of chunks (H, chunks, n, D), means of `size` tokens each, as they come back from `code`."""
    if code == "exact":
        return rows
    if code == "fp8":
        return decode_rows(encode_rows(rows, torch.float8_e4m3fn), rows.dtype)
    if code == "row4":
        return decode_nibbles(encode_nibbles(rows), rows.dtype)
    power, bits = {"h": 0.0, "n": 0.5, "w": 1.0}[code[0].lower()], int(code[1])
    if "f" in code:
        return _recode_differences(rows, power, bits, code[0].islower(), int(code.split("f")[1]) // size)
    middle = _rounded(rows.mean(2, keepdim=True))
    channel = _spread_along(rows - middle, 2) ** power
    mix = _hadamard(rows.shape[-1], rows)
    rest = (rows - middle) / channel @ mix
    node = torch.zeros_like(rest)
    if code[-1] == "t":
        means = rest.unflatten(2, (-1, 16 // size)).mean(3)
        node = _levels(means, _spread_along(means, -1), 4).repeat_interleave(16 // size, 2)
    coded = node + _levels(rest - node, _spread_along(rest - node, -1), bits)
    return middle + coded @ mix.mT * channel


def _recode_differences(rows: Tensor, power: float, bits: int, mixed: bool, per_node: int) -> Tensor:
    """Rows as differences to the fp8 mean of `per_node` of them; nodes themselves (per_node at most 1) as fp8."""
    if per_node <= 1:
        return recode(rows, "fp8", 1)
    nodes = recode(mean_rows(rows, per_node), "fp8", 1).repeat_interleave(per_node, 2)
    rest = rows - nodes
    channel = _spread_along(rest, 2) ** power
    mix = _hadamard(rows.shape[-1], rows) if mixed else torch.eye(rows.shape[-1]).to(rows)
    rest = rest / channel @ mix
    return nodes + _levels(rest, _spread_along(rest, -1), bits) @ mix.mT * channel


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def _spread_along(rows: Tensor, dim: int) -> Tensor:
    return _rounded(rows.square().mean(dim, keepdim=True).sqrt().clamp(min=1e-8))


def _levels(rows: Tensor, spread: Tensor, bits: int) -> Tensor:
    """Rows at the nearest of 2**bits levels around 0, for a normal variable of this spread."""
    step, half = spread * _STEPS[bits], 1 << (bits - 1)
    return ((rows / step).floor().clamp(-half, half - 1) + 0.5) * step


def _hadamard(width: int, like: Tensor) -> Tensor:
    matrix = like.new_ones(1, 1)
    while matrix.shape[0] < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / width**0.5


_BETTER = {"vote": "global", "gain": "key", "lift": 0.5, "sink_tokens": 4, "window_tokens": 32}
_CODED = {"key_code": "n2t", "value_size": 16, "value_code": "h4"}

BASES: dict[str, dict[str, Any]] = {
    "g4": {},
    "g8": {"group_size": 8, "value_size": 8},
    "g2": {"group_size": 2, "value_size": 2},
    "g1": {"group_size": 1, "value_size": 1},
    "n32": {"group_size": 8, "value_size": 32, "node_size": 32, "overselection": 12},
    "b4": _BETTER,
    "b2": _BETTER | {"group_size": 2, "value_size": 2},
    "k2": {
        "group_size": 2,
        "sink_tokens": 4,
        "window_tokens": 32,
        "key_code": "W2f16",
        "value_size": 16,
        "value_code": "row4",
        "node_size": 16,
        "overselection": 8,
    },
    "t4": _BETTER | _CODED,
    "t2": _BETTER | _CODED | {"group_size": 2},
    "t1": _BETTER | _CODED | {"group_size": 1, "gain": "mass", "lift": 0.0},
    "n16": {"group_size": 4, "value_size": 16, "node_size": 16, "overselection": 12},
}
"""Variants to start from: g and n as hga chooses, b with a better choice, t with fewer bytes, k2 as hga's defaults."""


def parse_variant(text: str, budget: int) -> Any:
    """`base+field=value+...` as a rule of `budget` tokens."""
    name, *changes = text.split("+")
    fields: dict[str, Any] = {"budget_tokens": budget}
    for change in changes:
        field, value = change.split("=")
        try:
            fields[field] = json.loads(value)
        except json.JSONDecodeError:
            fields[field] = value
    if name in PRESETS:
        return hga.HGAConfig.preset(name, **{"prefill": "routed", "store": "device"} | fields)
    if name in BASES:
        return Variant(**BASES[name] | fields)
    if name in PEERS and not changes:
        return PEERS[name](budget)
    raise ValueError(f"variant {text!r} is unknown; choose from {', '.join([*BASES, *PRESETS, *PEERS])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--document", type=Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--variants", required=True, help="semicolons between them, or @FILE with one a line")
    parser.add_argument("--budget", type=Fraction, default=Fraction(1, 32))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--skip", type=int, default=0, help="characters of each document to leave out first")
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--queries", type=int, default=256, help="sampled queries of --errors")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gguf = {"gguf_file": options.gguf_file} if options.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(options.model, **gguf)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype), **gguf)
    model = model.to(device).eval()
    given = options.variants
    names = Path(given[1:]).read_text().split() if given.startswith("@") else given.split(";")
    budget = int(options.budget * options.tokens)
    rules = {name: parse_variant(name, budget) for name in names}
    for document in options.document:
        text = document.read_text(errors="ignore")[options.skip :][: options.tokens * 8]
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.tokens].to(device)
        where = {
            "model": Path(options.gguf_file or options.model).name,
            "document": document.name,
            "skip": options.skip,
            "tokens": ids.shape[1],
            "budget": str(options.budget),
            "hardware": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU",
        }
        if options.errors:
            _show_errors(model, ids, rules, where, options.queries)
        else:
            _show_losses(model, ids, rules, where)


def _show_errors(model: Any, ids: Tensor, rules: dict[str, Any], where: dict[str, Any], queries: int) -> None:
    width = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    started = time.perf_counter()
    for name, found in zip(rules, measure_recall(model, ids, rules, queries=queries), strict=True):
        row = where | {
            "rule": name,
            "error": found.layer_error.mean().item(),
            "worst_layer": found.layer_error.max().item(),
            "recalled": found.recalled.mean().item(),
            "attended": found.attended,
            "fetched": found.fetched,
        }
        if isinstance(rules[name], SimulatedRule):
            row["summary_share"] = rules[name].metadata_share(width, ids.shape[1])
        print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    print(json.dumps({"seconds": round(time.perf_counter() - started, 1)}), flush=True)


def _show_losses(model: Any, ids: Tensor, rules: dict[str, Any], where: dict[str, Any]) -> None:
    for found in evaluate_nll(model, ids, {"dense": None, **rules}):
        row = where | found.row()
        print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


if __name__ == "__main__":
    main()
