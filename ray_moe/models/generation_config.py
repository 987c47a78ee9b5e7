"""What a checkpoint says of generating: its end tokens, and what a decoder beside an encoder begins with.

Called by `models/huggingface.py`, and by `runtime/stepper.py` for each request.
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from ray_moe.errors import InvalidCheckpoint
from ray_moe.models.checkpoint import CheckpointFiles

FILE = "generation_config.json"


def read_generation(files: CheckpointFiles, config: Any) -> GenerationConfig:
    """That of `generation_config.json`, else what `config` says of it.

    Raises:
        InvalidCheckpoint: the file cannot be read.
    """
    path = files.folder / FILE
    if not path.is_file():
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(files.folder)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidCheckpoint(f"{path} cannot be read: {error}. Repair or remove it.") from error


def start_token(settings: GenerationConfig) -> int:
    """The token that the decoder of an encoder-decoder begins with: as `transformers` takes it.

    Raises:
        InvalidCheckpoint: there is none.
    """
    token = settings.decoder_start_token_id
    token = settings.bos_token_id if token is None else token
    if not isinstance(token, int):
        raise InvalidCheckpoint(
            f"the decoder of this checkpoint begins with decoder_start_token_id {token}; expected one token: "
            f"name it in {FILE} (T5 and Switch Transformers begin with 0, the padding)"
        )
    return token
