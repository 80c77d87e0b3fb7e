"""What the flow runs of runs are called, and which names of a flow run no person has chosen."""

import re
from uuid import UUID

from pgflow_prefect.wording import clean

_COOL_NAME = re.compile(r"[a-z]+-[a-z]+")
"""What Prefect calls a flow run that is created without a name: an adjective and an animal."""

# Prefect's form behind the Run button fills in a star: a Greek letter, perhaps with a number, its constellation in the
# genitive, and perhaps a word more.
_LETTERS = (
    "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|omicron|pi|rho|sigma|tau|"
    "upsilon|phi|chi|psi|omega"
)
_CONSTELLATIONS = (
    "andromedae|antliae|apodis|aquarii|aquilae|arae|arietis|aurigae|bootis|caeli|camelopardalis|cancri|"
    "canis-majoris|canis-minoris|canum-venaticorum|capricorni|carinae|cassiopeiae|centauri|cephei|ceti|"
    "chamaeleontis|circini|columbae|comae-berenices|coronae-australis|coronae-borealis|corvi|crateris|crucis|"
    "cygni|delphini|doradus|draconis|equulei|eridani|fornacis|geminorum|gruis|herculis|horologii|hydrae|hydri|"
    "indi|lacertae|leonis|leonis-minoris|leporis|librae|lupi|lyncis|lyrae|mensae|microscopii|monocerotis|"
    "muscae|normae|octantis|ophiuchi|orionis|pavonis|pegasi|persei|phoenicis|pictoris|piscis-austrini|piscium|"
    "puppis|pyxidis|reticuli|sagittae|sagittarii|scorpii|sculptoris|scuti|serpentis|sextantis|tauri|"
    "telescopii|trianguli|trianguli-australis|tucanae|ursae-majoris|ursae-minoris|velorum|virginis|volantis|"
    "vulpeculae"
)
_STAR = re.compile(rf"(?:{_LETTERS})\d*-(?:{_CONSTELLATIONS})(?:-[a-z]+)?")


def name_flow_run(workflow_slug: str, run_id: UUID) -> str:
    """Return what a run's flow run is called: its workflow, and the beginning of its id."""
    return f"{clean(workflow_slug)}-{str(run_id)[:8]}"


def is_made_up(name: str) -> bool:
    """Tell whether Prefect made a name up, so that no person misses it."""
    return _COOL_NAME.fullmatch(name) is not None or _STAR.fullmatch(name) is not None
