"""From nothing to a service that answers: a small model, its experts in two actors, one streamed answer, the end.

`python examples/quick_start.py [--seconds 20]`: one machine, no download. The model learns for so long on the sources
of Python's standard library and is kept in `~/.cache/ray_moe`; the longer, the more the text is like Python.
"""

from __future__ import annotations

import argparse

from ray_moe import Client, Config, Service
from ray_moe.models.demo import DemoSettings, demo_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="to train the model for, the first time")
    arguments = parser.parse_args()
    model = demo_model(DemoSettings(train_seconds=arguments.seconds))
    print(f"the model is {'still' if model.reused else 'now'} in {model.path}")
    config = Config.model_validate(
        {
            "model": str(model.path),
            "experts": {"num_actors": 2, "num_cpus": 0.1},  # of a CPU, reserved: two fit on any machine
            "router": {"num_cpus": 0.1},
            "server": {"port": 0, "http_port": 0},  # free ones; 8476 and 8477 unless told otherwise
        }
    )
    with Service(config) as service, Client(service.address) as client:
        print(f"it is served at {service.address} (gRPC) and {service.http_address}/v1 (OpenAI)")
        print("\ndef main(", end="")
        for chunk in client.stream("def main(", max_new_tokens=96, temperature=0.6, seed=1):
            print(chunk.text, end="", flush=True)
        status = client.status()
        print(f"\n\n{status.router.generated_tokens} tokens; the service is {status.state}, and its experts are in")
        for host in status.hosts:
            print(f"  {host.host_id}, process {host.pid}: {host.num_experts} experts, {host.num_rows} rows computed")
    print("everything that was started has ended")


if __name__ == "__main__":
    main()
