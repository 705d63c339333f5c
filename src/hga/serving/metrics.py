"""What the server tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("hga_requests", "Requests, by path and status.", ["path", "status"], registry=registry)
        self.cancelled = Counter("hga_requests_cancelled", "Requests whose client went away.", registry=registry)
        self.under_way = Gauge("hga_requests_under_way", "Requests that wait, read or write.", registry=registry)
        self.prompt_tokens = Counter("hga_prompt_tokens", "Prompt tokens of finished answers.", registry=registry)
        self.cached_tokens = Counter(
            "hga_cached_tokens", "Prompt tokens of finished answers that had been read before.", registry=registry
        )
        self.read_tokens = Counter("hga_read_tokens", "Prompt tokens that the model read.", registry=registry)
        self.new_tokens = Counter("hga_new_tokens", "Tokens written in finished answers.", registry=registry)
        self.first_token_seconds = Histogram(
            "hga_first_token_seconds", "From a request to its first token.", buckets=_SECONDS, registry=registry
        )
        self._contexts = Gauge("hga_contexts", "Contexts kept for later prompts.", registry=registry)
        self._bytes = Gauge("hga_context_bytes", "Bytes of kept contexts, by tier.", ["tier"], registry=registry)
        self._evictions = Gauge("hga_contexts_evicted", "Contexts forgotten for the byte limit.", registry=registry)

    def kept(self, contexts: int, held_bytes: dict[str, int], evictions: int) -> None:
        """Note what is kept now."""
        self._contexts.set(contexts)
        self._evictions.set(evictions)
        for tier in {"gpu", "ram"} | held_bytes.keys():
            self._bytes.labels(tier).set(held_bytes.get(tier, 0))

    def render(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)
