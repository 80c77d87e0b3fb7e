"""Deployments: they let Prefect's workers, schedules and buttons start runs of a workflow.

`wanted` describes the deployment that should exist, `find` reads those that exist, and `plan` compares the two. `apply`
executes plans, and `write` executes one.
"""

from pgflow_prefect.deployment.deployments.apply import deploy, register
from pgflow_prefect.deployment.deployments.entrypoint import make_entrypoint
from pgflow_prefect.deployment.deployments.find import FoundDeployments, find_deployments
from pgflow_prefect.deployment.deployments.plan import Outcome
from pgflow_prefect.deployment.deployments.wanted import DEPLOYMENT, Options
from pgflow_prefect.deployment.deployments.write import Deployed

__all__ = [
    "DEPLOYMENT",
    "Deployed",
    "FoundDeployments",
    "Options",
    "Outcome",
    "deploy",
    "find_deployments",
    "make_entrypoint",
    "register",
]
