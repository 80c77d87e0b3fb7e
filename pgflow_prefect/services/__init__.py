"""Services that run all the time: worker, bridge, serve, and their background tasks."""
