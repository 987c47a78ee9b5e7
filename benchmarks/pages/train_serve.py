"""The page of `benchmarks/train_serve.py`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import report


def page(data: report.Data) -> str:
    """Made of `results/train_serve.json`."""
    verdict, s, took = data["verdict"], data["settings"], data["version_s"]
    rows = {
        "requests": [f"{verdict['num_requests']:,}"],
        "failed": [f"**{len(verdict['failures'])}**"],
        "of no one version (mixtures)": [f"**{verdict['num_mixed']}**"],
        "of an older version than the answer before": [f"**{verdict['num_backward']}**"],
        "versions published": [f"{data['versions']}"],
        "versions that answers were of for certain, with the first": [f"{len(verdict['seen'])}"],
        "answers that several versions give": [f"{verdict['num_shared']:,}"],
        "most folders of published versions on the disk": [f"{max(data['folders'], default=0)}"],
    }
    pauses = {when: seconds(quantiles) for when, quantiles in data["between_tokens_s"].items()}
    failures = "".join(f"\n- {failure}" for failure in verdict["failures"][:10])
    return (
        f"# {s['steps']} steps of training while {s['clients']} clients are served\n\n"
        f"`python benchmarks/train_serve.py --steps {s['steps']} --publish-every {s['publish_every']} "
        f"--clients {s['clients']} --workers {s['workers']}`. Three expert actors, a tiny model of bytes; "
        f"each client streams {s['num_tokens']} tokens greedily again and again, and each answer is compared with what "
        "`transformers` generates from each published folder.\n\n"
        f"{report.table(['number'], rows)}\n{failures}\n"
        f"{report.table(['median, s', '99 %, s', 'longest, s'], pauses)}\n\n"
        "The second table is the time between two tokens of a stream. A version took "
        f"{took['median']:.2f} s (at most {took['longest']:.2f} s) from being announced to being served by all; the "
        f"run took {data['run_s']:.0f} s, with the start of its workers."
    )


def seconds(quantiles: Sequence[float]) -> list[str]:
    """Median, 99 % and the longest; empty when there was none."""
    return [f"{value:.3f}" for value in quantiles] or ["none"] * 3
