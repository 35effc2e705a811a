"""Write reports as files: JSON with one row per line, and text."""

import json
import os
from pathlib import Path
from typing import Any


def as_json(report: dict[str, Any]) -> str:
    """Return a report as JSON, with one line for each element of its lists."""
    parts = []
    for name, value in report.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            rows = ",\n".join(json.dumps(row) for row in value)
            text = f"[\n{rows}\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def replace(path: Path, text: str) -> None:
    """Replace a file as a whole, so that an interruption leaves the old one or the new one."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)
