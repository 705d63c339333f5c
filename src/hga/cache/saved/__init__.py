"""Contexts that outlive the process: a cache in a file, its identity, and its way back."""

from hga.cache.saved.context import Report, SavedContext
from hga.cache.saved.file import check_place
from hga.cache.saved.load import load_context, read_context, verify_context
from hga.cache.saved.save import save_context

__all__ = ["Report", "SavedContext", "check_place", "load_context", "read_context", "save_context", "verify_context"]
