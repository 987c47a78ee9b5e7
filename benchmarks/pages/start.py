"""The page of `benchmarks/start.py`."""

from __future__ import annotations

from benchmarks import report

MIB = 2**20
WAYS = {"warm": "forked from a warm process", "cold": "each with all imports"}


def page(data: report.Data) -> str:
    """Made of `results/start.json`."""
    figures, goals, size = data["figures"], data["goals"], data["size"]
    floor, ways = figures["floor"], [figures[way] for way in WAYS]
    least_s = [a + b for a, b in zip(floor["import_s"], floor["read_s"], strict=True)]
    num_rounds = len(least_s)

    def row(key: str, goal: str = "") -> list[str]:
        return [*(report.spread(way[key]) for way in ways), goal]

    times = {
        f"`ray-moe serve` with {size['actors']} actors until it is ready, s": row("ready_s"),
        "beside the floor": [*(report.cell(way["ready_s"], least_s) for way in ways), f"≤ {goals['start']:g}"],
        "one more actor (`resize`) while another one is on standby, s": row("added_s", f"≤ {goals['added_s']:g}"),
        "until there is another one on standby again, s": row("standby_again_s"),
    }
    torch_bytes = floor["torch_rss_bytes"]
    memory = {
        "the largest, MiB": [
            *(report.spread([each / MIB for each in way["beyond_weights_bytes"]]) for way in ways),
            "",
        ],
        "beside a process with torch": [
            *(report.cell(way["beyond_weights_bytes"], torch_bytes) for way in ways),
            f"≤ {goals['rss']:g}",
        ],
        "with what it shares divided by those who share it, MiB": [
            *(report.spread([each / MIB for each in way["own_bytes"]]) for way in ways),
            "",
        ],
        "that beside a process with torch": [*(report.cell(way["own_bytes"], torch_bytes) for way in ways), ""],
    }
    return (
        "# Starting\n\n"
        f"A Mixtral in float32 of {size['num_hidden_layers']} layers with {size['num_local_experts']} experts of "
        f"{size['hidden_size']}-{size['intermediate_size']}-{size['hidden_size']}, its files in the page cache. The "
        f"service's time is from its command, with the start of a Ray of its own. Median of {num_rounds} "
        f"{'round' if num_rounds == 1 else 'rounds'} (least–greatest).\n\n"
        f"The floor: importing torch in one process takes {report.spread(floor['import_s'])} s, and reading "
        f"{data['checkpoint_bytes'] / 1e9:.2f} GB {report.spread(floor['read_s'])} s; together "
        f"{report.spread(least_s)} s.\n\n"
        + report.table([*WAYS.values(), "goal"], times)
        + "\n\nResident memory of an actor beyond its weights; a process that has only imported torch has "
        + f"{report.spread([each / MIB for each in torch_bytes])} MiB:\n\n"
        + report.table([*WAYS.values(), "goal"], memory)
    )
