"""The one place where a routing rule is described: `HGAConfig`, its checks and its presets."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any, Literal

TILE_TOKENS = 64
"""Positions that agree on which chunks count as closed (design: the tile grid makes prefill block-free)."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "ordering": ("content", "position"),
    "summary": ("mean", "mixed_rope"),
    "selection": ("shared", "per_head", "mixed"),
    "summary_dtype": ("auto", "model", "float32", "bfloat16", "float16", "fp8"),
    "kv_dtype": ("model", "int8", "fp8"),
    "prefill": ("auto", "exact", "routed", "nodes"),
    "store": ("ram", "device", "nvme", "auto"),
}


@dataclass(frozen=True, kw_only=True)
class HGAConfig:
    """How old context is summarised, routed and kept. Immutable, validated, JSON round trip.

    Units are tokens of one sequence. Defaults are the preset `balanced`.

    chunk_size: tokens of one storage record; also the scope of content ordering.
    group_size: tokens of the unit that is routed, fetched and attended exactly.
    node_size: tokens of a first-level summary: `chunk_size` in the paper; smaller nodes of the content tree tell
        more. Equal to group_size when routing has one level.
    overselection: candidates per routed token: only the best nodes, which together hold this many times the
        routed tokens, have their groups scored. "all" scores every group (then node_size = group_size).
    coded: keep a group's key as its difference from its node's in two bits a number, a node's value in four bits, with
        a step a row each (two levels only). False keeps them as node keys are (`summary_dtype`).
    sink_tokens: first tokens, always attended.
    window_tokens: most recent tokens, always attended. The window starts on a group boundary, so it holds
        between `window_tokens - group_size + 1` and `window_tokens` of them.
    budget_tokens: upper bound of the tokens attended exactly per query head and step; sink, window and
        unclosed tokens count. It does not grow with the context.
    ordering: how a closing chunk's tokens form groups: by "content" or by "position".
    summary: "mean" of the stored keys, or the paper's "mixed_rope" mean (by position only).
    far_field: whether unopened tokens take part through their summaries (the paper: no).
    selection: the R query heads of a KV head share one choice ("shared"), or each makes its own ("per_head"), or they
        share it but in the model's last layers ("mixed"): a third of them where R is 6 or more, 2/R of them where it is
        less, so that all models fetch 1.4 to 1.9 times as much (docs/fidelity.md).
    summary_dtype: "auto" is one width below the K/V's: float32 -> bfloat16, 16 bits -> fp8 with a scale a row.
    kv_dtype: type of the stored K/V; only "model" is built, "int8" and "fp8" are refused for now.
    prefill: "routed": every query is routed; "exact": a forward of several tokens attends densely to
        everything before it; "auto": so does a forward of `exact_block_tokens` or more, 512 by default, which is faster
        than routing them; a shorter one only at positions below `4 * budget_tokens`. "nodes": as "auto", but such a
        forward is routed by whole nodes (`by_nodes`): long prompts are read faster than exactly, and lose more than
        what is routed by groups.
    node_budget_tokens: the budget of what is routed by whole nodes, by default `budget_tokens`. Of a node few tokens
        matter, so four times as many lose about as little as groups do.
    dense_below: queries at positions below this attend densely.
    dense_layers: indices of layers that keep the model's own cache.
    store: "ram" (host memory), "device" (beside the model), "nvme" (a scratch file with a RAM cache over it), or
        "auto": host memory until the archive outgrows the RAM cache, then as "nvme".
    ram_cache_bytes: host memory of that cache, all layers together (at least a chunk a layer is taken); by default
        half of what is free when the first chunk closes.
    block_tokens: a long prompt is fed to the model in blocks of one size, of at most so many tokens.
    """

    chunk_size: int = 256
    group_size: int = 2
    node_size: int = 16
    overselection: int | Literal["all"] = 8
    coded: bool = True
    sink_tokens: int = 4
    window_tokens: int = 32
    budget_tokens: int = 2048
    ordering: Literal["content", "position"] = "content"
    summary: Literal["mean", "mixed_rope"] = "mean"
    far_field: bool = True
    selection: Literal["shared", "per_head", "mixed"] = "shared"
    summary_dtype: Literal["auto", "model", "float32", "bfloat16", "float16", "fp8"] = "auto"
    kv_dtype: Literal["model", "int8", "fp8"] = "model"
    prefill: Literal["auto", "exact", "routed", "nodes"] = "auto"
    node_budget_tokens: int | None = None
    dense_below: int = 0
    dense_layers: tuple[int, ...] = ()
    store: Literal["ram", "device", "nvme", "auto"] = "ram"
    ram_cache_bytes: int | None = None
    block_tokens: int = 4096

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        self._check_types()
        self._check_layout()
        self._check_budget()
        self._check_combinations()

    @property
    def routed_groups(self) -> int:
        """Groups that a query may open: what the budget leaves after sink and window."""
        return (self.budget_tokens - self.sink_tokens - self.window_tokens) // self.group_size

    @property
    def two_level(self) -> bool:
        """Whether nodes are scored before groups (overselection is a number)."""
        return self.overselection != "all"

    @property
    def candidate_nodes(self) -> int:
        """Nodes whose groups are scored, when routing has two levels."""
        if self.overselection == "all":
            raise ValueError("candidate_nodes exists only with a numeric overselection; this config scores all")
        wanted = self.overselection * max(1, self.routed_groups) * self.group_size
        return max(1, -(-wanted // self.node_size))

    def of_layer(self, index: int, layers: int, repeats: int) -> HGAConfig:
        """The config of one of a model's `layers`, R = `repeats`: as this one, its selection never "mixed"."""
        if self.selection != "mixed":
            return self
        share = max(1 / 3, min(1.0, 2 / repeats))  # the more heads choose apart, the more they fetch between them
        return self.replace(selection="per_head" if index >= layers - round(layers * share) else "shared")

    def selectors(self, repeats: int) -> int:
        """Choices that the `repeats` query heads of a KV head make. ValueError for "mixed", which differs by layer."""
        if self.selection == "mixed":
            raise ValueError("selection='mixed' is a model's rule, not a layer's; take HGAConfig.of_layer first")
        return repeats if self.selection == "per_head" else 1

    @property
    def dense_positions(self) -> int:
        """Queries at positions below this attend densely, whatever block they come in."""
        return max(self.dense_below, 4 * self.budget_tokens if self.tells_blocks_apart else 0)

    @property
    def tells_blocks_apart(self) -> bool:
        """Whether a long forward is read otherwise than a short one of several tokens."""
        return self.prefill in ("auto", "nodes")

    @property
    def exact_block_tokens(self) -> int:
        """A forward of so many tokens attends densely to everything before it.

        With prefill="auto" 512: a shorter one (a turn behind a long context, speculation) is not worth streaming the
        whole archive. Less where `block_tokens` would cut a long prompt into blocks below it.
        """
        return {"exact": 2, "auto": self._long_block_tokens}.get(self.prefill, sys.maxsize)

    @property
    def node_block_tokens(self) -> int:
        """A forward of so many tokens is routed `by_nodes`: as `exact_block_tokens`, with prefill="nodes"."""
        return self._long_block_tokens if self.prefill == "nodes" else sys.maxsize

    @property
    def _long_block_tokens(self) -> int:
        return min(512, -(-self.block_tokens // 2))

    def by_nodes(self) -> HGAConfig:
        """The rule that opens whole nodes of the same chunks: one level, and groups as large as nodes."""
        return self.replace(
            group_size=self.node_size,
            overselection="all",
            coded=False,
            prefill="routed",
            budget_tokens=self.budget_tokens if self.node_budget_tokens is None else self.node_budget_tokens,
            node_budget_tokens=None,
        )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> HGAConfig:
        """The named preset with `changes` applied. ValueError names the presets there are."""
        if name not in PRESETS:
            raise ValueError(f"preset={name!r} is unknown; choose one of {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | changes))

    def replace(self, **changes: Any) -> HGAConfig:
        """A copy with `changes` applied and validated."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal config."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> HGAConfig:
        """Parse `to_json`'s text. ValueError for malformed JSON or unknown fields."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a JSON text: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"expected a JSON object of HGAConfig fields, got {type(fields).__name__}")
        unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown HGAConfig fields {unknown}; they may come from another version of hga")
        return cls(**fields)

    def _check_types(self) -> None:
        for name in (
            *("chunk_size", "group_size", "node_size", "sink_tokens", "window_tokens"),
            *("budget_tokens", "dense_below", "block_tokens"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                hint = "; fractions of a context exist only in `hga eval`" if isinstance(value, float) else ""
                raise TypeError(f"{name}={value!r} must be an integer number of tokens{hint}")
            least = 0 if name in ("sink_tokens", "dense_below") else 1
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        for name, unit in (("ram_cache_bytes", "bytes"), ("node_budget_tokens", "tokens")):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name}={value!r} must be an integer number of {unit}, or None")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}")
        for name in ("far_field", "coded"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False")
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.dense_layers):
            raise ValueError(f"dense_layers={self.dense_layers} must be layer indices, 0 or more")
        if self.overselection != "all" and (
            isinstance(self.overselection, bool) or not isinstance(self.overselection, int) or self.overselection < 1
        ):
            raise ValueError(f"overselection={self.overselection!r} must be an integer of at least 1, or 'all'")

    def _check_layout(self) -> None:
        chunk, node, group = self.chunk_size, self.node_size, self.group_size
        if chunk % group:
            raise ValueError(f"group_size={group} must divide chunk_size={chunk}; {chunk} % {group} = {chunk % group}")
        if chunk % node or node % group:
            raise ValueError(f"node_size={node} must be a multiple of group_size={group} and divide chunk_size={chunk}")
        groups = chunk // group
        if self.ordering == "content" and groups & (groups - 1):
            raise ValueError(
                f"chunk_size / group_size = {groups} must be a power of two for ordering='content' "
                "(the tree halves a chunk until a group is left); change one of them or use ordering='position'"
            )
        if (self.overselection == "all") != (node == group):
            raise ValueError(
                f"overselection={self.overselection!r} with node_size={node}, group_size={group}: 'all' scores "
                "every group, which needs node_size = group_size; a number needs node_size > group_size"
            )
        if self.window_tokens < group:
            raise ValueError(f"window_tokens={self.window_tokens} must be at least group_size={group}")

    def _check_budget(self) -> None:
        always = self.sink_tokens + self.window_tokens
        least = always if self.far_field else always + self.group_size
        if self.budget_tokens < least:
            why = (
                "sink and window are always attended"
                if self.far_field
                else ("sink, window and one routed group; without a far field nothing else of the past is seen")
            )
            raise ValueError(
                f"budget_tokens={self.budget_tokens} must be at least {least} = {why}; "
                f"raise the budget or lower sink_tokens={self.sink_tokens}, window_tokens={self.window_tokens}"
            )

    def _check_combinations(self) -> None:
        if self.summary == "mixed_rope" and self.ordering != "position":
            raise ValueError(
                "summary='mixed_rope' rotates keys to the middle of consecutive positions: it needs "
                f"ordering='position', got {self.ordering!r}"
            )
        if self.coded:
            if not self.two_level or self.summary != "mean":
                raise ValueError(
                    "coded=True keeps differences from the mean key of a node: it needs a numeric overselection and "
                    f"summary='mean', got {self.overselection!r} and {self.summary!r}; use coded=False"
                )
            per_node = self.node_size // self.group_size
            if per_node & (per_node - 1):
                raise ValueError(
                    f"node_size / group_size = {per_node} must be a power of two with coded=True; change one of them "
                    "or use coded=False"
                )
        if self.ram_cache_bytes is not None:
            if self.store not in ("nvme", "auto"):
                raise ValueError(
                    f"ram_cache_bytes={self.ram_cache_bytes} has no meaning with store={self.store!r}; it is the RAM "
                    "cache of store='nvme' and 'auto'"
                )
            if self.ram_cache_bytes < 1:
                raise ValueError(f"ram_cache_bytes={self.ram_cache_bytes} must be at least 1; None takes the default")
        if self.prefill == "nodes":
            try:
                self.by_nodes()
            except ValueError as error:
                raise ValueError(
                    f"prefill='nodes' opens whole nodes of node_size={self.node_size}, with "
                    f"node_budget_tokens={self.node_budget_tokens} (None: budget_tokens) as the budget: {error}"
                ) from error
        elif self.node_budget_tokens is not None:
            raise ValueError(
                f"node_budget_tokens={self.node_budget_tokens} has no meaning with prefill={self.prefill!r}; it is the "
                "budget of prefill='nodes'"
            )
        if self.kv_dtype != "model":
            raise ValueError(
                f"kv_dtype={self.kv_dtype!r}: quantised K/V (one scale a row) is laid out but not built yet; "
                "use kv_dtype='model'"
            )


PRESETS: dict[str, dict[str, Any]] = {
    "balanced": {},
    "mixed": {"selection": "mixed"},
    "fidelity": {"selection": "per_head", "budget_tokens": 4096, "overselection": 16},
    "lean": {"group_size": 4, "node_size": 32},
    "paper": {
        "chunk_size": 64,
        "group_size": 16,
        "node_size": 64,
        "overselection": 2,
        "coded": False,
        "sink_tokens": 128,
        "window_tokens": 512,
        "budget_tokens": 1152,
        "ordering": "position",
        "summary": "mixed_rope",
        "far_field": False,
    },
    "contiguous": {
        "chunk_size": 64,
        "group_size": 16,
        "node_size": 16,
        "overselection": "all",
        "coded": False,
        "sink_tokens": 16,
        "window_tokens": 64,
        "ordering": "position",
        "far_field": False,
    },
}
"""Fields in which a preset differs from the defaults. `balanced` is the default."""
