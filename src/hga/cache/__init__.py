"""A layer's window, archive and summaries, and the transformers cache made of them."""

from hga.cache.cache import CacheStats, HGACache, common_prefix
from hga.cache.layer import HGALayer

__all__ = ["CacheStats", "HGACache", "HGALayer", "common_prefix"]
