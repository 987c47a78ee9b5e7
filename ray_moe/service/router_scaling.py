"""How many routers Ray Serve is to keep. Called in Serve's controller, so it imports nothing heavy."""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

REQUESTS = "requests"
"""What routers record: requests of all their doors, computed or waiting."""


def routers_for_requests(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """As many as leave each the configured number of requests; Serve applies its bounds and delays to it.

    Serve's own policy counts only what its proxies bring, and clients of gRPC come to the routers directly.
    """
    requests = sum((context.aggregated_metrics or {}).get(REQUESTS, {}).values())
    return math.ceil(requests / context.config.target_ongoing_requests), {}
