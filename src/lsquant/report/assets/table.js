"use strict";
// The table of quantizers: sorted by a click on a heading, searched, and a row chosen for the staircase beneath.

const KINDS = { weight: "weight", input: "input", alone: "alone" };
const optimal = (row) => row.views && row.views[0] && row.views[0].best ? row.views[0].step / row.views[0].best : null;

// heading, what it means, the value that is sorted by, how it is shown
const COLUMNS = [
  ["quantizer", "Layer and what is quantized", (r) => r.name, null],
  ["bits", "Bits of a code; u: unsigned, s: signed", (r) => r.bits, (r) => known(r.bits) ? `${r.bits} ${r.signed ? "s" : "u"}` : "–"],
  ["granularity", "What shares a step: the tensor, an output channel or a group of neighbours", (r) => r.granularity, (r) => r.granularity ? r.granularity + (r.steps > 1 ? ` (${number(r.steps)})` : "") : "–"],
  ["s initial", "The step that training began with; of several the median", (r) => r.initial_step, (r) => digits(r.initial_step)],
  ["s final", "The learned step, after the guard; of several the median", (r) => r.step, (r) => digits(r.step)],
  ["s / s MSE", "The learned step over the step of least squared error for these values; of several steps one common factor", optimal, (r) => digits(optimal(r), 3)],
  ["R", "Relative size of the step's gradient, (|dL/ds| / s) / (‖dL/dw‖ / ‖w‖), at the end of training; far below 1 is healthy for inputs", (r) => r.balance, (r) => digits(r.balance, 3)],
  ["clip low", "Share of the values below the lowest level", (r) => r.clip_low, (r) => portion(r.clip_low)],
  ["clip high", "Share of the values above the highest level", (r) => r.clip_high, (r) => portion(r.clip_high)],
  ["levels", "Levels that occur, of those there are", (r) => known(r.levels) ? r.levels_used / r.levels : null, (r) => known(r.levels) ? `${r.levels_used} of ${r.levels}` : "–"],
  ["entropy", "Entropy of the codes, in bits", (r) => r.entropy, (r) => fixed(r.entropy, 2)],
  ["SQNR", "Signal to quantization noise, in dB", (r) => r.sqnr === "inf" ? Infinity : r.sqnr, (r) => fixed(r.sqnr, 1)],
  ["oscill.", "Oscillation rate: share of the weights whose code goes back and forth, at the end of training", (r) => r.oscillation, (r) => portion(r.oscillation)],
  ["guards", "How often the guard held a step in training", (r) => r.guarded, (r) => number(r.guarded)],
];

/** The section. choose(row) is called when a row is chosen. */
function quantizerTable(rows, choose) {
  let order = -1, descending = false, chosen = null;
  const lines = rows.map((row, index) => ({ row, index, node: line(row) }));
  const body = el("tbody", {}, lines.map((entry) => entry.node));
  const count = el("span.count", { role: "status" });
  const search = el("input", { type: "search", id: "search", placeholder: "Search: a layer, weight, 8 bit, channel …", "aria-label": "Search quantizers", oninput: filter, autocomplete: "off" });
  const headings = COLUMNS.map(([name, about], i) => el("th", { scope: "col", "aria-sort": "none" },
    el("button", { type: "button", title: about, onclick: () => sort(i) }, name)));

  function line(row) {
    const name = el("button.pick", { type: "button", onclick: () => select(row) }, row.layer || "(root)");
    const cells = COLUMNS.slice(1).map(([, , value, show]) => el("td", known(value(row)) ? {} : { class: "none" }, show(row)));
    return el("tr", { "data-name": row.name, onclick: (event) => { if (!event.target.closest("button")) select(row); } },
      el("th", { scope: "row" }, name, " ", el("span.kind." + row.kind, {}, KINDS[row.kind])), cells);
  }

  function sort(column) {
    const value = COLUMNS[column][2], text = typeof value(rows.find((row) => known(value(row))) || {}) === "string";
    descending = order === column ? !descending : !text;
    order = column;
    const compare = (a, b) => text ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
    lines.sort((a, b) => {
      const [x, y] = [value(a.row), value(b.row)];
      if (!known(x) || !known(y)) return known(x) ? -1 : known(y) ? 1 : a.index - b.index;
      return (descending ? -1 : 1) * compare(x, y) || a.index - b.index;
    });
    headings.forEach((th, i) => th.setAttribute("aria-sort", i !== column ? "none" : descending ? "descending" : "ascending"));
    body.append(...lines.map((entry) => entry.node));
  }

  function filter() {
    const parts = search.value.toLowerCase().replace(/(\d) bit/g, "$1-bit").split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { row, node } of lines) {
      const text = `${row.name} ${row.kind} ${row.bits}-bit ${row.signed ? "signed" : "unsigned"} ${row.granularity}`.toLowerCase();
      node.hidden = !parts.every((part) => text.includes(part));
      shown += !node.hidden;
    }
    count.textContent = shown === rows.length ? plural(rows.length, "quantizer") : `${shown} of ${plural(rows.length, "quantizer")}`;
  }

  function select(row) {
    chosen = row;
    for (const entry of lines) entry.node.classList.toggle("chosen", entry.row === row);
    choose(row);
  }

  /** The row before or after the chosen one, as they are sorted and filtered. */
  function move(by) {
    const shown = lines.filter((entry) => !entry.node.hidden);
    const at = shown.findIndex((entry) => entry.row === chosen);
    const next = shown[(at + by + shown.length) % shown.length];
    if (next) select(next.row);
  }

  filter();
  const table = el("table.quantizers", {}, el("thead", {}, el("tr", {}, headings)), body);
  const node = el("div", {}, el("div.tools", {}, search, count),
    el("div.scroll", { tabindex: "0", role: "region", "aria-label": "Table of quantizers" }, table));
  return { node, select, move };
}
