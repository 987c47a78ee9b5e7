"""What Ray knows of the nodes of the cluster, and has no public call for."""

from __future__ import annotations

import ray


def draining() -> frozenset[str]:
    """Ids of the living nodes that are going: a spot notice, `ray drain-node`, an autoscaler that has found them idle.

    Ray's own libraries (Serve, Train) ask in this way.
    """
    return frozenset(ray._private.state.state.get_draining_nodes())
