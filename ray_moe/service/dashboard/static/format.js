// Numbers and elements as the whole page shows them. Text is only ever set as text.

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

export function number(value, digits = 0) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (Math.abs(value) >= 1e4) return `${(value / 1e3).toFixed(1)} k`;
  return value.toFixed(digits);
}

/** Few digits for what is small, none for what is large. */
export function rate(value) {
  return value === null || value === undefined ? "–" : number(value, value < 10 ? 1 : 0);
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${value.toFixed(unit && value < 100 ? 1 : 0)} ${units[unit]}`;
}

export function ms(value) {
  if (value === null || value === undefined) return "–";
  return value >= 1000 ? `${(value / 1000).toFixed(value >= 10000 ? 0 : 1)} s` : `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}

export function percent(value) {
  return `${(100 * value).toFixed(0)} %`;
}

export function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  const hours = Math.floor(minutes / 60);
  if (hours >= 48) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  return hours ? `${hours} h ${minutes % 60} min` : minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds)} s`;
}

export function clock(unixS) {
  return new Date(unixS * 1000).toLocaleTimeString([], { hour12: false });
}

const TONES = {
  good: ["ready", "repaired", "resized", "published", "promoted", "current", "replicated"],
  warn: ["degraded", "draining", "aborted", "rolled back", "canary rolled back", "loading", "starting"],
  bad: ["lost", "failed"],
  cool: ["standby", "moved", "planned", "freed", "canary", "kept", "resizing"],
};

export function tone(kind) {
  return Object.keys(TONES).find((name) => TONES[name].includes(kind)) ?? null;
}

export function badge(kind) {
  return element("span", { class: "badge", "data-tone": tone(kind) }, kind);
}
