"""What `benchmarks/profile_step.py` makes of what was recorded: figures by hand, pictures by what is in them."""

from __future__ import annotations

import importlib
import json
import types
from functools import reduce
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from torch import nn

from benchmarks import profile_flame
from benchmarks.floor import Rates
from benchmarks.pages.profile import page
from benchmarks.profile_floor import decode_floor, train_floor
from benchmarks.profile_marks import ON, Recorder, Seam
from benchmarks.profile_seams import (
    ANSWERS,
    FRAMED,
    PRODUCTS,
    RECEIVED,
    RUN,
    SEAMS,
    SENT,
    STEP,
    TAKEN,
    WAIT,
    WRITTEN,
    component_of,
    mark_model,
)
from benchmarks.profile_table import (
    ANSWERED,
    COMPUTED,
    DECODED,
    OTHER_WAIT,
    READ,
    REST,
    TO_HOST,
    TO_ROUTER,
    WOKEN,
    Mark,
    Recording,
    largest,
    mean,
    own_times,
    periods,
    process_times,
    stacks,
    step_times,
    thread_of,
    thread_times,
    unmarked_cpu,
)

SVG = "{http://www.w3.org/2000/svg}"


# --- marks ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.module}.{seam.name}")
def test_every_function_that_is_to_be_marked_is_there(seam: Seam) -> None:
    found = reduce(getattr, seam.name.split("."), importlib.import_module(seam.module))
    assert callable(found)
    assert seam.component or seam.after


def test_all_products_are_components_of_something() -> None:
    class Attention(nn.Module):
        layer_idx, scaling, is_causal = 0, 1.0, True

    made = {seam.component for seam in SEAMS}
    linear = nn.Linear(1, 1)
    made |= {component_of(name, linear, False) for name in ("lm_head", "mlp.gate", "mlp.up_proj")}
    made |= {component_of("q_proj", linear, True), component_of("self_attn", Attention(), False)}
    assert made >= PRODUCTS


def test_a_marked_function_is_timed_only_while_somebody_records() -> None:
    now = iter([10, 25])
    recorder = Recorder()
    recorder.clock = lambda: next(now)
    double = recorder.timed(lambda number: 2 * number, "double", key=lambda args: args[0])
    assert (double(3), recorder.marks) == (6, [])
    recorder.is_on = True
    assert double(4) == 8
    [(component, _, begin, end, key)] = recorder.marks
    assert (component, begin, end, key) == ("double", 10, 25, 4)


def test_a_function_that_raises_leaves_its_mark_too() -> None:
    recorder = Recorder()
    recorder.is_on = True
    with pytest.raises(ZeroDivisionError):
        recorder.timed(lambda: 1 / 0, "divide")()
    assert [mark[0] for mark in recorder.marks] == ["divide"]


def test_functions_are_replaced_within_their_module() -> None:
    module = types.ModuleType("made_up")
    source = (
        "class A:\n    def f(self, x):\n        return x\n    @staticmethod\n    def g(x):\n        return -x\n"
        "def h():\n    return A().f(1)\n"
    )
    exec(source, vars(module))
    recorder, seen = Recorder(), []
    recorder.is_on = True
    recorder.apply(module, Seam("made_up", "A.f", "f", after=lambda args: seen.append(args[1])))
    recorder.apply(module, Seam("made_up", "A.g", "g"))
    recorder.apply(module, Seam("made_up", "h", "h"))
    assert (module.h(), module.A.g(2), seen) == (1, -2, [1])
    assert [mark[0] for mark in recorder.marks] == ["f", "h", "g"]
    with pytest.raises(AttributeError):
        recorder.apply(module, Seam("made_up", "gone", "gone"))


def test_what_a_process_records_can_be_read_again(tmp_path: Path) -> None:
    recorder = Recorder()

    class Over(Exception):
        pass

    def turn(function, until):
        """In place of the sleep: the folder says so, something is called, the folder says no more, it is written."""
        if until == "on":
            (tmp_path / ON).write_text("wall")
        elif until == "off":
            function()
            (tmp_path / ON).unlink()
        else:
            raise Over

    turns = iter(["on", "off", "over"])
    work = recorder.timed(lambda: None, "work", key=lambda args: [1, 2])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Over):
        patch.setattr("benchmarks.profile_marks.time.sleep", lambda seconds: turn(work, next(turns)))
        recorder.watch(tmp_path)
    [file] = tmp_path.glob("*.wall.json")
    recording = Recording.read(file)
    [mark] = recording.marks
    assert (mark.component, mark.key) == ("work", [1, 2])
    assert recording.window[0] <= mark.begin <= mark.end <= recording.window[1]
    assert recording.python_threads[mark.thread] in recording.threads
    assert recording.has("work")
    assert not recording.has("rest")


