"""Handlers do the work of steps, one file a kind of handler."""
