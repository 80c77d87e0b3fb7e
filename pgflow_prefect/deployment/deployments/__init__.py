"""Deployments: what Prefect knows a workflow by, so that its workers, its schedules and its buttons can start runs.

`wanted` says what a deployment should be, `find` what there is, `plan` compares the two, `apply` carries that out and
`write` does so for one.
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
