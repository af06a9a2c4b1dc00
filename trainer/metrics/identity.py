"""Which model a record is of.  Without torch, so that a comparison of records starts at once."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def model_hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
