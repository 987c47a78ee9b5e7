"""The page of `benchmarks/start.py`."""

from __future__ import annotations

from benchmarks import report

MIB = 2**20


def page(data: report.Data) -> str:
    """Made of `results/start.json`."""
    f, goals, size = data["figures"], data["goals"], data["size"]
    least_s = [a + b for a, b in zip(f["import_s"], f["read_s"], strict=True)]
    times = {
        "importing torch in one process, s": [report.spread(f["import_s"]), ""],
        f"reading {data['checkpoint_bytes'] / 1e9:.2f} GB, s": [report.spread(f["read_s"]), ""],
        "both, the floor, s": [report.spread(least_s), ""],
        f"`ray-moe serve` with {size['actors']} actors until it is ready, s": [report.spread(f["ready_s"]), ""],
        "beside the floor": [report.cell(f["ready_s"], least_s), f"≤ {goals['start']:g}"],
        "one more actor (`resize`) while another one is on standby, s": [
            report.spread(f["added_s"]),
            f"≤ {goals['added_s']:g}",
        ],
    }
    torch_mib = [each / MIB for each in f["torch_rss_bytes"]]
    beyond_mib = [each / MIB for each in f["beyond_weights_bytes"]]
    memory = {
        "a process that has only imported torch": [report.spread(torch_mib), ""],
        "the largest actor beyond its weights": [report.spread(beyond_mib), ""],
        "beside it": [report.cell(beyond_mib, torch_mib), f"≤ {goals['rss']:g}"],
    }
    num_rounds = len(f["ready_s"])
    return (
        "# Starting\n\n"
        f"A Mixtral in float32 of {size['num_hidden_layers']} layers with {size['num_local_experts']} experts of "
        f"{size['hidden_size']}-{size['intermediate_size']}-{size['hidden_size']}, its files in the page cache. The "
        f"service's time is from its command, with the start of a Ray of its own. Median of {num_rounds} "
        f"{'round' if num_rounds == 1 else 'rounds'} (least–greatest).\n\n"
        + report.table(["time", "goal"], times)
        + "\n\nResident memory, in MiB:\n\n"
        + report.table(["memory", "goal"], memory)
    )
