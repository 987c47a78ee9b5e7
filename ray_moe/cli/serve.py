"""`ray-moe serve`: start the service, say where it is, and stay until told to stop."""

from __future__ import annotations

from rich.console import Console

from ray_moe.cli.terminal import Interrupts, ProgressView
from ray_moe.config import Config
from ray_moe.service.app import Service, ServiceProgress


def run(config: Config, interrupts: Interrupts) -> None:
    """Serve until SIGINT or SIGTERM; everything that was started is ended when this returns or raises.

    Raises: what `Service.start` raises; KeyboardInterrupt when it was interrupted before it was ready.
    """
    console = Console()
    view = ProgressView(Console(stderr=True))

    def show(progress: ServiceProgress) -> None:
        interrupts.install()
        view.update(progress.stage, progress.done_bytes, progress.total_bytes, progress.detail)

    service = Service(config, on_progress=show)
    try:
        with view:
            service.start()
        interrupts.install()
        console.print(
            f"serving {config.model} on {service.address} (gRPC)"
            f"{f' and {service.http_address}/v1 (OpenAI)' if service.http_address else ''}\n"
            f"  ray-moe generate 'Hello' --server {service.address}\n"
            f"  ray-moe status --server {service.address}\n"
            "Ctrl-C stops",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        service.wait()
    except SystemExit as error:  # Ray's own SIGTERM handler, in place during `ray.init`
        raise KeyboardInterrupt from error
    finally:
        interrupts.ignore()
        service.stop()
