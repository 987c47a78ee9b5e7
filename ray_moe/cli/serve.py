"""`ray-moe serve`: start the service, say where it is and who may call it, and stay until told to stop."""

from __future__ import annotations

from rich.console import Console

from ray_moe.actors import logs
from ray_moe.cli.terminal import Interrupts, ProgressView
from ray_moe.config import Config, ServerConfig
from ray_moe.service.composition import Service, ServiceProgress


def run(config: Config, interrupts: Interrupts) -> None:
    """Serve until SIGINT or SIGTERM; everything that was started is ended when this returns or raises.

    Raises: what `Service.start` raises; KeyboardInterrupt when it was interrupted before it was ready.
    """
    logs.configure(config.logs, "driver")
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
        how = f"--server {service.address}{' --tls' if config.server.tls_cert_file else ''}"
        console.print(
            f"serving {config.model} on {service.address} (gRPC)"
            f"{f' and {service.http_address}/v1 (OpenAI)' if service.http_address else ''}\n"
            f"{who_may_call(config.server)}\n"
            f"  ray-moe generate 'Hello' {how}\n"
            f"  ray-moe status {how}\n"
            f"{f'  {service.http_address}/dashboard{chr(10)}' if service.http_address else ''}"
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


def who_may_call(server: ServerConfig) -> str:
    """One line: where it listens, and what is asked of those who call."""
    where = "this machine only" if server.is_local else server.host
    certificate = f"a certificate of {server.tls_client_ca_file}" if server.tls_client_ca_file else ""
    if server.keys_file:
        return f"listens on {where}, for those with a key of {server.keys_file}{certificate and f' and {certificate}'}"
    return (
        f"no API keys: listens on {where}; whoever reaches it{certificate and f' with {certificate}'} may do everything"
    )
