// Calls of the dashboard's own service. The key is kept for this tab alone, and travels in a header and nowhere else.

const KEY = "ray_moe.api_key";
const TIMEOUT_MS = 8000;

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** What the service refused, with its HTTP status. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The service did not answer at all. */
export class Unreachable extends Error {}

async function ask(path, options = {}, timeoutMs = TIMEOUT_MS) {
  const headers = { accept: "application/json", ...options.headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let answer, text;
  try {
    const signal = timeoutMs ? AbortSignal.timeout(timeoutMs) : undefined;
    answer = await fetch(path, { ...options, headers, signal, cache: "no-store", credentials: "same-origin", redirect: "error" });
    text = await answer.text();
  } catch (error) {
    throw new Unreachable(error.message);
  }
  let told;
  try {
    told = JSON.parse(text);
  } catch {
    throw new Unreachable(`HTTP ${answer.status}`);
  }
  if (!answer.ok) throw new Refused(told?.error?.message ?? `HTTP ${answer.status}`, answer.status);
  return told;
}

export function state(epoch) {
  return ask(`dashboard/api/state${epoch === null ? "" : `?epoch=${epoch}`}`);
}

/** `plan`, `drain` or `chaos`; returns when the service has answered, however long that takes. */
export function act(name, wish) {
  return ask(`dashboard/api/${name}`, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(wish) }, 0);
}
