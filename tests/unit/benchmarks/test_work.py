"""What benchmarks are made of: contestants as processes, the layer's work, and gates that choose by Zipf's law."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import layer_work, zipf
from benchmarks.one_process import OneProcess
from benchmarks.processes import Processes
from benchmarks.train_step_work import Problem
from ray_moe.ops.gates.topk import TopKGate
from ray_moe.types import GenerateRequest
from tests import tiny_models

ECHO = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    number = json.loads(line)["number"]
    if number < 0:
        sys.exit("no negative numbers")
    print(json.dumps({"twice": 2 * number}), flush=True)
"""


def test_processes_answer_in_turns_and_end_with_their_input(tmp_path: Path) -> None:
    two = Processes("two", "", [(sys.executable, "-c", ECHO)] * 2, tmp_path / "log")
    two.start()
    assert two.ask({"number": 3}) == [{"twice": 6}] * 2
    assert two.cpu_s() > 0
    two.close()
    assert (tmp_path / "log").read_text() == ""


def test_a_process_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    one = Processes("one", "", [(sys.executable, "-c", ECHO)], tmp_path / "log")
    one.start()
    with pytest.raises(SystemExit, match="one has ended:\nno negative numbers"):
        one.ask({"number": -1})
    one.close()


def test_a_layer_is_run_as_asked_and_says_what_it_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(width=4, inner=8, experts=2, top_k=1)
    requests = [{"way": "double", "what": what, "tokens": 3, "block_s": 0.0} for what in ("forward", "train")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(request) + "\n" for request in requests)))
    out = io.StringIO()
    layer_work.answer({"double": lambda hidden: 2 * hidden}, problem, out)
    ready, forward, train = map(json.loads, out.getvalue().splitlines())
    hidden, grad = problem.batch(3, 0, 1)
    assert ready == {"ready": True}
    assert forward["runs"] == train["runs"] == 1
    assert forward["s"] > 0
    assert forward["sums"] == {"output": pytest.approx(float((2 * hidden * grad).sum())), "hidden": 0.0}
    assert train["sums"]["hidden"] == pytest.approx(float((2 * grad).square().sum()))


def test_touched_experts_are_those_that_the_gate_chooses() -> None:
    problem = Problem(width=16, inner=8, experts=8, top_k=2)
    gate = TopKGate(16, 8, 2)
    gate.load_state_dict({"weight": problem.gate()})
    assert problem.touched(1) == 2
    assert problem.touched(5) == len(set(gate(problem.batch(5, 0, 1)[0]).index.flatten().tolist()))


def test_fitted_gates_share_their_slots_by_zipf_s_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipf, "TOKENS", 512)
    model = tiny_models.build("qwen3_moe")
    before = model(torch.arange(3, 40)[None]).logits
    zipf.make_zipf(model)
    ids = torch.randint(3, model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(0))
    for layer in model.model.layers:
        gate = layer.mlp.gate
        hidden = zipf.gate_input(model, gate, ids)
        index = (hidden @ gate.weight.T).topk(gate.top_k).indices
        found = zipf.shares(index, len(gate.weight)).sort(descending=True).values
        wanted = zipf.law(len(gate.weight)).clamp(max=1 / gate.top_k)  # nobody gets more than a slot of each token
        assert float((found - wanted / wanted.sum()).abs().max()) < 0.1
    assert model(torch.arange(3, 40)[None]).logits.shape == before.shape


async def test_the_engine_in_one_process_has_the_tokens_of_transformers(tmp_path: Path) -> None:
    model = tiny_models.save("qwen3_moe", tmp_path)
    prompt = [5, 17, 3, 42]
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=[], pad_token_id=0
    )[0, len(prompt) :].tolist()
    backend = OneProcess(str(tmp_path))
    request = GenerateRequest(token_ids=tuple(prompt), max_new_tokens=6, ignore_eos=True)
    tokens = [token async for chunk in backend.generate(request) for token in chunk.token_ids]
    await backend.engine.close()
    assert tokens == expected
