"""The page of errors, made of the one table from error to code (`ray_moe/wire/status.py`). Called by `hooks.py`."""

from __future__ import annotations

from ray_moe.wire.status import CODES, ERROR_KEY, REQUEST_ID_KEY, RETRY_AFTER_KEY
from tools.docs.tables import cell, table

HEAD = f"""# Errors

One class for each thing that a caller can do. The Python client raises them (`ray_moe.errors`); gRPC has the class by
name in the trailing metadata `{ERROR_KEY}`, seconds after which to retry in `{RETRY_AFTER_KEY}`, and the request's id
in `{REQUEST_ID_KEY}`; HTTP has the last two as the headers `Retry-After` and `{REQUEST_ID_KEY}`. A message says what
was wrong, what was expected, and what to do.
"""


def page() -> str:
    """Markdown."""
    rows = [
        (f"`{error.__name__}`", f"`{code.name}`", str(http), cell(error.__doc__ or ""))
        for error, (code, http) in CODES.items()
    ]
    return f"{HEAD}\n{table(('class', 'gRPC', 'HTTP', 'meaning'), rows)}\n"
