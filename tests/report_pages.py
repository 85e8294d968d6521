"""The data in a report page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def page_data(page: Path) -> dict[str, Any]:
    """What the page's scripts are given."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(f"{name} is no JSON")))
