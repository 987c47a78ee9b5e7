// The parts of the page that are text: tiles, hosts, experts as tables, the plan, events.

import { badge, bytes, clock, duration, element, ms, number, percent, rate, text, tone } from "./format.js";
import { layerName, shortPath } from "./model.js";

const byId = (id) => document.getElementById(id);
const cell = (value, attributes = {}) => element("td", attributes, value);

export function header(history) {
  const { service, router } = history.now;
  const state = service?.state ?? "degraded";
  text(byId("model"), service?.model ?? "");
  byId("model").title = service?.model ?? "";
  byId("state").hidden = false;
  text(byId("state"), state);
  byId("state").dataset.tone = tone(state) ?? "warn";
  const parts = service ? [service.model_type, `up ${duration(service.uptime_s)}`, `ray_moe ${service.version}`] : ["the controller does not answer"];
  text(byId("about"), [...parts, router.router_id].filter(Boolean).join(" · "));
  document.title = `${service?.model.split("/").pop() ?? "ray_moe"} · ${state}`;
}

export function tiles(history) {
  const { router, service, hosts } = history.now;
  const { tokens, retried, hedged } = history.rates;
  const { first, gap } = history.points[history.points.length - 1];
  const ready = hosts.filter((host) => host.state === "ready").length;
  const all = [
    ["tokens", "Tokens per second", rate(tokens), `${number(router.generated_tokens)} in all`],
    ["requests", "Requests", number(router.active_requests), `${number(router.queued_requests)} queued, ${number(router.failed_requests)} failed`],
    ["first", "Time to first token", ms(first[0]), `p95 ${ms(first[1])}`],
    ["gap", "Between two tokens", ms(gap[0]), `p95 ${ms(gap[1])}, max ${ms(router.longest_pause_s * 1000)}`],
    ["balance", "Balancedness", router.balancedness.toFixed(2), "1 is perfect"],
    ["hosts", "Hosts ready", `${ready} / ${hosts.length}`, `${number(hosts.reduce((sum, host) => sum + host.queued_rows, 0))} rows wait`],
    ["safe", "Survive a lost node", service ? percent(service.p_lossless) : "–", "with every expert"],
    ["again", "Calls again, hedged", `${number(router.retried_calls)}, ${number(router.hedged_calls)}`, `${rate(retried)}/s, ${rate(hedged)}/s`],
  ];
  const parent = byId("tiles");
  if (!parent.children.length) {
    for (const [id, name] of all) {
      parent.append(element("dl", { class: "tile", id: `tile-${id}` }, element("dt", {}, name), element("dd", {}, element("span"), element("small"))));
    }
  }
  for (const [id, , value, more] of all) {
    const [shown, small] = byId(`tile-${id}`).querySelector("dd").children;
    text(shown, value);
    text(small, more);
  }
}

export function hosts(history) {
  const { hosts } = history.now;
  const weights = hosts.reduce((sum, host) => sum + host.weight_bytes, 0);
  text(byId("hosts-size"), `${hosts.length}, with ${bytes(weights)} of experts`);
  byId("hosts").tBodies[0].replaceChildren(
    ...hosts.map((host) => {
      const loading = host.loaded_bytes < host.weight_bytes;
      const held = loading ? `${percent(host.loaded_bytes / host.weight_bytes)} loaded` : number(host.num_experts);
      const bar = element("progress", { max: 1, value: host.utilisation, "aria-label": `utilisation of ${host.host_id}` });
      return element(
        "tr",
        { "data-host": host.host_id },
        element("th", { scope: "row" }, host.host_id),
        cell(badge(host.state)),
        cell(host.node_id.slice(0, 8), { "data-name": "node", title: host.node_id }),
        cell(held, { class: "num", "data-name": "experts" }),
        cell(bytes(host.rss_bytes), { class: "num", "data-name": "memory" }),
        cell(rate(history.rowsPerS.get(host.host_id) ?? null), { class: "num", "data-name": "rows/s" }),
        cell(`${host.speed.toFixed(2)} ×`, { class: "num", "data-name": "speed" }),
        cell(element("span", { class: "meter" }, bar, element("span", { class: "num" }, percent(host.utilisation))), { "data-name": "busy" }),
        cell(number(host.queued_rows), { class: "num", "data-name": "queue" }),
        cell(number(host.restarts), { class: "num", "data-name": "restarts" }),
      );
    }),
  );
}