def test_modules_of_a_backbone_are_marked_by_what_they_are() -> None:
    class SomeNorm(nn.Module):
        def forward(self, x):
            return x

    class Attention(nn.Module):
        layer_idx, scaling, is_causal = 0, 1.0, True

        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(2, 2)

    class SomeRouter(nn.Module):
        pass

    model = nn.ModuleDict({"norm": SomeNorm(), "attn": Attention(), "lm_head": nn.Linear(2, 2), "act": nn.SiLU()})
    mark_model(model)
    assert {name for name, module in model.named_modules() if "forward" in vars(module)} == {
        "norm", "attn", "attn.q_proj", "lm_head",
    }  # fmt: skip
    assert component_of("norm", SomeNorm(), False) == "norms"
    assert component_of("mlp.gate", SomeRouter(), False) == "gate"
    assert component_of("act", nn.SiLU(), False) == ""


# --- figures --------------------------------------------------------------------------------------------------
def test_own_time_is_that_which_no_inner_mark_has() -> None:
    marks = [
        Mark("a", 1, 0, 100),
        Mark("b", 1, 10, 40),
        Mark("c", 1, 20, 30),
        Mark("b", 1, 50, 60),
        Mark("d", 1, 100, 101),
    ]
    found = [(own.path, own.ns, own.gaps) for own in own_times(marks)]
    assert found == [
        (("a", "b", "c"), 10, ((20, 30),)),
        (("a", "b"), 20, ((10, 20), (30, 40))),
        (("a", "b"), 10, ((50, 60),)),
        (("a",), 60, ((0, 10), (40, 50), (60, 100))),
        (("d",), 1, ((100, 101),)),
    ]


def test_orders_are_counted_by_what_gives_them() -> None:
    commit, snapshot = Mark("commit, rest", 1, 0, 50), Mark("snapshot", 1, 50, 80)
    marks = [commit, Mark(ANSWERS, 1, 10, 40), snapshot, Mark(ANSWERS, 1, 60, 65)]
    assert step_times(Recording(1, (0, 80), marks), 1, [(0, 80)]) == {
        "commit, rest": 20, f"{ANSWERS} (commit)": 30, "snapshot": 25, f"{ANSWERS} (snapshot)": 5, REST: 0,
    }  # fmt: skip


def router() -> Recording:
    """Two decode steps of 1,000 and one with a prompt; in each of the first two a call to the host."""
    marks = [Mark(STEP, 7, begin, begin + 800, key) for begin, key in ((0, [2, 2]), (1000, [2, 2]), (2000, [2, 9]))]
    for number, begin in enumerate((0, 1000)):
        marks += [
            Mark(SENT, 7, begin + 100, begin + 150, ["socket", number]),
            Mark(WAIT, 7, begin + 160, begin + 700),
            Mark(RECEIVED, 8, begin + 600, begin + 640, ["socket", number]),
        ]
    return Recording(
        1, (0, 4000), marks, {"socket": 2}, {70: ("generation", 2400), 80: ("replies-1", 100)}, {7: 70, 8: 80}
    )


def host() -> Recording:
    marks = []
    for number, begin in enumerate((0, 1000)):
        marks += [
            Mark(TAKEN, 5, begin + 200, begin + 210, number),
            Mark(RUN, 5, begin + 250, begin + 550, [6, 3]),
            Mark("experts: products", 5, begin + 300, begin + 500),
            Mark(FRAMED, 5, begin + 560, begin + 565, number),
            Mark(WRITTEN, 5, begin + 566, begin + 580),
        ]
    return Recording(2, (0, 2000), marks, {}, {50: ("main", 1000)}, {5: 50})


def test_a_step_is_divided_without_a_rest() -> None:
    recording = router()
    spans = periods(recording, STEP, is_decode=True)
    assert spans == [(0, 1000), (1000, 2000)]
    assert periods(recording, "nobody") == []
    thread = thread_of(recording, STEP)
    times = step_times(recording, thread, spans, [host()])
    assert times == {
        STEP: 800 - 50 - 540,
        SENT: 50,
        TO_HOST: 200 - 160,
        DECODED: 50,
        COMPUTED: 300,
        ANSWERED: 580 - 550,
        TO_ROUTER: 20,
        READ: 40,
        WOKEN: 60,
        REST: 200,
    }
    assert sum(times.values()) == 1000
    assert step_times(recording, thread, spans) == {STEP: 210, SENT: 50, WAIT: 540, REST: 200}


