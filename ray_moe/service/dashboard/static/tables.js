// Tables whose cells change where they are, so that whoever reads or selects in them is not thrown out each second.

import { element, percent, text, tone } from "./format.js";

/** Update `badge` to show a state. */
export function mark(badge, state) {
  text(badge, state);
  if (tone(state)) badge.dataset.tone = tone(state);
  else delete badge.dataset.tone;
}

function makeCell({ kind, name, isNumber, isHead }) {
  const made = element(isHead ? "th" : "td", { class: isNumber ? "num" : null, "data-name": name ?? null, scope: isHead ? "row" : null });
  if (kind === "badge") made.append(element("span", { class: "badge" }));
  if (kind === "meter") made.append(element("span", { class: "meter" }, element("progress", { max: 1 }), element("span", { class: "num" })));
  return made;
}

function setCell(cell, { kind }, value) {
  if (kind === "badge") mark(cell.firstChild, value);
  else if (kind === "meter") {
    const [bar, number] = cell.firstChild.children;
    bar.value = value;
    bar.setAttribute("aria-label", `utilisation ${percent(value)}`);
    text(number, percent(value));
  } else text(cell, value);
}

/**
 * Show `items`, a row each. A column is `{ of(item, index), kind, name, isNumber, isHead }`: what it shows, as text, `badge`
 * or `meter`; what it is called where there is no head row.
 */
export function fill(table, items, columns, finish = () => {}) {
  const body = table.tBodies[0];
  while (body.rows.length > items.length) body.deleteRow(-1);
  while (body.rows.length < items.length) body.append(element("tr", {}, ...columns.map(makeCell)));
  items.forEach((item, index) => {
    const row = body.rows[index];
    columns.forEach((column, at) => setCell(row.cells[at], column, column.of(item, index)));
    finish(row, item);
  });
}
