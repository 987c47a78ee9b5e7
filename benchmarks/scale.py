"""What dispatch, planning and the controller cost as hosts go from 2 to 1,000 and experts from 8 to 15,616.

`ray-moe bench scale [--before COMMIT]`: the service's own code, in process and without Ray (`scale_work.py`), in CPU
seconds. With `--before` that code is measured in the same run as it was at another commit, so that both can be seen
side by side. `ray-moe bench scale --simulate` instead adds to the results a scenario of 1,000 hosts that loses nodes
and gets others. What one router can dispatch follows from the figures in `pages/scale.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import report

ROOT = Path(__file__).parents[1]
TOKENS = (16, 256, 4096)
SIZES = (
    {"hosts": 2, "experts": 8, "layers": 1},
    {"hosts": 8, "experts": 64, "layers": 16},
    {"hosts": 32, "experts": 128, "layers": 48},
    {"hosts": 100, "experts": 256, "layers": 61},
    {"hosts": 316, "experts": 256, "layers": 61},
    {"hosts": 1000, "experts": 256, "layers": 61},
    {"hosts": 1000, "experts": 256, "layers": 61, "hosts_a_layer": 16},
)
SCENARIO = (
    "--hosts 1000 --layers 61 --experts 256 --hosts-per-node 8 --min-replicas 2 --tokens-per-batch 4096 "
    "--batches-per-step 1 --trace zipf:0.8 --drift 0.02 --spot-losses 0.2 --notice 20 --seconds 300"
)


@contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """The package as it was at `commit`, in a folder for the while."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit, "ray_moe"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def work(tree: Path, *arguments: str) -> Any:
    """What `scale_work.py` prints with the package in `tree`."""
    command = [sys.executable, str(ROOT / "benchmarks" / "scale_work.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure(trees: Mapping[str, Path], sizes: tuple[dict[str, int], ...]) -> list[dict[str, Any]]:
    """Each size in each tree, one right after the other."""
    found = []
    for size in sizes:
        row: dict[str, Any] = {"size": size}
        for name, tree in trees.items():
            row[name] = work(tree, json.dumps({**size, "tokens": TOKENS}))
        print(f"  {size}: done", flush=True)
        found.append(row)
    return found


def simulate(scenario: str) -> dict[str, Any]:
    """A scenario through `ray-moe simulate`: what it found, and how long it took."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "ray_moe.cli.main", "simulate", *scenario.split(), "--json", str(file)]
        began_s = time.perf_counter()
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        passed_s = time.perf_counter() - began_s
        found = json.loads(file.read_text())
    wanted = ("virtual_s", "per_batch", "faults", "changes", "first_hosts", "most_hosts", "last_hosts", "p_lossless")
    queue_s = [step["queue_age_s"] for step in found["steps"]]
    wall = found["wall"]
    return {
        "scenario": scenario,
        "passed_s": passed_s,
        **{name: found[name] for name in wanted},
        "longest_queue_s": max(queue_s, default=0.0),
        "last_queue_s": queue_s[-1] if queue_s else 0.0,
        "planning_s": wall["planning_s"],
        "policy_s": wall["policy_s"],
        "splitting_s": wall["splitting_s"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = report.options(__doc__)
    parser.add_argument("--before", metavar="COMMIT", help="measure the code of this commit as well, in the same run")
    parser.add_argument(
        "--simulate", action="store_true", help="add a simulation of 1,000 hosts to the results (minutes)"
    )
    given = parser.parse_args(argv)
    data: dict[str, Any]
    if given.simulate:
        data = json.loads((report.RESULTS / "scale.json").read_text())
        data.pop("machine")
        report.finish("scale", {**data, "simulation": simulate(SCENARIO)}, given)
        return
    sizes = SIZES[:2] if given.quick else SIZES
    data = {"tokens": TOKENS, "before": given.before}
    if given.before:
        with tree_of(given.before) as tree:
            data["rows"] = measure({"before": tree, "now": ROOT}, sizes)
    else:
        data["rows"] = measure({"now": ROOT}, sizes)
    data["message"] = work(ROOT, "message")
    report.finish("scale", data, given)


if __name__ == "__main__":
    main()
