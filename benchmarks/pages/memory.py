"""The page of `benchmarks/memory.py`."""

from __future__ import annotations

from benchmarks import report

MIB = 2**20


def page(data: report.Data) -> str:
    """Made of `results/memory.json`."""
    results, sizes, tokens = data["bytes"], data["sizes"], data["tokens"]
    cells = {}
    for number, row in enumerate(data["rows"], 1):
        before, after = results[row["without"]][row["by"]], results[row["having"]][row["by"]]
        saved = f"{100 * (1 - after / before):.0f} %" if before > 0 else "–"
        cells[f"{number}. {row['name']}"] = [row["what"], f"{before / MIB:,.0f}", f"{after / MIB:,.0f}", saved]
    whole = results["whole model"]["tensors"] / MIB
    small = " A quick run: too small to say anything." if data["quick"] else ""
    return f"""# What options save of memory

A Mixtral of {whole:,.0f} MiB in float32 ({sizes["num_local_experts"]} experts in each of {sizes["num_hidden_layers"]}
layers); for activations one of eight narrow layers and {tokens[0]} sequences of {tokens[1]} tokens; for
`experts.tensor` one with a single large expert in each layer. Each
figure is the growth of the resident memory of a process of its own, in MiB, where the first column does not say
otherwise.{small}

{report.table(["what", "without", "with", "saved"], cells)}

The largest process of 1 is an actor; a worker or router has the backbone alone:
{results["backbone"]["rss"] / MIB:,.0f} MiB. In 6 and 7 the actors recompute too: what the first of two forward passes
keeps, nobody would fetch. In 11 every expert has computed twice. `offload: cpu` moves weights or optimizer state from a
GPU to the CPU, and there is none here: it is not measured."""