def test_waiting_for_what_nobody_has_heard_of_is_waiting() -> None:
    strange = Recording(3, (0, 1), [])
    times = step_times(router(), 7, [(0, 1000)], [strange])
    assert times[OTHER_WAIT] == 540


def test_a_process_beside_it_is_counted_by_step() -> None:
    recording = host()
    times = process_times(recording, 2)
    assert times == {TAKEN: 10, RUN: 100, "experts: products": 200, FRAMED: 5, WRITTEN: 14}
    assert process_times(router(), 2, but=7) == {RECEIVED: 40}
    assert unmarked_cpu(recording, times, 2) == 1000 / 2 - 329
    assert mean([{"a": 4.0, "b": 2.0}, {"a": 2.0}]) == {"a": 3.0, "b": 1.0}
    assert thread_times(router(), 2) == {"generation": 1200, "replies": 50}
    assert list(largest({"a": 1.0, "b": 3.0, "c": 2.0, "d": 0.5}, 2.0).items()) == [
        ("b", 3.0),
        ("c", 2.0),
        ("rest", 1.5),
    ]


# --- the floor ------------------------------------------------------------------------------------------------
def test_the_floor_is_of_the_backbone_and_the_busiest_host() -> None:
    layer = types.SimpleNamespace(num_experts=4, expert_bytes=400, dtype="float32")
    checkpoint = types.SimpleNamespace(backbone_bytes=4000, layers={"a": layer, "b": layer})
    rates = Rates(copy_bytes_per_s=1e7, flops_per_s=1e6, read_bytes_per_s=1e7)
    found = decode_floor(checkpoint, rates, 2, [(10, 3), (6, 5)])
    assert (found.main_flops, found.main_bytes) == (2 * 1000 * 2, 4000)
    assert (found.host_flops, found.host_bytes) == (2 * 6 * 100, 5 * 400)
    assert found.us == pytest.approx(1e6 * (4000 / 1e6 + 1200 / 1e6))
    found = train_floor(checkpoint, rates, 8, [(20, 3), (6, 5)])
    assert (found.main_flops, found.host_flops) == (3 * 2 * 1000 * 8, 3 * 2 * 10 * 100)
    assert (found.main_bytes, found.host_bytes) == (7 * 4000, 7 * 1600)


# --- the page -------------------------------------------------------------------------------------------------
def results() -> dict[str, Any]:
    kind: dict[str, Any] = {
        "num_steps": 20,
        "num_layers": 2,
        "step_us": 1000.0,
        "main": {
            "wall_us": {"norms": 150.0, COMPUTED: 400.0, "logits": 250.0, WOKEN: 200.0, "tiny": 0.1},
            "cpu_us": {"norms": 140.0, "logits": 245.0, WAIT: 12.0},
        },
        "main_other_threads": {"wall_us": {RECEIVED: 30.0}},
        "host": {
            "wall_us": {"experts: products": 300.0, RUN: 160.0, "decode": 20.0},
            "cpu_us": {RUN: 90.0},
            "loop_cpu_us": 55.0,
        },
        "main_threads_cpu_us": {"generation": 600.0},
        "host_threads_cpu_us": {"main": 500.0},
        "floor": {"main_flops": 2e6, "main_bytes": 3e6, "host_flops": 4e6, "host_bytes": 5e6, "us": 250.0},
        "flame": "samples",
        "cores": 2,
        "other_cores": 0.25,
    }
    settings = {"streams": 16, "micro_batches": 2, "batch_size": 4, "sequence_length": 128}
    rates = {"flops_per_s": 5e10, "read_bytes_per_s": 1e10}
    speeds = {"unmarked": 100.0, "wall": 98.0, "cpu": 95.0}
    return {
        "model": "m",
        "settings": settings,
        "rates": rates,
        "decode": kind | {"tokens_per_s": speeds},
        "train": kind,
    }


