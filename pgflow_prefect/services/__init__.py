"""What runs all the time: worker, bridge, serve, and what they do beside runs."""
