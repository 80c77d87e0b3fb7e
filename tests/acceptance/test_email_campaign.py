"""The example workflow sends real mails: into a Maildir, or to a mail server."""

import mailbox
import socket
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from pgflow_prefect.shipped import shipped_path
from tests.acceptance.conftest import CommandLine
from tests.conftest import Connection
from tests.engine import get_state

pytestmark = pytest.mark.once

RECIPIENTS = 20
"""In recipients.csv: 24 rows, three of them unsubscribed, and one there twice."""

RUN = ("run", "email_campaign", "--handlers", str(shipped_path("flows", "email_campaign.py")))


class Postbox:
    """Takes mails; tells the client once, at the sixth, to try again later."""

    def __init__(self) -> None:
        self.mails: list[Message] = []
        self.refused = 0

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        if len(self.mails) == 5 and not self.refused:
            self.refused += 1
            return "451 try again later"
        assert isinstance(envelope.content, bytes)
        self.mails.append(message_from_bytes(envelope.content))
        return "250 taken"


@pytest.fixture
def postbox() -> Postbox:
    return Postbox()


@pytest.fixture
def smtp_url(postbox: Postbox) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Controller(postbox, hostname="127.0.0.1", port=port)
    server.start()
    yield f"smtp://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def campaign(cli: CommandLine, db: Connection) -> CommandLine:
    """The command line where the workflow is defined."""
    db.execute(shipped_path("flows", "email_campaign", "workflow.sql").read_bytes())
    return cli


def test_mails_go_into_a_maildir_by_default(campaign: CommandLine, db: Connection) -> None:
    ran = campaign(*RUN, "--payload", '{"campaign_id": 7, "subject": "News in März"}')

    assert ran.code == 0
    assert ran.err.endswith("INFO send_emails: sent 20 mails, 0 were there already\n")
    mails = list(mailbox.Maildir(campaign.directory / "Maildir", create=False))
    assert len(mails) == len({mail["X-Recipient"] for mail in mails}) == RECIPIENTS
    assert {mail["Message-ID"] for mail in mails}.isdisjoint({None})
    assert get_state(db, ran.find_run_id(), "generate_report").step_result == {
        "campaign_id": 7,
        "recipients": RECIPIENTS,
        "delivered": RECIPIENTS,
        "by_domain": {"example.com": 10, "example.net": 4, "example.org": 6},
    }


def test_mails_go_to_a_server_and_a_refused_one_is_tried_again(
    campaign: CommandLine, db: Connection, postbox: Postbox, smtp_url: str
) -> None:
    ran = campaign(*RUN, "--payload", '{"campaign_id": 8}', SMTP_URL=smtp_url)

    assert ran.code == 0
    assert "Retry 1/3" in ran.err
    assert postbox.refused == 1
    assert "send_emails\tAwaitingRetry" in ran.lines
    assert get_state(db, ran.find_run_id(), "send_emails").attempts == 2
    assert len({mail["X-Recipient"] for mail in postbox.mails}) == RECIPIENTS
    sent = [mail["Message-ID"] for mail in postbox.mails]
    assert len(sent) == RECIPIENTS + 5
    assert sent[5:10] == sent[:5], "the same mails: it is by their ids that a mail server drops the second ones"
    assert not (campaign.directory / "Maildir").exists()
