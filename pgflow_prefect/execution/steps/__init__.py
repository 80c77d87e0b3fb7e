"""How one step is done: its claim, its work or its wait, its items, what of it is reported to PostgreSQL."""
