"use strict";
// Training: curves of the log, every quantizer's step as small multiples, R and oscillation; several runs as points.

const GROUPS = [
  ["Loss", ["loss", "test_loss"], {}],
  ["Accuracy, %", ["accuracy", "train_accuracy"], {}],
  ["Learning rate", ["lr", "step_lr"], {}],
  ["Transition rate: share of the low-bit weights that change code in a step, and its target", ["transition_rate", "transition_target"], {}],
  ["Learning rate of the low-bit weights, set by the transition rate", ["transition_lr"], {}],
  ["Norm of the gradient", ["grad_norm"], {}],
];
const NOT_DRAWN = ["seconds", "samples_per_second", "iteration", "epoch"];
const PAIR = ["weight", "input", "best", "gradient"];

/** The section, null without a log. choose(name): a quantizer's name was clicked. */
function training(run, choose) {
  const { log, history } = run;
  if (!log || !log.x.length) return null;
  const drawn = GROUPS.flatMap(([, names]) => names);
  const others = Object.keys(log.series).filter((name) => !drawn.includes(name) && !NOT_DRAWN.includes(name));
  const groups = [...GROUPS, ...others.map((name) => [words(name), [name], {}])];
  const grid = el("div.curves", {}, groups.map(([title, names]) => curve(log, title, names.filter((name) => log.series[name]))));
  const parts = [el("p.about", {}, `${plural(log.x.length, "row")} of log.jsonl, one ${log.unit === "epoch" ? "an epoch" : "a look"}; phases: ${[...new Set(log.phase)].filter(Boolean).join(", ") || "one"}.`), grid];
  const fans = [["R", "R, relative size of the step's gradient", true], ["oscillation", "Oscillation: share of the weights whose code goes back and forth", false], ["clip_rate", "Share of the values clipped", false]];
  const shown = fans.filter(([key]) => Object.values(history || {}).some((mine) => mine[key]));
  parts.push(el("div.curves.wide", {}, shown.map(([key, title, log10]) => fan(run, key, title, log10))));
  const steps = Object.keys(history || {}).filter((name) => history[name].step);
  if (steps.length) parts.push(el("h3", {}, "Every step over time"),
    el("p.about", {}, "The learned step (of several the median, with their range); dashed: the initial one. Each has its own scale."),
    el("div.multiples", {}, steps.map((name) => multiple(run, name, choose))));
  return parts;
}

