// What pictures of a service say over time: rates, quantiles, loads of experts. No document, no network.

export const MAX_POINTS = 600;
export const LOAD_HALF_LIFE_S = 4;

/** Value below which a share `q` of what was counted lies; null without anything. Counts are per bucket, not cumulative. */
export function quantile(bounds, counts, q) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  if (!total) return null;
  let left = q * total;
  for (let i = 0; i < counts.length; i++) {
    if (counts[i] && left <= counts[i]) {
      if (i === bounds.length) return bounds[i - 1]; // above all bounds: at least this
      const low = i ? bounds[i - 1] : 0;
      return low + ((bounds[i] - low) * left) / counts[i];
    }
    left -= counts[i];
  }
  return bounds[bounds.length - 1];
}

/** The part of a path that says which layer it is: `model.layers.3.mlp.experts` is `3`; the path where there is none. */
export function layerName(path) {
  const found = /\.(\d+)\./.exec(path);
  return found ? found[1] : path;
}

/** `model.layers.3.mlp.experts` -> `layers.3.mlp`. */
export function shortPath(path) {
  return path.replace(/^model\./, "").replace(/\.experts$/, "");
}

/** Where what each picture says is added to what was before. */
export class History {
  constructor() {
    this.now = null;
    this.points = []; // {time, tokens, balance, first: [p50, p95], gap: [p50, p95]}
    this.loads = []; // [layer] Float64Array of tokens/s
    this.rowsPerS = new Map(); // host -> rows/s
    this.rates = { tokens: null, retried: 0, hedged: 0 };
    this.placement = null;
    this.placementEpoch = null;
    this.utilisations = [];
    this._lives = new Map(); // router and process -> its pictures of the last half minute, and its loads
  }

  add(picture) {
    // Totals are of one life of one router. Behind a proxy another one may answer each time.
    const life = this._live(picture);
    if (life !== this._life) this.placementEpoch = null;
    this._life = life;
    this._past = life.past;
    this.loads = life.loads;
    if (picture.placement) {
      this.placement = picture.placement;
      this.placementEpoch = picture.epoch;
    }
    const before = this._past[this._past.length - 1];
    this.now = picture;
    this._past.push(picture);
    while (this._past.length > 2 && this._past[1].at_s <= picture.at_s - 30) this._past.shift();
    if (before) this._rate(before, picture);
    else this.rates = { tokens: null, retried: 0, hedged: 0 };
    this._utilise(picture);
    life.loads = this.loads;
    const gap = this._window("token_gaps_s", 10);
    const first = this._window("first_tokens_s", 30);
    const isUsed = gap.some((value) => value !== null);
    this.points.push({
      time: new Date(picture.unix_s * 1000),
      tokens: this.rates.tokens,
      balance: isUsed || this.rates.tokens > 0 ? picture.router.balancedness : null,
      first,
      gap,
    });
    if (this.points.length > MAX_POINTS) this.points.shift();
  }

  _live(picture) {
    const name = `${picture.router.router_id}/${picture.router.pid}`;
    for (const [other, { past }] of this._lives) {
      if (other !== name && past[past.length - 1].unix_s < picture.unix_s - 60) this._lives.delete(other);
    }
    if (!this._lives.has(name)) this._lives.set(name, { past: [], loads: [] });
    return this._lives.get(name);
  }

  _rate(before, now) {
    const seconds = Math.max(now.at_s - before.at_s, 1e-3);
    const rate = (name) => Math.max(0, now.router[name] - before.router[name]) / seconds;
    this.rates = { tokens: rate("generated_tokens"), retried: rate("retried_calls"), hedged: rate("hedged_calls") };
    const rows = new Map(before.hosts.map((host) => [host.host_id, host.num_rows]));
    this.rowsPerS = new Map(
      now.hosts.map(({ host_id, num_rows }) => [host_id, Math.max(0, num_rows - (rows.get(host_id) ?? num_rows)) / seconds]),
    );
    const keep = 0.5 ** (seconds / LOAD_HALF_LIFE_S);
    const isFirst = this.loads.length !== now.tokens.length;
    this.loads = now.tokens.map((counts, layer) => {
      const old = before.tokens[layer];
      const load = isFirst ? new Float64Array(counts.length) : this.loads[layer];
      for (let e = 0; e < counts.length; e++) {
        const fresh = Math.max(0, counts[e] - (old?.[e] ?? counts[e])) / seconds;
        load[e] = isFirst ? fresh : keep * load[e] + (1 - keep) * fresh;
      }
      return load;
    });
  }

  /** Of each expert: the mean over the hosts that hold it. */
  _utilise(picture) {
    if (!this.placement) return;
    const of = new Map(picture.hosts.map((host) => [host.host_id, host.utilisation]));
    const each = this.placement.hosts.map((id) => of.get(id) ?? 0);
    this.utilisations = this.placement.holders.map((experts) =>
      experts.map((hosts) => (hosts.length ? hosts.reduce((sum, host) => sum + each[host], 0) / hosts.length : 0)),
    );
  }

  /** [p50, p95] in milliseconds of what came in the last seconds. */
  _window(name, seconds) {
    const now = this.now.vitals?.[name];
    const since = this._past.find((picture) => picture.at_s >= this.now.at_s - seconds - 0.5)?.vitals?.[name];
    if (!now || !since) return [null, null];
    const fresh = now.counts.map((count, i) => count - since.counts[i]);
    return [0.5, 0.95].map((q) => {
      const value = quantile(now.bounds, fresh, q);
      return value === null ? null : value * 1000;
    });
  }

  /** [layer][expert] of what a heatmap shows. */
  values(metric) {
    if (metric === "replicas") return this.placement?.replicas ?? [];
    if (metric === "utilisation") return this.utilisations;
    return this.loads;
  }

  /** Ids of the hosts that hold an expert. */
  holders(layer, expert) {
    return (this.placement?.holders[layer]?.[expert] ?? []).map((index) => this.placement.hosts[index]);
  }
}
