"""Draws pictures of workflows and runs as text: pure functions, one file a kind of picture."""