/** Lines between the phases of the log. */
function phases(u, log) {
  const { ctx, bbox } = u;
  ctx.save();
  ctx.strokeStyle = theme.color("soft"); ctx.lineWidth = devicePixelRatio; ctx.setLineDash([2 * devicePixelRatio, 3 * devicePixelRatio]);
  log.phase.forEach((phase, i) => {
    if (!i || phase === log.phase[i - 1]) return;
    const x = u.valToPos((log.x[i] + log.x[i - 1]) / 2, "x", true);
    ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
    if (bbox.height < 100 * devicePixelRatio) return;
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`; ctx.fillStyle = theme.color("soft"); ctx.textAlign = "left";
    ctx.fillText(phase, x - 1 * devicePixelRatio, bbox.top - 3 * devicePixelRatio);  // above the drawing
  });
  ctx.restore();
}

const few = (log) => ({ show: log.x.length <= 40, size: 5 });

/** Whole epochs at the marks of the x axis. */
const whole = (_, ticks) => ticks.map((tick) => Number.isInteger(tick) ? number(tick) : "");

function xScale(log) {
  const [first, last] = [log.x[0], log.x.at(-1)], margin = Math.max((last - first) * 0.02, 0.2);
  return { time: false, range: () => [first - margin, last + margin] };
}

function curve(log, title, names) {
  if (!names.length) return null;
  const host = el("div.plot"), value = el("span.value");
  const tell = (i) => {
    value.textContent = known(i) ? `${log.unit} ${number(log.x[i])}: ` + names.map((name) => `${words(name)} ${number(log.series[name][i])}`).join(", ") : "";
  };
  charts.add(host, () => [{
    height: 190, legend: { show: false }, padding: [16, 10, 0, 0],
    cursor: { drag: { x: false }, y: false, sync: { key: "training" } },
    scales: { x: xScale(log) },
    axes: [axis({ size: 28, values: whole }), axis({ size: 52 })],
    series: [{}, ...names.map((name, i) => ({ stroke: theme.color(PAIR[i]), width: 2, dash: i ? [6, 4] : [], spanGaps: false, points: { ...few(log), fill: theme.color("paper") } }))],
    hooks: { draw: [(u) => phases(u, log)], setCursor: [(u) => tell(u.cursor.idx)] },
  }, [log.x, ...names.map((name) => log.series[name])]]);
  return el("figure", {}, el("h4", {}, title), legend(names.map((name, i) => [PAIR[i], i ? "dash" : "line", words(name)])), host, value);
}

/** One value of all quantizers over time: a thin line each; the one next to the pointer is named. */
function fan(run, key, title, log10) {
  const { log, history } = run, host = el("div.plot"), value = el("span.value");
  const names = Object.keys(history).filter((name) => history[name][key] && history[name][key].some((v) => !log10 || v > 0));
  const ink = (name) => name.endsWith("input_quantizer") ? "input" : "weight";
  const lines = names.map((name) => history[name][key].map((v) => log10 && !(v > 0) ? null : v));
  charts.add(host, () => [{
    height: 240, legend: { show: false }, padding: [16, 10, 0, 0], focus: { alpha: 0.15 },
    cursor: { drag: { x: false }, y: false, focus: { prox: 30 }, points: { show: false } },
    scales: { x: xScale(log), y: log10 ? { distr: 3 } : {} },
    axes: [axis({ size: 28, values: whole }), log10 ? logAxis({ size: 56 }) : axis({ size: 56, values: (_, ticks) => ticks.map((t) => known(t) ? number(100 * t, 3) + "\u202f%" : "") })],
    series: [{}, ...names.map((name) => ({ stroke: faded(ink(name), 0.75), width: 1.25, points: { ...few(log), size: 3, fill: theme.color(ink(name)) } }))],
    hooks: { draw: [(u) => phases(u, log)], setSeries: [(u, i) => {
      const at = u.cursor.idx;
      value.textContent = i && known(at) ? `${names[i - 1]}: ${log10 ? number(lines[i - 1][at]) : percent(lines[i - 1][at])}` : "";
    }] },
  }, [log.x, ...lines]]);
  return el("figure", {}, el("h4", {}, title), legend([["weight", "line", "weights"], ["input", "line", "inputs"]]), host, value);
}

function multiple(run, name, choose) {
  const { log, history } = run, mine = history[name], host = el("div.plot");
  const ink = name.endsWith("input_quantizer") ? "input" : "weight";
  const row = run.quantizers.find((q) => q.name === name) || {};
  const range = mine.step_min && mine.step_max;
  charts.add(host, () => [{
    height: 104, legend: { show: false }, padding: [6, 6, 0, 0], cursor: { drag: { x: false }, y: false, sync: { key: "steps" } },
    scales: { x: xScale(log), y: { range: (_, low, high) => {
      const values = [low, high, ...(range || !row.initial_step ? [] : [row.initial_step])].filter(known);
      const [a, b] = [Math.min(...values), Math.max(...values)], margin = Math.max((b - a) * 0.12, Math.abs(a) * 0.01) || 0.12;
      return [a - margin, b + margin];
    } } },
    axes: [axis({ size: 20, values: whole, gap: 2, space: 60, ticks: { show: false } }), axis({ size: 46, space: 26, ticks: { show: false } })],
    series: [{}, { stroke: theme.color(ink), width: 1.75, points: { ...few(log), size: 4, fill: theme.color(ink) } },
      ...(range ? [{ stroke: faded(ink, 0.35), width: 1, points: { show: false } }, { stroke: faded(ink, 0.35), width: 1, points: { show: false } }] : [])],
    bands: range ? [{ series: [3, 2], fill: faded(ink, 0.14) }] : [],
    hooks: { draw: [(u) => { phases(u, log); level(u, row.initial_step); }] },
  }, [log.x, mine.step, ...(range ? [mine.step_min, mine.step_max] : [])]]);
  const label = el("button.pick", { type: "button", onclick: () => choose(name), title: name }, row.layer || name);
  return el("figure", {}, el("p.title", {}, label, " ", el("span.kind." + ink, {}, row.kind || ink)), host);
}

function level(u, value) {
  if (!known(value) || value < u.scales.y.min || value > u.scales.y.max) return;
  const { ctx, bbox } = u, y = u.valToPos(value, "y", true);
  ctx.save();
  ctx.strokeStyle = theme.color("soft"); ctx.lineWidth = devicePixelRatio; ctx.setLineDash([5 * devicePixelRatio, 4 * devicePixelRatio]);
  ctx.beginPath(); ctx.moveTo(bbox.left, y); ctx.lineTo(bbox.left + bbox.width, y); ctx.stroke();
  ctx.restore();
}

/** The results of a run by their key; kept: those of the network that ships. */
function resultsOf(run) {
  const results = Object.fromEntries((run.results || []).map(([key, , numbers]) => [key, numbers]));
  return { ...results, kept: results.fused || results.lsq };
}

/** Several runs: the metric against the size of all tensors, the float networks as open points. */
function comparison(runs, metric) {
  const found = [];
  for (const run of runs) {
    const results = resultsOf(run);
    if (!run.sizes) continue;
    if (results.kept && known(results.kept[metric])) found.push({ name: run.name, size: run.sizes.packed + run.sizes.rest, value: results.kept[metric], open: false });
    const whole = run.sizes.float + run.sizes.rest;
    if (results.float && known(results.float[metric]) && !found.some((p) => p.open && p.size === whole && p.value === results.float[metric]))
      found.push({ name: "float32", size: whole, value: results.float[metric], open: true });
  }
  if (found.length < 2) return null;
  const x = [...found].sort((a, b) => a.size - b.size), host = el("div.plot.runs");
  const values = found.map((p) => p.value), spread = Math.max(...values) - Math.min(...values) || Math.abs(values[0]) || 1;
  const sizes = [x[0].size, x.at(-1).size], ratio = (sizes[1] / sizes[0] || 2) ** 0.12 * 1.05;
  charts.add(host, (width) => [{
    height: 320, legend: { show: false }, padding: [14, 16, 0, 0], cursor: { show: false },
    scales: { x: { time: false, distr: 3, range: () => [sizes[0] / ratio, sizes[1] * ratio] }, y: { range: () => [Math.min(...values) - 0.15 * spread, Math.max(...values) + 0.2 * spread] } },
    axes: [axis({ size: 28, label: "size of the network", splits: decades, filter: (_, ticks) => ticks, values: (_, ticks) => ticks.map(bytes) }), axis({ label: words(metric), size: 52 })],
    series: [{}, { paths: () => null, points: { show: false } }],
    hooks: { draw: [(u) => {
      const { ctx } = u, scale = devicePixelRatio;
      ctx.save();
      ctx.font = `${12 * scale}px system-ui, sans-serif`;
      const taken = [];
      for (const p of x) {
        const [px, py] = [u.valToPos(p.size, "x", true), u.valToPos(p.value, "y", true)];
        ctx.beginPath(); ctx.arc(px, py, 5 * scale, 0, 2 * Math.PI);
        ctx.lineWidth = 2 * scale; ctx.strokeStyle = theme.color(p.open ? "soft" : "weight"); ctx.fillStyle = theme.color(p.open ? "paper" : "weight");
        ctx.fill(); ctx.stroke();
        const wide = ctx.measureText(p.name).width, left = px + wide + 12 * scale > u.bbox.left + u.bbox.width;
        let y = py + 4 * scale;
        while (taken.some((t) => Math.abs(t.y - y) < 14 * scale && Math.abs(t.x - px) < wide + 20 * scale)) y += 14 * scale;
        taken.push({ x: px, y });
        ctx.fillStyle = theme.color("ink"); ctx.textAlign = left ? "right" : "left";
        ctx.fillText(p.name, px + (left ? -10 : 10) * scale, y);
      }
      ctx.restore();
    }] },
  }, [x.map((p) => p.size), x.map((p) => p.value)]]);
  return el("figure", {}, host);
}
