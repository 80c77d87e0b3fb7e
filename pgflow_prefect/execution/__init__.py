"""One run as a Prefect flow: the flow, the order of its steps, the task of a step, the mirror to Postgres."""
