"""Send a mail to each of some people."""

import smtplib
from email.message import EmailMessage

from pydantic import BaseModel

from pgflow_prefect import StepContext, Workflow

workflow = Workflow("mailing")


class Mailing(BaseModel):
    port: int
    people: list[str]


@workflow.step
def write(payload: Mailing) -> dict[str, str]:
    return {address: f"Dear {address.partition('@')[0].title()}," for address in payload.people}


@workflow.step(retries=3, retry_delay_seconds=1, timeout_seconds=60)
def send(write: dict[str, str], payload: Mailing, context: StepContext) -> int:
    with smtplib.SMTP("127.0.0.1", payload.port) as server:
        for address, text in write.items():
            message = EmailMessage()
            message["From"], message["To"], message["Subject"] = "shop@example.com", address, "News"
            message["Message-ID"] = f"<{context.idempotency_key}/{address}>"
            message.set_content(text)
            server.send_message(message)
    return len(write)


flow = workflow.flow
