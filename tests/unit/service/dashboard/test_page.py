"""The dashboard in a real browser over a fake backend: what a person sees, presses and hears."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from ray_moe.errors import Unavailable
from ray_moe.service.admission import Admission
from ray_moe.service.auth import KeyRing
from ray_moe.service.dashboard import files
from ray_moe.service.openai.server import HttpFrontDoor
from ray_moe.types import ChaosRequest, ClusterEvent
from tests.browser import open_page, start_browser
from tests.unit.service.dashboard.busy_backend import BusyBackend
from tests.unit.service.fake_backend import FakeBackend
from tests.unit.service.openai.http_door import until
from tests.unit.service.test_auth import add

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with start_browser() as browser:
        yield browser


@asynccontextmanager
async def dashboard(
    browser: Browser, backend: FakeBackend, keys: Path | None = None, complains: bool = False, **screen: Any
) -> AsyncIterator[Page]:
    """Its page, opened; at the end nothing may have been complained about, unless it `complains` rightly."""
    ring = KeyRing(keys)
    ring.load()
    door = HttpFrontDoor(backend, port=0, admission=Admission(backend, keys=ring))
    port = await door.start()
    try:
        async with open_page(browser, **screen) as (page, complaints):
            await page.goto(f"http://127.0.0.1:{port}/dashboard")
            yield page
            assert complains or complaints == []
    finally:
        await door.stop(0)


def figure(page: Page, name: str) -> Any:
    return page.locator(f"#tile-{name} dd > span")


async def reading(page: Page) -> str:
    return await page.locator("#reading").inner_text()


# --- what it shows -------------------------------------------------------------------------------------------
async def test_it_shows_the_service_and_follows_it(browser: Browser) -> None:
    backend = BusyBackend()
    async with dashboard(browser, backend) as page:
        await expect(page.locator("#state")).to_have_text("ready")
        await expect(page.locator("#link")).to_have_text("live")
        await expect(page).to_have_title("kite-2 · ready")
        await expect(figure(page, "requests")).to_have_text("38")
        await expect(figure(page, "hosts")).to_have_text("3 / 3")
        await expect(page.locator("#hosts tbody tr")).to_have_count(3)
        await expect(page.locator("#experts-size")).to_have_text("4 layers × 8 experts")
        await expect(figure(page, "gap")).to_contain_text("ms")
        await until(lambda: backend.num_looks >= 4)
        rate = float((await figure(page, "tokens").inner_text()).replace(" k", "e3"))
        assert 400 < rate < 1400  # 840 flow
        assert float(await figure(page, "balance").inner_text()) == pytest.approx(0.93, abs=0.05)
        for chart in ("tokens", "balance", "first", "gap"):
            await expect(page.locator(f"#chart-{chart} .scatterlayer path.js-line").first).to_be_attached()

        await page.evaluate("() => document.getElementById('changing').scrollIntoView()")
        await expect(page.locator("#changing")).to_have_text("No change is under way.")
        backend.changing = "resize: 3 to 4 hosts"
        await expect(page.locator("#changing")).to_have_text("Under way: resize: 3 to 4 hosts")


async def test_a_lost_host_and_its_repair_are_seen(browser: Browser) -> None:
    backend = BusyBackend()
    async with dashboard(browser, backend) as page:
        await expect(page.locator("#state")).to_have_text("ready")
        await page.check("input[value=replicas]", force=True)
        backend.lose("expert-1")
        lost = page.locator("#hosts tr[data-host=expert-1]")
        await expect(page.locator("#state")).to_have_text("degraded")
        await expect(lost.locator(".badge")).to_have_text("lost")
        await expect(page.locator("#events li").first).to_contain_text("lost")
        await expect(figure(page, "hosts")).to_have_text("2 / 3")
        await page.locator("#map").focus()
        await page.keyboard.press("ArrowRight")  # expert 1 was on expert-1
        assert "no host holds it" in await reading(page)

        backend.repair("expert-1")
        await expect(lost.locator(".badge")).to_have_text("ready")
        await expect(page.locator("#events li").first).to_contain_text("expert-1 holds its experts again")
        await expect(page.locator("#reading")).to_contain_text("1 replica on expert-1")


async def test_what_others_wrote_is_text_and_nothing_else(browser: Browser) -> None:
    backend = BusyBackend()
    backend.events = [ClusterEvent(1.0, "<b>x</b>", "<img src=x onerror=alert(1)>")]
    async with dashboard(browser, backend) as page:
        event = page.locator("#events li")
        await expect(event).to_contain_text("<img src=x onerror=alert(1)>")
        assert await event.locator("img, b").count() == 0


async def test_the_largest_model_is_drawn_in_time(browser: Browser) -> None:
    async with dashboard(browser, BusyBackend(61, 256, 16)) as page:
        await expect(page.locator("#experts-size")).to_have_text("61 layers × 256 experts")
        times = []
        for _ in range(3):
            await page.wait_for_timeout(300)
            times.append(float(await page.get_attribute("#map", "data-draw-ms") or "inf"))
        assert min(times) < 200  # of the second between two looks, without a GPU and beside other tests


# --- how it is used ------------------------------------------------------------------------------------------
async def test_the_heatmap_is_read_by_pointer_and_keys_and_said(browser: Browser) -> None:
    backend = BusyBackend()
    async with dashboard(browser, backend) as page:
        await expect(page.locator("#experts-size")).to_have_text("4 layers × 8 experts")
        canvas = page.locator("#map")
        box = await canvas.bounding_box()
        assert box is not None
        await canvas.hover(position={"x": box["width"] * 5.5 / 8, "y": 16 + (box["height"] - 16) * 2.5 / 4})
        assert (await reading(page)).startswith("layers.2.mlp, expert 5 · ")
        await canvas.focus()
        for key, at in (
            ("Home", "layers.2.mlp, expert 0"),
            ("ArrowUp", "layers.1.mlp, expert 0"),
            ("ArrowLeft", "layers.1.mlp, expert 0"),
            ("End", "layers.1.mlp, expert 7"),
            ("PageDown", "layers.3.mlp, expert 7"),
        ):
            await page.keyboard.press(key)
            assert (await reading(page)).startswith(f"{at} · ")
            assert (await page.locator("#reading-said").inner_text()).startswith(f"{at} · ")
        await page.keyboard.press("Enter")
        hottest = max(
            (
                (tokens, layer, expert)
                for layer, row in enumerate(backend.tokens.values())
                for expert, tokens in enumerate(row)
            )
        )
        assert (await reading(page)).startswith(f"layers.{hottest[1]}.mlp, expert {hottest[2]} · ")


async def test_the_same_is_there_as_a_table(browser: Browser) -> None:
    async with dashboard(browser, BusyBackend()) as page:
        await page.click("#as-table summary")
        await expect(page.locator("#layer-table tbody tr")).to_have_count(4)
        await page.select_option("#table-layer", "3")
        await expect(page.locator("#expert-table tbody tr")).to_have_count(8)
        await expect(page.locator("#expert-table tbody tr").first).to_contain_text("expert-0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nothing_is_beyond_the_edge_of_a_phone(browser: Browser, scheme: str) -> None:
    async with dashboard(browser, BusyBackend(), width=390, height=844, scheme=scheme) as page:
        await expect(page.locator("#hosts tbody tr")).to_have_count(3)
        assert await page.evaluate("document.documentElement.scrollWidth") <= 390
        assert await page.evaluate("document.documentElement.dataset.theme") == scheme
        await page.select_option("#theme", "dark" if scheme == "light" else "light")
        assert await page.evaluate("document.documentElement.dataset.theme") != scheme


async def test_everything_that_is_pressed_has_a_name(browser: Browser) -> None:
    """As assistive technology has it: names of buttons and fields, and headings in order."""
    async with dashboard(browser, BusyBackend()) as page:
        await expect(page.locator("#board")).to_be_visible()
        tree = await page.locator("body").aria_snapshot()
        for name in (
            'button "Plan …"',
            'button "Pause"',
            'radio "Load" [checked]',
            'combobox "Colours"',
            'log "Events',
        ):
            assert name in tree
        nameless = [
            line.strip() for line in tree.splitlines() if line.strip() in ("- button", "- combobox", "- textbox")
        ]
        assert nameless == []


# --- what it does --------------------------------------------------------------------------------------------
async def test_a_plan_is_shown_before_it_is_meant(browser: Browser) -> None:
    backend = BusyBackend()
    async with dashboard(browser, backend) as page:
        await page.click("#do-plan")
        await expect(page.locator("#dialog-body")).to_contain_text("0.500 → 0.875")
        await expect(page.locator("#dialog-body")).to_contain_text("8.0 GiB")
        await expect(page.locator("#carry-out")).to_be_disabled()
        await page.check("#meant")
        await page.click("#carry-out")
        await expect(page.locator("#outcome")).to_contain_text("Begun: 2 experts in 2 steps")
        assert backend.wishes == [("plan", True), ("plan", False)]
        await page.keyboard.press("Escape")
        await expect(page.locator("#dialog")).to_be_hidden()


async def test_a_host_is_drained_and_hurt_only_when_it_is_meant(browser: Browser) -> None:
    backend = BusyBackend()
    async with dashboard(browser, backend, complains=True) as page:  # of the refusal at the end
        await expect(page.locator("#hosts tbody tr")).to_have_count(3)
        await page.click("#do-drain")
        await page.select_option("#dialog-body select", "expert-2")
        await expect(page.locator("#carry-out")).to_have_text("Drain expert-2")
        await page.keyboard.press("Enter")
        assert backend.wishes == []
        await page.check("#meant")
        await page.click("#carry-out")
        await expect(page.locator("#outcome")).to_contain_text("Begun: expert-2")
        await page.click("#cancel")

        await page.click("#do-chaos")
        await page.locator("#dialog-body select").nth(1).select_option("expert-0")
        await page.check("#meant")
        await page.click("#carry-out")
        await expect(page.locator("#outcome")).to_contain_text("longest stall 250 ms")
        await page.click("#cancel")

        backend.failure = Unavailable("another change is under way")
        await page.click("#do-drain")
        await page.check("#meant")
        await page.click("#carry-out")
        await expect(page.locator("#outcome")).to_have_text("another change is under way")
        await expect(page.locator("#carry-out")).to_be_enabled()
    assert backend.wishes[:2] == [("drain", "expert-2", False), ("chaos", ChaosRequest("kill", "expert-0"))]


# --- who sees it, and when it cannot ----------------------------------------------------------------------------
async def test_a_key_is_asked_for_kept_in_the_tab_and_never_in_an_address(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    chief, ana = add(path, "chief", ("admin",)), add(path, "ana", ("infer",))
    async with dashboard(browser, BusyBackend(), path, complains=True) as page:  # of 401 and 403
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await expect(page.locator("#door")).to_be_visible()
        await expect(page.locator("#board")).to_be_hidden()
        for key, said in (("rm_wrong", "not known here"), (ana, "needs the role admin")):
            await page.fill("#key", key)
            await page.keyboard.press("Enter")
            await expect(page.locator("#refused")).to_contain_text(said)
        await page.fill("#key", chief)
        await page.click("#sign-in button")
        await expect(page.locator("#board")).to_be_visible()
        await page.reload()
        await expect(page.locator("#board")).to_be_visible()  # still signed in
        assert asked
        assert not any(key in url for url in [*asked, page.url] for key in (chief, ana))
        assert await page.evaluate("JSON.stringify(localStorage) + document.cookie") == "{}"
        await page.click("#sign-out")
        await expect(page.locator("#door")).to_be_visible()
        assert await page.evaluate("sessionStorage.length") == 0


async def test_it_says_when_the_service_is_gone_and_goes_on_when_it_is_back(browser: Browser) -> None:
    backend = BusyBackend()
    async with dashboard(browser, backend, complains=True) as page:
        await expect(page.locator("#link")).to_have_text("live")
        await page.context.set_offline(True)
        await expect(page.locator("#banner")).to_contain_text("cannot be reached since")
        await expect(page.locator("#board")).to_be_visible()  # the last picture stays
        await page.context.set_offline(False)
        await expect(page.locator("#banner")).to_be_hidden()
        backend.status_failure = Unavailable("it restarts")
        await expect(page.locator("#banner")).to_contain_text("The controller does not answer")


async def test_it_looks_no_more_while_nobody_looks_at_it(browser: Browser) -> None:
    backend = BusyBackend()
    async with dashboard(browser, backend) as page:
        await expect(page.locator("#link")).to_have_text("live")
        await page.click("#pause")
        await expect(page.locator("#link")).to_have_text("paused")
        before = backend.num_looks
        await page.wait_for_timeout(1500)
        assert backend.num_looks == before
        await page.click("#pause")
        await until(lambda: backend.num_looks > before)
        await page.evaluate(
            "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )
        await expect(page.locator("#link")).to_have_text("paused")


async def test_without_plotly_all_but_the_charts_is_there(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    async with dashboard(browser, BusyBackend(), complains=True) as page:
        await expect(page.locator("#no-charts")).to_contain_text("pip install 'ray-moe[dashboard]'")
        await expect(page.locator("#hosts tbody tr")).to_have_count(3)


# --- its arithmetic ------------------------------------------------------------------------------------------
async def test_rates_and_quantiles_are_right(browser: Browser) -> None:
    """The page's own module, asked in the browser; expected values by hand."""
    async with dashboard(browser, BusyBackend()) as page:
        quantiles = await page.evaluate(
            """async () => {
                const { quantile } = await import("/dashboard/static/model.js");
                const ask = (counts, q) => quantile([1, 2, 4], counts, q);
                return [ask([0, 0, 0, 0], 0.5), ask([10, 0, 0, 0], 0.5), ask([5, 5, 0, 0], 0.75), ask([0, 0, 4, 0], 1),
                        ask([0, 0, 0, 3], 0.5), ask([1, 0, 0, 1], 0.5)];
            }"""
        )
        assert quantiles == [None, 0.5, 1.5, 4, 4, 1]
        told = await page.evaluate(
            """async () => {
                const { History } = await import("/dashboard/static/model.js");
                const history = new History();
                const look = (at_s, tokens, pid, rows) => history.add({
                    at_s, unix_s: at_s, epoch: 1, tokens: [[tokens, 2 * tokens]], layers: ["a"], vitals: null,
                    router: { router_id: "r", pid, generated_tokens: tokens, retried_calls: 0, hedged_calls: 0 },
                    hosts: [{ host_id: "h", num_rows: rows, utilisation: 0.5 }],
                    placement: { hosts: ["h"], holders: [[[0], []]], replicas: [[1, 0]] },
                });
                look(10, 100, 1, 50);
                look(12, 140, 1, 150);
                const { rates, rowsPerS, utilisations } = history;
                const first = [rates.tokens, [...history.loads[0]], rowsPerS.get("h"), utilisations];
                look(16, 140, 1, 10);  // a half-life without tokens; the host began anew
                const faded = [[...history.loads[0]], history.rowsPerS.get("h")];
                look(17, 5, 2, 20);  // another life of the router
                const anew = [history.points.at(-1).tokens, history.loads.length];
                look(18, 12, 2, 30);
                const second = history.rates.tokens;
                look(20, 150, 1, 40);  // two routers behind a proxy: each is compared with itself
                return [first, faded, anew, second, history.rates.tokens];
            }"""
        )
        assert told == [[20, [20, 40], 50, [[0.5, 0]]], [[10, 20], 0], [None, 0], 7, 2.5]
