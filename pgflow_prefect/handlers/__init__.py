"""How the work of a step is done, one file a kind of handler."""
