"""One run as a Prefect flow: the flow, the order of its steps, the task of a step, what is written to PostgreSQL."""
