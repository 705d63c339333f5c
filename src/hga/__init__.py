"""Hierarchical Global Attention: a pretrained transformer reads more context than its GPU can hold.

import hga
hga.enable(model)                      # or: past_key_values=hga.HGACache(config=model.config)
model.generate(**inputs)
"""

from hga.cache import CacheStats, HGACache, common_prefix
from hga.config import HGAConfig
from hga.integrations.transformers import disable, enable, enabled, register_attention

__version__ = "0.1.0"
__all__ = ["CacheStats", "HGACache", "HGAConfig", "common_prefix", "disable", "enable", "enabled"]

register_attention()
