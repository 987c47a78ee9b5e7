// The parts of the page that are text: tiles, hosts, experts as tables, the plan, events.

import { badge, bytes, clock, duration, element, ms, number, percent, rate, text } from "./format.js";
import { layerName, shortPath } from "./model.js";
import { fill, mark } from "./tables.js";

const byId = (id) => document.getElementById(id);

export function header(history) {
  const { service, router } = history.now;
  const state = service?.state ?? "degraded";
  text(byId("model"), service?.model ?? "");
  byId("model").title = service?.model ?? "";
  byId("state").hidden = false;
  mark(byId("state"), state);
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
    ["gap", "Token to token", ms(gap[0]), `p95 ${ms(gap[1])}, max ${ms(router.longest_pause_s * 1000)}`],
    ["balance", "Balancedness", router.balancedness.toFixed(2), "1 is perfect"],
    ["hosts", "Hosts ready", `${ready} / ${hosts.length}`, `${number(hosts.reduce((sum, host) => sum + host.queued_rows, 0))} rows wait`],
    ["safe", "Survive node loss", service ? percent(service.p_lossless) : "–", "with every expert"],
    ["again", "Retried, hedged", `${number(router.retried_calls)}, ${number(router.hedged_calls)}`, `${rate(retried)}/s, ${rate(hedged)}/s`],
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

function held(host) {
  const loading = host.loaded_bytes < host.weight_bytes;
  return loading ? `${percent(host.loaded_bytes / host.weight_bytes)} loaded` : number(host.num_experts);
}

export function hosts(history) {
  const { hosts } = history.now;
  const weights = hosts.reduce((sum, host) => sum + host.weight_bytes, 0);
  text(byId("hosts-size"), `${hosts.length}, with ${bytes(weights)} of experts`);
  const columns = [
    { of: (host) => host.host_id, isHead: true },
    { of: (host) => host.state, kind: "badge" },
    { of: (host) => host.node_id.slice(0, 8), name: "node" },
    { of: held, name: "experts", isNumber: true },
    { of: (host) => bytes(host.rss_bytes), name: "memory", isNumber: true },
    { of: (host) => rate(history.rowsPerS.get(host.host_id) ?? null), name: "rows/s", isNumber: true },
    { of: (host) => `${host.speed.toFixed(2)} ×`, name: "speed", isNumber: true },
    { of: (host) => host.utilisation, name: "busy", kind: "meter" },
    { of: (host) => number(host.queued_rows), name: "queue", isNumber: true },
    { of: (host) => number(host.restarts), name: "restarts", isNumber: true },
  ];
  fill(byId("hosts"), hosts, columns, (row, host) => (row.dataset.host = host.host_id));
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

let lastEvent = null;

/** The newest first. Only what is new is added, so that it alone is read aloud. */
export function events(history) {
  const { events } = history.now;
  const same = (event) => event.at_s === lastEvent?.at_s && event.kind === lastEvent.kind && event.text === lastEvent.text;
  const fresh = events.slice(events.findLastIndex(same) + 1);
  const list = byId("events");
  if (fresh.length === events.length) list.replaceChildren();
  for (const event of fresh) {
    const time = element("time", { datetime: new Date(event.at_s * 1000).toISOString() }, clock(event.at_s));
    list.prepend(element("li", {}, time, badge(event.kind), element("span", {}, event.text)));
    lastEvent = event;
  }
  while (list.children.length > Math.max(events.length, 1)) list.lastChild.remove();
  if (!list.children.length) list.append(element("li", { class: "muted" }, "Nothing has happened yet."));
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
  const busiest = (loads) => loads.reduce((best, load, expert) => (load > loads[best] ? expert : best), 0);
  const rows = layers.map((path, layer) => {
    const loads = history.loads[layer] ?? [];
    const total = loads.reduce((sum, load) => sum + load, 0);
    return { path, layer, loads, total, top: busiest(loads) };
  });
  fill(byId("layer-table"), rows, [
    { of: ({ path }) => layerName(path), isHead: true },
    { of: ({ total }) => rate(total), isNumber: true },
    { of: ({ total, top }) => (total ? String(top) : "–") },
    { of: ({ total, loads, top }) => (total ? percent(loads[top] / total) : "–"), isNumber: true },
    { of: ({ total, loads, top }) => (total ? (total / loads.length / loads[top]).toFixed(2) : "–"), isNumber: true },
    { of: ({ layer }) => (history.placement ? String(Math.min(...history.placement.replicas[layer])) : "–"), isNumber: true },
  ]);
  const layer = Number(select.value || 0);
  fill(byId("expert-table"), history.now.tokens[layer] ?? [], [
    { of: (_, expert) => String(expert), isHead: true },
    { of: (_, expert) => rate(history.loads[layer]?.[expert] ?? null), isNumber: true },
    { of: (_, expert) => String(history.placement?.replicas[layer]?.[expert] ?? "–"), isNumber: true },
    { of: (_, expert) => percent(history.utilisations[layer]?.[expert] ?? 0), isNumber: true },
    { of: (_, expert) => history.holders(layer, expert).join(", ") || "none" },
  ]);
}
