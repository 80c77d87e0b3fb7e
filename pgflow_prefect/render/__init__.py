"""Pictures of workflows and of their runs, as text: pure functions, one file a kind of picture."""
