"""`python -m pgflow_prefect` is `pgflow-prefect`."""

from pgflow_prefect.cli import main

if __name__ == "__main__":
    main()