def test_the_page_says_what_is_in_the_file() -> None:
    text = page(json.loads(json.dumps(results())))
    assert "1,000 µs, the mean of 20, with 2 MoE layers. The least it could take is 250 µs (25% of that)" in text
    assert "2.0 MFLOP and 3.0 MB of the backbone, then 4.0 MFLOP and 5.0 MB of the busiest host" in text
    assert "| norms | 150 | 75.0 | 15.0% | 140 |" in text
    assert "| logits ■ | 250 | 125 | 25.0% | 245 |" in text
    assert f"| {WOKEN} | 200 | 100 | 20.0% |  |" in text
    assert "tiny" not in text
    assert "other processes used 0.25 of the machine's 2 cores" in text
    assert "| **all** | 1,000 | 500 | 100% | 397 |" in text
    assert "| host: experts, rest | 160 | 80.0 | 16.0% | 90.0 |" in text
    assert "| host: event loop and sockets, unmarked |  |  |  | 55.0 |" in text
    assert "| other threads of the router: replies read | 30.0 | 15.0 | 3.0% |  |" in text
    assert "| router: steps | 600 | 60.0% |" in text
    assert "| worker: generation | 600 | 60.0% |" in text
    assert f"1. {WOKEN}: 200 µs\n2. host: experts, rest: 160 µs\n3. norms: 150 µs" in text


# --- the picture ----------------------------------------------------------------------------------------------
SAMPLES = """\
thread (26): generation;Thread._bootstrap (threading.py:1002);GenerationLoop._step (ray_moe/runtime/generation.py:203);Module._call_impl (torch/nn/modules/module.py:1);linear (torch/nn/functional.py:9) 3
thread (26): generation;Thread._bootstrap (threading.py:1002);GenerationLoop._step (ray_moe/runtime/generation.py:210) 1
thread (31): replies-expert-0;outer.<locals>.inner (ray_moe/transport/connection.py:7) 2
thread (9);<lambda> (somewhere/else.py:1) 4
thread (5): profile;Thread.run (threading.py:7);Recorder.watch (benchmarks/profile_marks.py:1) 7
not a sample
"""  # noqa: E501


def test_samples_are_read_by_process_and_thread_without_what_says_nothing() -> None:
    step = ("router", "thread generation", "GenerationLoop._step (ray_moe/runtime/generation.py)")
    assert profile_flame.read_raw(SAMPLES, "router") == {
        (*step, "linear (torch/nn/functional.py)"): 3,
        step: 1,
        ("router", "thread replies-expert", "inner (ray_moe/transport/connection.py)"): 2,
        ("router", "main thread", "<lambda> (somewhere/else.py)"): 4,
    }


def test_a_flame_graph_is_an_svg_that_needs_nothing() -> None:
    root = profile_flame.tree([profile_flame.read_raw(SAMPLES, "router"), {("host 0", "<b> & c"): 10}])
    assert (root.value, root.depth) == (20, 5)
    svg = ElementTree.fromstring(profile_flame.draw(root, "A & B"))
    groups = [(group.findtext(f"{SVG}title"), group.find(f"{SVG}rect")) for group in svg.iter(f"{SVG}g")]
    frames = {title: rect.attrib for title, rect in groups if rect is not None}
    assert len(frames) == 11
    whole, step = frames["all: 100.0% (20 samples)"], frames[
        "GenerationLoop._step (ray_moe/runtime/generation.py): 20.0% (4 samples)"
    ]  # fmt: skip
    assert float(whole["width"]) == profile_flame.WIDTH
    assert float(step["width"]) == pytest.approx(profile_flame.WIDTH / 5)
    assert step["fill"] == profile_flame.KINDS["ray_moe"]
    assert frames["<b> & c: 50.0% (10 samples)"]["fill"] == profile_flame.KINDS["other"]
    assert "GenerationLoop._step" in [text.text for text in svg.iter(f"{SVG}text")]
    assert svg.attrib["aria-label"] == "A & B"
    assert not [value for node in svg.iter() for name, value in node.attrib.items() if "href" in name]


def test_frames_too_narrow_to_be_seen_are_left_out_and_long_names_are_cut() -> None:
    root = profile_flame.tree([{("x" * 500,): 99_999, ("thin",): 1}])
    svg = profile_flame.draw(root, "t")
    assert "thin" not in svg
    assert "…" in svg


def test_marks_make_a_flame_graph_where_samples_cannot_be_taken() -> None:
    marks = [Mark("a", 1, 0, 50_000), Mark("b", 1, 10_000, 30_000), Mark("c", 2, 0, 999)]
    assert stacks(Recording(1, (0, 1), marks), "router") == {("router", "a"): 30, ("router", "a", "b"): 20}
