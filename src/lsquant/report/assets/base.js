"use strict";
// What all parts share: elements, numbers in words, the theme's colours, and charts that follow size and theme.

/** An element: el("p.note", {title: "…"}, "text", child, …). Attributes that are null or false are left out. */
function el(what, attributes, ...children) {
  const [tag, ...classes] = what.split(".");
  const node = document.createElement(tag || "div");
  if (classes.length) node.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const known = (value) => value !== null && value !== undefined;

/** A number with so many significant digits; thousands separated; a dash for what is not known. */
function number(value, digits = 4) {
  if (!known(value)) return "–";
  if (value === "inf" || value === Infinity) return "∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || (size >= 1e7 && !Number.isInteger(value))) return value.toExponential(digits - 2).replace("-", "−").replace("e+", "e");
  const text = Number.isInteger(value) && size >= 1000 ? String(value) : String(Number(value.toPrecision(digits)));
  const [whole, rest] = text.replace("-", "−").split(".");
  return whole.replace(/\B(?=(\d{3})+$)/g, "\u202f") + (rest ? "." + rest : "");
}

/** As many significant digits as asked for, zeros kept, so that a column lines up. */
function digits(value, count = 4) {
  if (!known(value) || value === 0 || value === "inf") return number(value, count);
  const size = Math.abs(value);
  return size < 1e-3 || size >= 1e4 ? value.toExponential(count - 1).replace(/-/g, "−").replace("e+", "e") : value.toPrecision(count).replace("-", "−");
}

/** A share in percent: 0 is exactly 0. */
const portion = (share) => share === 0 ? "0" : known(share) && share < 5e-5 ? "<\u202f0.01\u202f%" : percent(share);
const percent = (share, digits = 2) => known(share) ? (100 * share).toFixed(digits) + "\u202f%" : "–";
const fixed = (value, digits) => !known(value) ? "–" : value === "inf" ? "∞" : value.toFixed(digits).replace("-", "−");

function bytes(count) {
  if (!known(count)) return "–";
  for (const [unit, size] of [["MB", 1e6], ["kB", 1e3]]) if (count >= size) return number(count / size, 3) + " " + unit;
  return count + " B";
}

const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const measure = (name, value) => name.includes("accuracy") ? fixed(value, 2) + "\u202f%" : number(value);
const words = (name) => ({ lr: "learning rate", step_lr: "learning rate of the steps", R: "R", transition_target: "target", transition_lr: "learning rate" })[name] || name.replace(/_/g, " ");

// ---- theme ----

const theme = {
  choice: "auto",
  dark: () => theme.choice === "dark" || (theme.choice === "auto" && matchMedia("(prefers-color-scheme: dark)").matches),
  color: (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim(),
  set(choice) {
    theme.choice = choice;
    if (choice === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = choice;
    try { localStorage.setItem("lsquant-theme", choice); } catch { /* pages from disk may have no storage */ }
    charts.redraw();
  },
};

/** A colour of the theme with an opacity from 0 to 1. */
const faded = (name, opacity) => theme.color(name) + Math.round(255 * opacity).toString(16).padStart(2, "0");

// ---- charts ----

const charts = {
  all: new Set(),
  seen: null,

  /**
   * A chart in `host` that is drawn when it comes into view, as wide as the host.
   * make(width): [uPlot's options, data]; called again when the theme changes. Returns {plot, remake, remove}.
   */
  add(host, make) {
    const chart = { host, plot: null, make };
    chart.draw = () => {
      if (!host.clientWidth) return;
      if (chart.plot) chart.plot.destroy();
      const [options, data] = make(host.clientWidth);
      chart.plot = new uPlot({ ...options, width: host.clientWidth }, data, host);
      chart.plot.over.setAttribute("aria-hidden", "true");
    };
    chart.remove = () => {
      if (chart.plot) chart.plot.destroy();
      charts.all.delete(chart);
      charts.watch.unobserve(host);
      charts.resize.unobserve(host);
    };
    host.chart = chart;
    charts.all.add(chart);
    charts.watch.observe(host);
    charts.resize.observe(host);
    return chart;
  },
  redraw() { for (const chart of charts.all) if (chart.plot) chart.draw(); },
  clear() { for (const chart of [...charts.all]) chart.remove(); },
};
charts.watch = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting && !target.chart.plot) target.chart.draw();
}, { rootMargin: "600px" });
charts.resize = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const { plot } = target.chart;
    if (plot && plot.width !== target.clientWidth && target.clientWidth) plot.setSize({ width: target.clientWidth, height: plot.height });
  }
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.redraw());
addEventListener("beforeprint", () => { for (const chart of charts.all) if (!chart.plot) chart.draw(); });

const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';

/** An axis of uPlot in the colours of the theme. */
function axis(options) {
  return {
    stroke: theme.color("soft"), font: FONT, labelFont: FONT, labelSize: 18, gap: 4, size: 46,
    grid: { stroke: theme.color("grid"), width: 1 }, ticks: { stroke: theme.color("grid"), width: 1, size: 4 },
    values: (_, ticks) => tickTexts(ticks), ...options,
  };
}

/** The numbers at the marks of an axis; small ones with an exponent where they would be too long. */
function tickTexts(ticks) {
  const count = apart(ticks), texts = ticks.map((tick) => known(tick) ? number(tick, count) : "");
  if (Math.max(...texts.map((text) => text.length)) <= 6 || ticks.some((tick) => Math.abs(tick) >= 0.01)) return texts;
  return ticks.map((tick) => !known(tick) ? "" : tick ? Number(tick.toPrecision(count)).toExponential().replace(/-/g, "−") : "0");
}

/** Significant digits that tell the marks of an axis apart, 3 to 6. */
function apart(ticks) {
  const found = ticks.filter(known), gap = found.length > 1 ? Math.abs(found[1] - found[0]) : 0;
  return gap ? Math.min(6, Math.max(3, Math.ceil(Math.log10(Math.max(...found.map(Math.abs)) / gap)) + 1)) : 3;
}

/** Marks of a logarithmic axis: powers of ten, and 2 and 5 between them where these are few. (uPlot's own never end
 *  where the range does not begin at a power of ten.) */
function decades(_, __, least, most) {
  const few = Math.log10(most / least) < 2.3, found = [];
  for (let power = Math.floor(Math.log10(least)); power <= Math.log10(most); power++)
    for (const digit of few ? [1, 2, 5] : [1]) found.push(Number(`${digit}e${power}`));
  return found.filter((tick) => tick >= least * 0.999 && tick <= most * 1.001);
}

const logAxis = (options) => axis({ splits: decades, filter: (_, ticks) => ticks, values: (_, ticks) => ticks.map((tick) => number(tick, 2)), ...options });

/** A legend as text beside its marks: [[colour name, "line" | "dash" | "box" | "dot", text], …]. */
const legend = (entries) => el("p.legend", {}, entries.map(([color, kind, text]) =>
  el("span.key", {}, el("i." + kind, { style: `--c: var(--${color})`, "aria-hidden": "true" }), text)));
