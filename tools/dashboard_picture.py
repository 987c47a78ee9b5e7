"""The picture of the dashboard in the README, taken of a real service: `python tools/dashboard_picture.py`.

A small model with random weights, its experts in five actors on a local Ray, and streams of random prompts. One actor
is killed; the picture is taken when that is repaired and some time has passed. Needs Chromium (`make browser`).
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
import threading
from pathlib import Path

import torch
from playwright.async_api import expect

from ray_moe.client.sync import Client
from ray_moe.config import Config
from ray_moe.service.composition import Service
from tests.browser import open_page, start_browser
from tests.tiny_models import save

OUT = Path(__file__).parents[1] / "docs" / "images" / "dashboard.png"
NUM_STREAMS = 6
SECONDS_BEFORE, SECONDS_AFTER = 75, 40


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "olmoe-12x64")
        save("olmoe", model, num_hidden_layers=12, num_experts=64, num_experts_per_tok=6, max_position_embeddings=4096)
        tree = {
            "model": str(model),
            "service_name": f"picture-{os.getpid()}",
            "experts": {"num_actors": 5, "num_cpus": 0.1, "spare_slots": 2},
            "router": {"num_cpus": 0.1},
            "server": {"port": 0, "http_port": 0},
            "ray": {"num_cpus": 2},
        }
        with Service(Config.model_validate(tree)) as service:
            OUT.parent.mkdir(exist_ok=True)
            ended = threading.Event()
            streams = [threading.Thread(target=_stream, args=(service.address, n, ended)) for n in range(NUM_STREAMS)]
            for stream in streams:
                stream.start()
            try:
                asyncio.run(_take(service))
            finally:
                ended.set()
                for stream in streams:
                    stream.join()


def _stream(address: str, number: int, ended: threading.Event) -> None:
    """One generation after another, each of a length of its own."""
    numbers = random.Random(number)
    with Client(address) as client:
        while not ended.is_set():
            prompt = [numbers.randrange(3, 96) for _ in range(numbers.randrange(8, 40))]
            length = numbers.randrange(60, 200)
            for _ in client.stream(token_ids=prompt, max_new_tokens=length, temperature=1.0, seed=number):
                if ended.is_set():
                    return
            ended.wait(numbers.random())


async def _take(service: Service) -> None:
    async with start_browser() as browser, open_page(browser, 1280, 1130) as (page, _):
        await page.goto(f"{service.http_address}/dashboard")
        await expect(page.locator("#state")).to_have_text("ready")
        await asyncio.sleep(SECONDS_BEFORE)
        with Client(service.address) as client:
            pid = next(host.pid for host in client.status().hosts if host.host_id == "expert-3")
        os.kill(pid, signal.SIGKILL)
        await expect(page.locator("#events .badge", has_text="repaired").first).to_be_visible(timeout=60_000)
        await asyncio.sleep(SECONDS_AFTER)
        await page.locator("#map").focus()
        await page.keyboard.press("Enter")
        await page.evaluate("window.scrollTo(0, 0)")
        await page.screenshot(path=OUT, full_page=True)


if __name__ == "__main__":
    main()
