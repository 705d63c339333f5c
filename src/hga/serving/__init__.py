"""Answering many prompts on one model: chats and completions that share what was read (extra `serve`)."""
