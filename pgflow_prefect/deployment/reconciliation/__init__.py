"""Comparing PostgreSQL with Prefect: what each says, the rules, what they disagree about, the repairs."""
