"""The dashboard of a real service in a real browser: traffic, a key, an expert actor that is killed and comes back."""

from __future__ import annotations

import asyncio
import os
import signal

from playwright.async_api import expect

from ray_moe.client.sync import Client
from ray_moe.service.composition import Service
from ray_moe.service.keys import ApiKey, Role, digest_of, editing, new_key
from tests.browser import open_page, start_browser
from tests.ray.support import Streams, all_ready, await_status, greedy, prompts

NUM_STREAMS = 4
NUM_TOKENS = 800
ROLES: frozenset[Role] = frozenset({"admin", "infer"})


def test_traffic_a_killed_actor_and_its_repair_are_seen(mixtral, serve, tmp_path):
    keys, key = tmp_path / "keys.json", new_key()
    with editing(keys) as entries:
        entries.append(ApiKey("chief", digest_of(key), ROLES))
    service = serve(mixtral[1], server={"port": 0, "http_port": 0, "keys_file": str(keys)})
    with Client(service.address, api_key=key) as client:
        hosts = {host.host_id: host.pid for host in await_status(client, all_ready).hosts}
        expected = greedy(mixtral[0], prompts(NUM_STREAMS), NUM_TOKENS)
        with Streams(service.address, prompts(NUM_STREAMS), NUM_TOKENS, api_key=key) as streams:
            streams.wait_for(5)
            asyncio.run(look(service, key, hosts))
        assert streams.results == expected


async def look(service: Service, key: str, hosts: dict[str, int]) -> None:
    """What a person sees while the streams run."""
    async with start_browser() as browser, open_page(browser) as (page, complaints):
        await page.goto(f"{service.http_address}/dashboard")
        await expect(page.locator("#door")).to_be_visible()
        assert "401" in complaints.pop()  # what asked for the key
        await page.fill("#key", key)
        await page.click("#sign-in button")
        await expect(page.locator("#state")).to_have_text("ready")
        await expect(page.locator("#hosts tbody tr")).to_have_count(len(hosts))
        await expect(page.locator("#experts-size")).to_have_text("2 layers × 6 experts")
        words = page.locator("#tile-tokens small")
        before = await words.inner_text()
        await expect(page.locator("#chart-tokens path.js-line").first).to_be_attached()

        os.kill(hosts["expert-1"], signal.SIGKILL)
        await expect(page.locator("#events .badge", has_text="lost")).to_be_visible()
        await expect(page.locator("#events .badge", has_text="repaired")).to_be_visible()
        row = page.locator("#hosts tr[data-host=expert-1]")
        await expect(row.locator(".badge")).to_have_text("ready")
        await expect(row.locator("[data-name=restarts]")).to_have_text("1")
        with Client(service.address, api_key=key) as client:  # the others may have ended meanwhile
            await asyncio.to_thread(client.generate, token_ids=[1, 2, 3], max_new_tokens=NUM_STREAMS, ignore_eos=True)
        await expect(words).not_to_have_text(before)
        await page.locator("#map").focus()
        await page.keyboard.press("Enter")
        await expect(page.locator("#reading")).to_contain_text("1 replica on expert-")
        assert complaints == []
