"""What a workflow is: its graph, where definitions come from, and how two of them differ."""
