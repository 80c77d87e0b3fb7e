"""Names Prefect's server without the secrets that its URL may have."""

from urllib.parse import urlsplit, urlunsplit

from prefect.settings import get_current_settings


def name_server() -> str:
    """Return the URL of Prefect's API without user, password and query; empty if none is set."""
    parts = urlsplit(get_current_settings().api.url or "")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def describe_error(error: BaseException) -> str:
    """Return an error's message without those secrets, because libraries may put the whole URL into it."""
    message = str(error) or type(error).__name__
    url = get_current_settings().api.url
    if not url:
        return message
    netloc = urlsplit(url).netloc
    return message.replace(netloc, netloc.rpartition("@")[2])
