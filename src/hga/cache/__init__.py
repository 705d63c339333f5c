"""A layer's window, archive and summaries, and the transformers cache made of them."""

from hga.cache.cache import HGACache, common_prefix
from hga.cache.layer import HGALayer
from hga.cache.stats import CacheStats

__all__ = ["CacheStats", "HGACache", "HGALayer", "common_prefix"]
