"""Steps of a model with an encoder, which reads a prompt at once, and a decoder, which generates beside it.

A sequence is the prompt's tokens and, behind them, the decoder's. Both take the same room: in each layer of the decoder
a token of the prompt has the keys and values of cross-attention, one of the decoder those of self-attention. So one
buffer per layer holds both, one after the other, and all that is known of room and turns holds for them too.

In a step all prompts that are new go through the encoder as one row, and then the tokens of all sequences through the
decoder, one row for each token (`packing_cross.py`): so the experts get those of a layer as one batch, and what a gate
counts within a row, its capacity, it counts as it does for a sequence alone. One of the steppers of `stepper.py`.

Shape legend: S tokens of all new prompts, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ray_moe.models.families import several_sequences
from ray_moe.runtime.kv_cache import KVPool
from ray_moe.runtime.packing import step_of
from ray_moe.runtime.packing_cross import DecoderRows, EncoderRow, Part, nothing_new, pack
from ray_moe.runtime.scheduler import Sequence, Work


class EncoderDecoderStepper:
    """See the module."""

    in_chunks = True
    keeps_prefixes = False
    """What an encoder makes of a beginning depends on all that comes behind it."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._device = next(model.parameters()).device
        pack(model)

    def compute(self, work: Work, pool: KVPool) -> torch.Tensor:
        """[number of sequences, V] logits, behind what was computed of each."""
        with torch.inference_mode():
            new = [sequence for sequence, _ in work if not sequence.num_computed]
            logits = self._decode(work, self._encode(new) if new else nothing_new())
        for sequence, number in work:
            sequence.num_computed += number
            sequence.room.length = sequence.num_computed
        pool.bytes_per_token = pool.bytes_per_token or work[0][0].room.bytes_per_token()
        return logits

    def _encode(self, new: Items[Sequence]) -> Any:
        """What the encoder makes of new prompts, [1, S, D]."""
        lengths = [sequence.num_source for sequence in new]
        tokens = [token for sequence in new for token in sequence.tokens[: sequence.num_source]]
        with several_sequences(lengths), step_of(EncoderRow(lengths)):
            return self._model.get_encoder()(input_ids=torch.tensor([tokens], device=self._device))

    def _decode(self, work: Work, encoded: Any) -> torch.Tensor:
        tokens, parts, last = list[int](), list[Part](), list[int]()
        for sequence, number in work:
            begin, end = max(sequence.num_computed, sequence.num_source), sequence.num_computed + number
            parts.append(Part(sequence.room, sequence.num_source, begin, len(tokens), end - begin))
            tokens += sequence.tokens[begin:end]
            last.append(len(tokens) - 1)
        rows = DecoderRows(parts, self._model.config.num_decoder_layers)
        with step_of(rows), self._head_of(last):
            out = self._model(
                encoder_outputs=encoded,
                decoder_input_ids=torch.tensor(tokens, device=self._device)[:, None],
                past_key_values=rows.cache,
                use_cache=True,
            )
        logits: torch.Tensor = out.logits[:, 0]
        return logits

    @contextmanager
    def _head_of(self, rows: list[int]) -> Iterator[None]:
        """While the block runs, the model makes logits of these rows alone. Of a sequence that lost its room all
        tokens are computed again, and a vocabulary is wide; its `forward` has no argument for it."""
        head: nn.Module = self._model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0][rows],))
        try:
            yield
        finally:
            hook.remove()
