"""The entry point of `ray-moe`: hands over to the commands, or says what is missing beside the client."""

from __future__ import annotations

import sys

_SERVE_EXTRA = {
    "typer",
    "rich",
    "yaml",
    "pydantic",
    "ray",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "psutil",
    "cryptography",
}


def app() -> None:
    """Run the command line."""
    try:
        from ray_moe.cli.commands import commands

        commands()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _SERVE_EXTRA:
            raise
        sys.stderr.write(
            f"error: the command line needs {error.name}, which is not installed; run: pip install 'ray-moe[serve]'\n"
        )
        sys.exit(2)


if __name__ == "__main__":
    app()