export function plan(history) {
  const { service, versions, epoch, router, kv_used_bytes, kv_max_bytes } = history.now;
  text(byId("changing"), service?.changing ? `Under way: ${service.changing}` : "No change is under way.");
  const current = versions.find((version) => version.state === "current");
  const canary = versions.find((version) => version.state === "canary");
  const facts = [
    ["routing epoch", number(epoch)],
    ["weights", current ? `version ${current.number}, of ${versions.length} held` : "–"],
    ["canary", canary ? `version ${canary.number}: drift ${canary.drift?.toFixed(4) ?? "not finite"} over ${number(canary.num_rows)} rows` : "none"],
    ["router's own experts", `${bytes(router.own_bytes)}, ${number(router.own_rows)} rows, ${number(router.lifeboat_loads)} read by the lifeboat`],
    ["keys and values", kv_max_bytes ? `${bytes(kv_used_bytes)} of ${bytes(kv_max_bytes)}` : "–"],
    ["routers", service?.routers.map((each) => `${each.router_id || each.grpc_address}${each.ready ? "" : " (not ready)"}`).join(", ") || "–"],
  ];
  const parent = byId("facts");
  if (!parent.children.length) for (const [name] of facts) parent.append(element("dt", {}, name), element("dd"));
  facts.forEach(([, value], i) => text(parent.children[2 * i + 1], value));
}

let shownEvents = "";

export function events(history) {
  const { events } = history.now;
  const key = JSON.stringify([events.length, events[0], events[events.length - 1]]);
  if (key === shownEvents) return; // what is read aloud, or scrolled, is left alone
  shownEvents = key;
  byId("events").replaceChildren(
    ...[...events].reverse().map((event) =>
      element("li", {}, element("time", { datetime: new Date(event.at_s * 1000).toISOString() }, clock(event.at_s)), badge(event.kind), element("span", {}, event.text)),
    ),
  );
  if (!events.length) byId("events").append(element("li", {}, element("span", {}, "Nothing has happened yet.")));
}

/** What is at a cell of the heatmap, in words. */
export function reading(history, at) {
  if (!at) return "Point at a cell, or move with the arrow keys.";
  const { layer, expert } = at;
  const path = history.now.layers[layer];
  if (path === undefined) return "";
  const hosts = history.holders(layer, expert);
  const replicas = history.placement?.replicas[layer]?.[expert] ?? 0;
  const where = hosts.length > 4 ? `${hosts.slice(0, 4).join(", ")} and ${hosts.length - 4} more` : hosts.join(", ");
  return [
    `${shortPath(path)}, expert ${expert}`,
    `${rate(history.loads[layer]?.[expert] ?? null)} tokens/s`,
    hosts.length ? `${replicas} ${replicas === 1 ? "replica" : "replicas"} on ${where}` : "no host holds it",
    `utilisation ${percent(history.utilisations[layer]?.[expert] ?? 0)}`,
  ].join(" · ");
}

export function tables(history) {
  if (!byId("as-table").open) return;
  const { layers } = history.now;
  const select = byId("table-layer");
  if (select.options.length !== layers.length) {
    select.replaceChildren(...layers.map((path, i) => element("option", { value: i }, shortPath(path))));
  }
  byId("layer-table").tBodies[0].replaceChildren(
    ...layers.map((path, layer) => {
      const loads = history.loads[layer] ?? [];
      const total = loads.reduce((sum, load) => sum + load, 0);
      const top = loads.reduce((best, load, expert) => (load > loads[best] ? expert : best), 0);
      return element(
        "tr",
        {},
        element("th", { scope: "row" }, layerName(path)),
        cell(rate(total), { class: "num" }),
        cell(total ? String(top) : "–"),
        cell(total ? percent(loads[top] / total) : "–", { class: "num" }),
        cell(total ? (total / loads.length / loads[top]).toFixed(2) : "–", { class: "num" }),
        cell(history.placement ? String(Math.min(...history.placement.replicas[layer])) : "–", { class: "num" }),
      );
    }),
  );
  const layer = Number(select.value || 0);
  byId("expert-table").tBodies[0].replaceChildren(
    ...(history.now.tokens[layer] ?? []).map((_, expert) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, String(expert)),
        cell(rate(history.loads[layer]?.[expert] ?? null), { class: "num" }),
        cell(String(history.placement?.replicas[layer]?.[expert] ?? "–"), { class: "num" }),
        cell(percent(history.utilisations[layer]?.[expert] ?? 0), { class: "num" }),
        cell(history.holders(layer, expert).join(", ") || "none"),
      ),
    ),
  );
}
