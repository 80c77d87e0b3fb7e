"""Send a campaign: read who gets it, send each recipient a mail, count what was delivered.

The workflow itself is SQL (`email_campaign/workflow.sql`); here is what its steps do. Mails go to the server that
`SMTP_URL` names (`smtp://[user:password@]host[:port]`, or `smtps://` for TLS), else into the Maildir that `MAILDIR`
names, else into one in the working directory.
"""

import csv
import mailbox
import os
import smtplib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit
from uuid import NAMESPACE_URL, uuid5

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel

from pgflow_prefect import StepContext, Workflow

HERE = Path(__file__).parent / "email_campaign"
SENDER = "The team <team@example.com>"
TIMEOUT = 30  # seconds to wait for the mail server

workflow = Workflow("email_campaign")


class Campaign(BaseModel):
    """The payload of a run."""

    campaign_id: int
    subject: str = "What is new this month"
    text: str = "The new reports are here: open your dashboard to see them."


class Recipient(BaseModel):
    """A person who gets the campaign."""

    name: str
    email: str
    plan: str


class Delivery(BaseModel):
    """What was sent, and where it can be looked up."""

    sent: list[str]
    already_there: list[str]
    maildir: Path | None


class Report(BaseModel):
    """What became of the campaign."""

    campaign_id: int
    recipients: int
    delivered: int
    by_domain: dict[str, int]


@workflow.step(shadow=True)
def prepare_list() -> list[Recipient]:
    """Read the recipients: no one twice, and none who has unsubscribed."""
    recipients: dict[str, Recipient] = {}
    with (HERE / "recipients.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["unsubscribed"] == "no":
                recipients.setdefault(row["email"].lower(), Recipient.model_validate(row))
    return list(recipients.values())


@workflow.step(retries=3, retry_delay_seconds=[1, 10, 60], timeout_seconds=300)
def send_emails(prepare_list: list[Recipient], payload: Campaign, context: StepContext) -> Delivery:
    """Send each recipient a mail. A retry sends no second mail to a recipient whose mail is in the Maildir."""
    sent, already_there = [], []
    with open_outbox() as event_sender:
        known = event_sender.list_message_ids()
        for recipient in prepare_list:
            message = write_mail(recipient, payload, context.idempotency_key)
            if message["Message-ID"] in known:
                already_there.append(recipient.email)
                continue
            event_sender.send(message)
            sent.append(recipient.email)
        context.logger.info("sent %d mails, %d were there already", len(sent), len(already_there))
        return Delivery(sent=sent, already_there=already_there, maildir=event_sender.maildir)


@workflow.step
def generate_report(send_emails: Delivery, payload: Campaign, context: StepContext) -> Report:
    """Count what is in the Maildir; of what went to a server, what the server took."""
    recipients = [*send_emails.sent, *send_emails.already_there]
    if send_emails.maildir is None:
        delivered = recipients
    else:
        run = str(context.run_id)
        mails = mailbox.Maildir(send_emails.maildir, create=False)
        delivered = [str(mail["X-Recipient"]) for mail in mails if mail["X-Run-ID"] == run]
    return Report(
        campaign_id=payload.campaign_id,
        recipients=len(recipients),
        delivered=len(delivered),
        by_domain=Counter(address.rpartition("@")[2] for address in delivered),
    )


def write_mail(recipient: Recipient, campaign: Campaign, idempotency_key: str) -> EmailMessage:
    """Return the mail for one recipient; its Message-ID is the same each time that this step is executed."""
    templates = Environment(loader=FileSystemLoader(HERE), undefined=StrictUndefined, autoescape=False)  # noqa: S701
    text = templates.get_template("mail.txt.jinja").render(recipient=recipient, campaign=campaign)
    message = EmailMessage()
    message["From"] = SENDER
    message["To"] = f"{recipient.name} <{recipient.email}>"
    message["Subject"] = campaign.subject
    message["Message-ID"] = f"<{uuid5(NAMESPACE_URL, f'{idempotency_key}/{recipient.email}')}@example.com>"
    message["X-Recipient"] = recipient.email
    message["X-Run-ID"] = idempotency_key.partition("/")[0]
    message.set_content(text)
    return message


class EventSender(Protocol):
    """Where mails go."""

    maildir: Path | None

    def list_message_ids(self) -> set[str]:
        """Return the Message-IDs of the mails that are known to have arrived."""

    def send(self, message: EmailMessage) -> None:
        """Deliver a mail."""


class MaildirOutbox:
    """A directory of mails, as mail programs read it."""

    def __init__(self, maildir: Path) -> None:
        self.maildir: Path | None = maildir.resolve()
        self._box = mailbox.Maildir(maildir)

    def list_message_ids(self) -> set[str]:
        """Return the Message-IDs of all mails in it."""
        return {str(mail["Message-ID"]) for mail in self._box}

    def send(self, message: EmailMessage) -> None:
        """Put a mail into it, in one move."""
        self._box.add(message)


class SmtpOutbox:
    """A mail server."""

    maildir: Path | None = None

    def __init__(self, server: smtplib.SMTP) -> None:
        self._server = server

    def list_message_ids(self) -> set[str]:
        """Return nothing: a mail server does not tell; it is its Message-ID by which it drops a second copy."""
        return set()

    def send(self, message: EmailMessage) -> None:
        """Hand a mail to the server."""
        self._server.send_message(message)


@contextmanager
def open_outbox() -> Iterator[EventSender]:
    """Open what the environment names."""
    if not (url := os.environ.get("SMTP_URL")):
        yield MaildirOutbox(Path(os.environ.get("MAILDIR", "Maildir")))
        return
    parts = urlsplit(url)
    connect = smtplib.SMTP_SSL if parts.scheme == "smtps" else smtplib.SMTP
    with connect(parts.hostname or "localhost", parts.port or 0, timeout=TIMEOUT) as server:
        if parts.username:
            server.login(unquote(parts.username), unquote(parts.password or ""))
        yield SmtpOutbox(server)


flow = workflow.flow
