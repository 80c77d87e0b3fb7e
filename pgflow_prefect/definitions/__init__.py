"""Definitions of workflows: their graph, their sources, and their differences."""
