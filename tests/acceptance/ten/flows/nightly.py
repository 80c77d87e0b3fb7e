"""Each night: count what has happened since."""

import datetime as dt
import logging

from pgflow_prefect import Workflow

workflow = Workflow("nightly", tags=["night"])
log = logging.getLogger(__name__)


@workflow.step
def find_day() -> dt.date:
    log.info("counting for %s", dt.datetime.now(dt.UTC).date())
    return dt.datetime.now(dt.UTC).date() - dt.timedelta(days=1)


@workflow.step
def report(find_day: dt.date) -> bool:
    return find_day < dt.datetime.now(dt.UTC).date()


flow = workflow.flow
