"""A map of each kind, one over the other: in the database, by an endpoint, and by the worker of a queue."""

from pgflow_prefect import HttpEndpoint, Queue, SqlFunction, Workflow

workflow = Workflow("parcels")


workflow.bind_map("weigh", SqlFunction("shop.weigh", batch=2), over="payload.parcels")
workflow.bind_map("label", HttpEndpoint("http://labels.test/"), over="weigh", at_once=2)
workflow.bind_map("hand_over", Queue("pgqueuer:parcels"), over="label")


@workflow.step
def sign(hand_over: list[str]) -> str:
    return ", ".join(hand_over)


flow = workflow.flow
