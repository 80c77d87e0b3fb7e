"""What users write against: a workflow's handlers, and the Prefect flow that they make."""

from pgflow_prefect.workflow.workflow import Workflow, to_flow_name

__all__ = ["Workflow", "to_flow_name"]
