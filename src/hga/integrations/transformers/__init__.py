"""transformers: the attention implementation "hga", and `enable` for a loaded model."""

from hga.integrations.transformers.attention import register_attention
from hga.integrations.transformers.enable import disable, enable, enabled

__all__ = ["disable", "enable", "enabled", "register_attention"]
