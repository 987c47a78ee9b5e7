// What the page can have done. Each wish is put together in a dialog, and carried out only after it was meant.

import { act } from "./api.js";
import { bytes, element, ms, number, text } from "./format.js";
import { shortPath } from "./model.js";

const byId = (id) => document.getElementById(id);
const MAX_MOVES = 12;

function field(name, input) {
  return element("label", { class: "field" }, element("span", {}, name), input);
}

function choice(options) {
  return element("select", {}, ...options.map((value) => element("option", { value }, value)));
}

function amount(value, min) {
  return element("input", { type: "number", value, min, step: "any" });
}

/** Those that can be named: hosts, then nodes. */
function targets(history) {
  const { hosts } = history.now;
  const nodes = [...new Set(hosts.map((host) => host.node_id).filter(Boolean))];
  return { hosts: hosts.map((host) => host.host_id), nodes: nodes.map((node) => `node:${node}`) };
}

export class Wishes {
  constructor(history) {
    this.history = history;
    this.dialog = byId("dialog");
    byId("cancel").addEventListener("click", () => this.dialog.close());
    byId("meant").addEventListener("change", () => this._enable());
    byId("wish").addEventListener("submit", (event) => {
      event.preventDefault();
      this._carryOut();
    });
    byId("do-plan").addEventListener("click", () => this.plan());
    byId("do-drain").addEventListener("click", () => this.drain());
    byId("do-chaos").addEventListener("click", () => this.chaos());
  }

  /** `wish()` is what is sent, and `told(answer)` what is said of the answer. */
  _open({ name, title, body, button, meaning, wish, told, danger = false, ready = true }) {
    Object.assign(this, { name, wish, told, ready, busy: false });
    text(byId("dialog-title"), title);
    byId("dialog-body").replaceChildren(...body);
    text(byId("carry-out"), button());
    byId("carry-out").hidden = false;
    byId("carry-out").classList.toggle("danger", danger);
    byId("meant-label").hidden = false;
    byId("meant").checked = false;
    text(byId("meant-text"), meaning);
    this._say("");
    this._enable();
    byId("dialog-body").onchange = () => text(byId("carry-out"), button());
    this.dialog.showModal();
  }

  _enable() {
    byId("carry-out").disabled = this.busy || !this.ready || !byId("meant").checked;
  }

  _say(words, bad = false) {
    text(byId("outcome"), words);
    byId("outcome").dataset.tone = bad ? "bad" : "";
  }

  async _carryOut() {
    if (byId("carry-out").disabled) return;
    const { name, told } = this;
    this.busy = true;
    this._enable();
    this._say("Under way …");
    const answer = await this._ask(name, { ...this.wish(), confirm: true });
    this.busy = false;
    if (answer) {
      this._say(told(answer));
      byId("carry-out").hidden = byId("meant-label").hidden = true;
    } else this._enable();
  }

  async _ask(name, wish) {
    try {
      return await act(name, wish);
    } catch (error) {
      this._say(error.message, true);
      return null;
    }
  }

  async plan() {
    const body = element("div", {}, "Looking for a better placement …");
    this._open({
      name: "plan",
      title: "A better placement",
      body: [body],
      button: () => "Carry out",
      meaning: "Carry it out, beside the requests",
      wish: () => ({}),
      told: (plan) => `Begun: ${plan.num_moves} experts in ${plan.num_steps} steps. It is followed under Plan.`,
      ready: false,
    });
    const plan = await this._ask("plan", { dry_run: true });
    if (!plan) return body.replaceChildren();
    if (!plan.num_moves) return body.replaceChildren("There is none that is worth its moves at the present load.");
    const moves = plan.moves.slice(0, MAX_MOVES).map((move) => {
      const [added, removed] = [move.added, move.removed].map((hosts) => hosts.join(", "));
      const what = [added && `to ${added}`, removed && `off ${removed}`].filter(Boolean).join(", ");
      return element("li", {}, `${shortPath(move.layer)}, expert ${move.expert}: ${what}`);
    });
    if (plan.num_moves > moves.length) moves.push(element("li", {}, `and ${plan.num_moves - moves.length} more`));
    const facts = [
      ["moves", `${number(plan.num_moves)} experts in ${plan.num_steps} steps`],
      ["copied", bytes(plan.copied_bytes)],
      ["balancedness", `${plan.balancedness_before.toFixed(3)} → ${plan.balancedness_after.toFixed(3)}`],
      ["takes about", ms(plan.duration_s * 1000)],
      ["requests pause", plan.pause_s ? ms(plan.pause_s * 1000) : "not at all"],
    ];
    const list = element("dl", { class: "facts" }, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
    body.replaceChildren(list, element("ul", { class: "moves" }, ...moves));
    this.ready = true;
    this._enable();
  }

  drain() {
    const { hosts, nodes } = targets(this.history);
    const target = choice([...hosts, ...nodes]);
    const replace = element("input", { type: "checkbox" });
    this._open({
      name: "drain",
      title: "Empty a host, and end it",
      body: [element("div", {}, "It hands over what it holds first; no request is lost."), field("host or node", target), field("start another", replace)],
      button: () => `Drain ${target.value}`,
      meaning: "It is to end",
      wish: () => ({ target: target.value, replace: replace.checked }),
      told: (answer) => `Begun: ${answer.host_ids.join(", ")}. It is followed under Plan.`,
      ready: hosts.length > 0,
    });
  }

  chaos() {
    const { hosts, nodes } = targets(this.history);
    const kind = choice(["kill", "hang", "slow", "corrupt", "partition"]);
    const target = choice(["random", ...hosts, ...nodes, "controller"]);
    const lasts = amount(5, 0.01);
    const factor = amount(10, 1);
    const numbers = () => ({ duration_s: Number(lasts.value), factor: Number(factor.value) });
    this._open({
      name: "chaos",
      title: "A fault on purpose",
      body: [
        element("div", {}, "Only where the service allows it (chaos.enabled). It answers when the damage is repaired."),
        field("fault", kind),
        field("target", target),
        field("lasts, s", lasts),
        field("slower by", factor),
      ],
      button: () => `${kind.value[0].toUpperCase()}${kind.value.slice(1)} ${target.value}`,
      meaning: "Streams may pause for a moment",
      wish: () => ({ kind: kind.value, target: target.value, ...numbers() }),
      told: (report) =>
        `${report.kind} of ${report.targets.join(", ")}: longest stall ${ms(report.stall_s * 1000)}, ${number(report.failed_requests)} requests failed, ` +
        `${report.repaired_s < 0 ? "not repaired in time" : `repaired after ${ms(report.repaired_s * 1000)}`}; ` +
        `${number(report.retried_calls)} calls again, ${number(report.lifeboat_loads)} experts read by the lifeboat.`,
      danger: true,
    });
  }
}
