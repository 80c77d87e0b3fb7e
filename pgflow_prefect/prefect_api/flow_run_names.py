"""Names flow runs, and recognises names that Prefect has made up."""

import re
from uuid import UUID

from pgflow_prefect.wording import clean

_COOL_NAME = re.compile(r"[a-z]+-[a-z]+")
"""Prefect's name of a flow run that is created without one: an adjective and an animal."""

# Prefect's form behind the Run button fills in a star of science fiction: a Greek letter, perhaps with a number, one of
# more than a thousand names, and perhaps a word more. With a number, or with such a word, no person has chosen it.
_LETTERS = (
    "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|omicron|pi|rho|sigma|tau|"
    "upsilon|phi|chi|psi|omega"
)
_LAST_WORDS = (
    "[a-z]|adjunct|anomaly|band|boundary|cloud|cluster|collapse|conflux|expanse|field|fringe|instability|manifold|"
    "mass|nebula|point|quadrant|reach|ring|sector|shift|tensor|terminus|vector|void|warp"
)
_STAR = re.compile(rf"(?:{_LETTERS})(?:\d+(?:-[a-z]+){{1,3}}|(?:-[a-z]+){{1,2}}-(?:{_LAST_WORDS}))")


def name_flow_run(workflow_slug: str, run_id: UUID) -> str:
    """Return the name of a run's flow run: its workflow, and the beginning of its id."""
    return f"{clean(workflow_slug)}-{str(run_id)[:8]}"


def is_made_up(name: str) -> bool:
    """Tell whether Prefect made a name up, so that no user needs it."""
    return _COOL_NAME.fullmatch(name) is not None or _STAR.fullmatch(name) is not None
