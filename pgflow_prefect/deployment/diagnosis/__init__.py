"""`pgflow-prefect doctor`: one check after the other, each with its sentence and its advice."""
