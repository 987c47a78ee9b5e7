// The dashboard: looks at the service each second, and shows what that says. Nothing is fetched from anywhere else.

import * as api from "./api.js";
import { Charts } from "./charts.js";
import { clock, rate, text } from "./format.js";
import { Heatmap } from "./heatmap.js";
import { History, layerName } from "./model.js";
import * as views from "./views.js";
import { Wishes } from "./wishes.js";

const EVERY_MS = 1000;
const MAX_WAIT_MS = 5000;
const byId = (id) => document.getElementById(id);

const history = new History();
const charts = new Charts();
let heatmap = null;
let wake = () => {};
let paused = false;
let signedOut = false;
let lostSince = null;
let failures = 0;

// --- Colours -----------------------------------------------------------------------------------------------
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function colours() {
  const wanted = localStorage.getItem("ray_moe.theme") ?? "auto";
  byId("theme").value = wanted;
  document.documentElement.dataset.theme = wanted === "auto" ? (dark.matches ? "dark" : "light") : wanted;
  heatmap?.recolour();
  charts.draw(history.points);
}

// --- The picture -------------------------------------------------------------------------------------------
function metric() {
  return document.querySelector("input[name=metric]:checked").value;
}

function drawMap() {
  if (!history.now) return;
  const shown = metric();
  const values = history.values(shown);
  const highest = values.reduce((most, row) => row.reduce((top, value) => Math.max(top, value), most), 0);
  const top = shown === "utilisation" ? 1 : shown === "replicas" ? Math.max(highest, 2) : highest;
  const names = history.now.layers.map(layerName);
  heatmap.update(values, names, { bottom: shown === "replicas" ? 1 : 0, top, root: shown === "load" });
  byId("legend-none").hidden = shown !== "replicas";
  text(byId("legend-low"), shown === "replicas" ? "1" : "0");
  text(byId("legend-high"), shown === "utilisation" ? "100 %" : shown === "replicas" ? String(top) : `${rate(top)} tokens/s`);
  text(byId("reading"), views.reading(history, heatmap.cell));
}

function show(picture) {
  history.add(picture);
  const { layers, tokens } = picture;
  text(byId("experts-size"), layers.length ? `${layers.length} layers × ${Math.max(...tokens.map((row) => row.length))} experts` : "");
  byId("sign-out").hidden = picture.caller === null;
  byId("sign-out").title = picture.caller === null ? "" : `signed in as ${picture.caller}`;
  views.header(history);
  views.tiles(history);
  views.hosts(history);
  views.plan(history);
  views.events(history);
  views.tables(history);
  drawMap();
  charts.draw(history.points);
}

// --- Looking -----------------------------------------------------------------------------------------------
function link(state, words) {
  byId("link").dataset.state = state;
  text(byId("link"), words);
}

function banner(words) {
  byId("banner").hidden = !words;
  text(byId("banner"), words);
}

function askForKey(words) {
  signedOut = true;
  byId("board").hidden = true;
  byId("door").hidden = false;
  text(byId("refused"), words);
  link("waiting", "signed out");
  banner("");
  byId("key").focus();
}

async function look() {
  try {
    const picture = await api.state(history.placementEpoch);
    byId("door").hidden = true;
    byId("board").hidden = false;
    show(picture);
    failures = 0;
    lostSince = null;
    link("live", "live");
    banner(picture.service ? "" : "The controller does not answer: hosts and events are not known at the moment.");
  } catch (error) {
    failures++;
    if (error instanceof api.Refused && (error.status === 401 || error.status === 403)) {
      const isFirst = error.status === 401 && !api.key.get();
      if (error.status === 401 || api.key.get()) return askForKey(isFirst ? "" : error.message);
    }
    lostSince ??= Date.now() / 1000;
    link("lost", "not reached");
    const why = error instanceof api.Unreachable ? "cannot be reached" : "does not answer as expected";
    banner(`The service ${why} since ${clock(lostSince)}: ${error.message}. Trying again; what is below is from before.`);
    if (!(error instanceof api.Unreachable || error instanceof api.Refused)) throw error;
  }
}

/** Until the time is over, or somebody wakes it. */
function rest(timeMs) {
  return new Promise((resolve) => {
    const timer = timeMs === null ? null : setTimeout(resolve, timeMs);
    wake = () => {
      clearTimeout(timer);
      resolve();
    };
  });
}

async function follow() {
  for (;;) {
    if (document.hidden || paused || signedOut) {
      if (!signedOut) link("waiting", "paused");
      await rest(null);
      continue;
    }
    const began = performance.now();
    await look().catch((error) => console.error(error));
    const wait = Math.min(EVERY_MS * 2 ** Math.min(failures, 3), MAX_WAIT_MS);
    if (!signedOut) await rest(Math.max(50, wait - (performance.now() - began)));
  }
}

// --- Start -------------------------------------------------------------------------------------------------
heatmap = new Heatmap(byId("map"), byId("map-layers"), byId("legend-bar"), (at, said) => {
  if (!history.now) return;
  const words = views.reading(history, at);
  text(byId("reading"), words);
  if (said) text(byId("reading-said"), words);
});
new Wishes(history);

byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  api.key.set(byId("key").value.trim());
  byId("key").value = "";
  signedOut = false;
  wake();
});
byId("sign-out").addEventListener("click", () => {
  api.key.forget();
  askForKey("");
});
byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
  text(byId("pause"), paused ? "Go on" : "Pause");
  wake();
});
byId("theme").addEventListener("change", () => {
  localStorage.setItem("ray_moe.theme", byId("theme").value);
  colours();
});
for (const input of document.querySelectorAll("input[name=metric]")) input.addEventListener("change", drawMap);
byId("as-table").addEventListener("toggle", () => history.now && views.tables(history));
byId("table-layer").addEventListener("change", () => views.tables(history));
dark.addEventListener("change", colours);
document.addEventListener("visibilitychange", () => wake());

colours();
charts.start().then(
  () => charts.draw(history.points),
  () => {
    document.querySelector(".charts").hidden = true;
    byId("no-charts").hidden = false;
    text(byId("no-charts"), "Charts over time need plotly where the routers run: pip install 'ray-moe[dashboard]'.");
  },
);
follow();
