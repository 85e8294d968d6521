"use strict";
// One quantizer: the staircase over the histogram of its values, the step gradient beneath, and a slider that moves s.

const MARKS = [["initial", "initial"], ["learned", "learned"], ["best", "MSE-optimal"]];
const SLIDER = { reach: 4, ticks: 600 };  // from s / 4 to 4 s

function staircase(row, previous, next) {
  const views = row.views || [];
  const head = el("div.detail-head", {},
    el("h3", {}, row.layer || "(root)", " ", el("span.kind." + row.kind, {}, KINDS[row.kind])),
    el("p.spec", {}, known(row.bits) ? describe(row) : "known from the log only"),
    el("div.buttons", {}, el("button", { type: "button", onclick: previous, title: "the quantizer above in the table" }, "Previous"),
      el("button", { type: "button", onclick: next, title: "the quantizer below in the table" }, "Next")));
  if (!views.length) {
    const why = row.damage || (row.elements ? "its values are not finite" : "no values were looked at: they need the model and data");
    return el("div", {}, head, el("p.notice", {}, `Nothing to draw here: ${why}.`));
  }

  const state = { view: views[0], step: views[0].step, cumulated: sums(views[0].histogram), log: false, zoom: null };
  const host = { top: el("div.plot"), gradient: el("div.plot"), error: el("div.plot") };
  const readout = el("tbody");
  const slider = el("input", { type: "range", id: "step", min: "0", max: String(SLIDER.ticks), step: "1", "aria-label": "Step s", oninput: () => {
    move(state.view.step * SLIDER.reach ** (2 * slider.value / SLIDER.ticks - 1), true);
  } });
  const shownStep = el("output", { for: "step" });
  const caption = el("p.caption");
  const legends = el("div");
  const plots = [charts.add(host.top, drawTop), charts.add(host.gradient, drawGradient), charts.add(host.error, drawError)];
  const picker = views.length > 1 ? el("select", { id: "view", onchange: (event) => show(views[event.target.value]) },
    views.map((view, i) => el("option", { value: i }, viewName(row, view)))) : null;
  const logged = el("input", { type: "checkbox", onchange: () => { state.log = logged.checked; plots[0].draw(); } });
  const presets = MARKS.map(([key, name]) => el("button", { type: "button", onclick: () => move(state.view[key === "learned" ? "step" : key]) }, name));

  function show(view) {
    Object.assign(state, { view, cumulated: sums(view.histogram), zoom: null });
    presets[2].disabled = !view.best;
    move(view.step);
  }

  function move(step, sliding) {
    if (!step) return;
    state.step = step;
    const at = Math.log(step / state.view.step) / Math.log(SLIDER.reach);
    if (!sliding) slider.value = Math.round((at + 1) / 2 * SLIDER.ticks);
    shownStep.textContent = inUnits(state.view) ? `${number(step)} × the learned steps` : `s = ${number(step)}`;
    slider.setAttribute("aria-valuetext", shownStep.textContent);
    tell();
    for (const chart of plots) if (chart.plot) chart.draw();
  }

  function tell() {
    const { view, step } = state;
    const columns = MARKS.filter(([key]) => view.at[key]).map(([key, name]) => [name, key === "learned" ? view.step : view[key], view.at[key]]);
    const same = MARKS.find(([key]) => (key === "learned" ? view.step : view[key]) === step);  // then the exact numbers
    columns.push(["slider", step, same ? view.at[same[0]] : judge(state.cumulated, step, levels(row, view, step))]);
    const total = view.high - view.low + 1;
    const lines = [
      ["step s", (s) => digits(s)],
      ["mean squared error", (_, at) => digits(at.error, 3)],
      ["SQNR, dB", (_, at) => known(at.sqnr) ? fixed(at.sqnr, 2) : "∞"],
      ["clipped below", (_, at) => portion(at.clip_low)],
      ["clipped above", (_, at) => portion(at.clip_high)],
      [`levels used of ${total}`, (_, at) => at.used],
    ];
    readout.replaceChildren(
      el("tr", {}, el("td"), columns.map(([name], i) => el("th", { scope: "col", class: i === columns.length - 1 ? "now" : null }, name))),
      ...lines.map(([name, show]) => el("tr", {}, el("th", { scope: "row" }, name),
        columns.map(([, s, at], i) => el("td", { class: i === columns.length - 1 ? "now" : null }, show(s, at))))));
    caption.textContent = note(row, view);
    legends.replaceChildren(legend([[row.kind === "weight" ? "weight" : "input", "box", "values"], ["line", "line", "v̂, the staircase"],
      ["soft", "dot", "transition points"], ["shade", "box", "clipped"]]));
  }

  /** Ascending v in the drawing: the middle of the values and the outermost levels, with a margin. */
  function range() {
    if (state.zoom) return state.zoom;
    const { view, step, cumulated } = state, [low, high] = levels(row, view, step);
    const [a, b] = bulk(view.histogram, cumulated);
    const from = Math.min(a, low * step), to = Math.max(b, high * step), margin = Math.max(0.07 * (to - from), 0.6 * step);
    return [from - margin, to + margin];
  }

  function common(height, extra) {
    return {
      height, legend: { show: false }, padding: [8, 12, 0, 0],
      cursor: { drag: { x: true, y: false, setScale: false }, sync: { key: "staircase" }, points: { show: false }, y: false },
      ...extra,
      hooks: { setSelect: [(u) => {
        if (u.select.width < 4) return;
        state.zoom = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")];
        plots[0].draw(); plots[1].draw();
      }], ready: [(u) => u.over.addEventListener("dblclick", () => { state.zoom = null; plots[0].draw(); plots[1].draw(); })], ...extra.hooks },
    };
  }

  function drawTop() {
    const { view, step } = state, [low, high] = levels(row, view, step), [from, to] = range();
    const bars = heights(view.histogram, from, to), stairs = stairPoints(from, to, step, low, high);
    const data = uPlot.join([[bars.x, bars.y], [stairs.x, stairs.y], [[from, to], [from, to]]]);
    const tallest = Math.max(...bars.y.filter((y) => y > 0), 1e-12);
    const floor = Math.min(...bars.y.filter((y) => y > 0)) / 2;
    const ink = row.kind === "weight" ? "weight" : "input", edge = Math.max(Math.abs(low), Math.abs(high)) * step;
    return [common(300, {
      scales: {
        x: { time: false, range: () => [from, to] },
        y: { range: () => [Math.min(low * step, 0) - 0.08 * edge, Math.max(high * step, 0) + 0.12 * edge] },
        share: state.log ? { distr: 3, range: () => [floor, tallest * 2] } : { range: () => [0, tallest * 1.12] },
      },
      axes: [axis({ size: 30 }), axis({ label: "quantized value v̂", size: 54 }),
        axis({ scale: "share", side: 1, label: "share of the values", grid: { show: false }, ...(state.log ? { splits: decades, filter: (_, ticks) => ticks } : {}), values: (_, t) => t.map((v) => known(v) ? number(100 * v, 3) + "\u202f%" : ""), size: 52 })],
      series: [{},
        { scale: "share", paths: uPlot.paths.stepped({ align: 1 }), fill: faded(ink, 0.3), stroke: faded(ink, 0.55), width: 1, fillTo: state.log ? floor : 0, points: { show: false } },
        { stroke: theme.color("line"), width: 2, points: { show: false } },
        { stroke: theme.color("soft"), width: 1, dash: [6, 4], points: { show: false } }],
      hooks: { drawClear: [(u) => backdrop(u, low * step, high * step, transitions(step, low, high))], draw: [(u) => zeros(u, view.histogram, ink)] },
    }), data];
  }

  function drawGradient() {
    const { view, step } = state, [low, high] = levels(row, view, step), [from, to] = range();
    const [below, above] = known(view.offset) ? [row.q_min, row.q_max] : [low, high];
    const saw = sawtooth(from, to, step, low, high, below, above), limit = 3.4;
    const [least, most] = [Math.max(Math.min(below, -0.5), -limit), Math.min(Math.max(above, 0.5), limit)];
    return [common(190, {
      scales: { x: { time: false, range: () => [from, to] }, y: { range: () => [least - 0.35, most + 0.35] } },
      axes: [axis({ size: 26, label: inUnits(view) ? "v / s" : "value v", labelSize: 16 }), axis({ label: "∂v̂ / ∂s", size: 54 }), axis({ side: 1, size: 52, label: " ", values: () => [], grid: { show: false }, ticks: { show: false } })],
      series: [{}, ...[1, 2].map(() => ({ stroke: theme.color("gradient"), width: 2, points: { show: false } }))],
      hooks: { drawClear: [(u) => backdrop(u, low * step, high * step, transitions(step, low, high))],
        draw: [(u) => { if (below < -limit) outside(u, low * step, below, -1); if (above > limit) outside(u, high * step, above, 1); }] },
    }), saw];
  }

  function drawError() {
    const { view } = state, x = [];
    for (let i = 0; i <= 120; i++) x.push(view.step * SLIDER.reach ** (i / 60 - 1));
    const y = x.map((step) => judge(state.cumulated, step, levels(row, view, step)).error || null);
    const positive = y.filter((v) => v > 0), [least, most] = [Math.min(...positive), Math.max(...positive)];
    return [{
      height: 190, legend: { show: false }, padding: [16, 12, 0, 0], cursor: { y: false, drag: { x: false }, points: { show: false }, bind: { mousedown: (u) => () => { move(u.posToVal(u.cursor.left, "x")); return null; } } },
      scales: { x: { time: false, distr: 3, range: () => [x[0], x.at(-1)] }, y: { distr: 3, range: () => [least / 1.3, most * 1.3] } },
      axes: [logAxis({ size: 26, label: inUnits(view) ? "s, times the learned steps" : "step s", labelSize: 16 }), logAxis({ label: "mean squared error", size: 56 })],
      series: [{}, { stroke: theme.color("line"), width: 2, points: { show: false } }],
      hooks: { draw: [(u) => {
        for (const [key, color, dash] of [["initial", "soft", [2, 3]], ["best", "best", [6, 3]], ["step", "weight", []]]) upright(u, view[key], color, dash);
        point(u, state.step, judge(state.cumulated, state.step, levels(row, view, state.step)).error);
      }] },
    }, [x, y]];
  }

  show(views[0]);
  return el("div", {}, head,
    el("div.controls", {}, picker && el("label.field", {}, "Values of", picker),
      el("div.field.grow", {}, el("label", { for: "step" }, "Move the step"), slider, shownStep),
      el("div.presets", { role: "group", "aria-label": "Set the step to" }, presets)),
    el("div.detail", {},
      el("figure", {}, legends, host.top, host.gradient, caption, el("label.check", {}, logged, " logarithmic heights")),
      el("div.side", {}, el("table.readout", {}, readout),
        el("figure", {}, legend([["weight", "line", "learned s"], ["soft", "dot", "initial"], ["best", "dash", "MSE-optimal"], ["line", "ring", "slider"]]), host.error))));
}

const inUnits = (view) => view.index === null;

function describe(row) {
  const sign = row.signed ? "signed" : "unsigned", codes = `codes ${number(row.q_min)} to ${number(row.q_max)}`;
  return `${row.bits} bit ${sign}, ${codes}, one step per ${row.granularity}${row.steps > 1 ? ` (${number(row.steps)})` : ""}, N\u00a0=\u00a0${number(row.count)}, ${number(row.elements)} values${row.lsq_plus ? ", learned offset (LSQ+)" : ""}`;
}

function viewName(row, view) {
  if (inUnits(view)) return `all ${row.steps}, in steps`;
  return `${row.granularity.split(" ")[0]} ${view.index}: s = ${number(view.step)}`;
}

function note(row, view) {
  const h = view.histogram, parts = [];
  const zeros = h.zeros ? h.zeros / sums(h).total[0] : 0;
  if (zeros > 0.005) parts.push(`${percent(zeros, 1)} of the values are exactly 0 and left out of the histogram.`);
  if (row.steps > 1) {
    if (inUnits(view)) parts.push("Each value is divided by its own step: s = 1 is the learned one, and the slider moves all together.");
    const own = row.views.filter((other) => !inUnits(other)).length;
    if (own < row.steps) parts.push(`${own} of ${plural(row.steps, "step")} can be chosen: the 8 smallest, the 8 largest, others evenly spaced.`);
  }
  if (view.best) {
    const ratio = view.step / view.best;
    parts.push(`The learned step is ${number(ratio, 3)} times the one of least squared error; LSQ minimises the loss, not this error.`);
  }
  parts.push("Drag to zoom, double click for all.");
  return parts.join(" ");
}

// ---- what is drawn ----

/** The range that holds 99.8 % of the values other than 0. */
function bulk(h, cumulated) {
  const x = h.values || h.counts.map((_, i) => h.from + (i + 0.5) * (h.to - h.from) / h.counts.length);
  const total = h.counts.reduce((a, b) => a + b, 0);
  let seen = 0, first = x[0], last = x.at(-1);
  h.counts.forEach((count, i) => {
    if (seen <= 0.001 * total) first = x[i];
    if (seen < 0.999 * total) last = x[i];
    seen += count;
  });
  return [first, last];
}

/** The histogram's outline over from .. to, in shares; the few values of a small one as narrow bars. */
function heights(h, from, to) {
  const total = sums(h).total[0], x = [], y = [];
  if (h.values && h.values.length > 40) {
    const bins = 80, width = (to - from) / bins, filled = new Array(bins).fill(0);
    h.values.forEach((v, i) => { if (v >= from && v < to) filled[Math.floor((v - from) / width)] += h.counts[i] / total; });
    return { x: [...filled.map((_, i) => from + i * width), to], y: [...filled, null] };
  }
  if (h.values) {
    const half = (to - from) / 600;
    h.values.forEach((v, i) => { x.push(v - half, v + half); y.push(h.counts[i] / total, null); });
    return unique({ x, y });
  }
  const width = (h.to - h.from) / h.counts.length, visible = Math.ceil((to - from) / width);
  const merge = Math.min(Math.max(1, Math.floor(visible / 160)), h.counts.length);
  for (let i = 0; i < h.counts.length; i += merge) {
    x.push(h.from + i * width);
    y.push(h.counts.slice(i, i + merge).reduce((a, b) => a + b, 0) / total);
  }
  x.push(x.at(-1) + merge * width); y.push(null);
  return { x, y };
}

/** Ascending x, each once: of two the first with a value. */
function unique({ x, y }) {
  const order = x.map((_, i) => i).sort((a, b) => x[a] - x[b]), found = { x: [], y: [] };
  for (const i of order) {
    if (found.x.length && x[i] <= found.x.at(-1)) { if (known(y[i])) found.y[found.y.length - 1] = y[i]; continue; }
    found.x.push(x[i]); found.y.push(y[i]);
  }
  return found;
}

const transitions = (step, low, high) => Array.from({ length: high - low }, (_, i) => (low + i + 0.5) * step);

function stairPoints(from, to, step, low, high) {
  const x = [Math.min(from, (low - 1) * step)], y = [low * step], tiny = 1e-6 * step;
  for (let q = low; q < high; q++) { x.push((q + 0.5) * step - tiny, (q + 0.5) * step + tiny); y.push(q * step, (q + 1) * step); }
  x.push(Math.max(to, (high + 1) * step)); y.push(high * step);
  return { x, y };
}

/** round(v/s) - v/s inside the clip points, `below` and `above` beyond, as two series that hold every other piece: no
 *  line is drawn across a jump. */
function sawtooth(from, to, step, low, high, below, above) {
  const x = [], series = [[], []], tiny = 1e-6 * step;
  let count = 0;
  const piece = (a, b, start, end) => {
    x.push(a + tiny, b - tiny);
    series[count % 2].push(start, end);
    series[++count % 2].push(null, null);
  };
  piece(Math.min(from, (low - 1) * step), low * step, below, below);
  for (let q = low; q <= high; q++) {
    const [a, b] = [Math.max(q - 0.5, low), Math.min(q + 0.5, high)];
    if (b > a) piece(a * step, b * step, q - a, q - b);
  }
  piece(high * step, Math.max(to, (high + 1) * step), above, above);
  return [x, ...series];
}

/** Clipped ranges shaded, transition points dotted where they do not run into each other. */
function backdrop(u, low, high, points) {
  const { ctx, bbox } = u, place = (v) => u.valToPos(v, "x", true), right = bbox.left + bbox.width;
  ctx.save();
  ctx.beginPath(); ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height); ctx.clip();
  ctx.fillStyle = theme.color("shade");
  ctx.fillRect(bbox.left, bbox.top, Math.max(place(low) - bbox.left, 0), bbox.height);
  ctx.fillRect(Math.min(place(high), right), bbox.top, Math.max(right - place(high), 0), bbox.height);
  if (points.length < 2 || place(points[1]) - place(points[0]) > 8 * devicePixelRatio) {
    ctx.strokeStyle = theme.color("soft"); ctx.lineWidth = devicePixelRatio; ctx.setLineDash([1.5 * devicePixelRatio, 3 * devicePixelRatio]);
    for (const v of points) { ctx.beginPath(); ctx.moveTo(place(v), bbox.top); ctx.lineTo(place(v), bbox.top + bbox.height); ctx.stroke(); }
  }
  ctx.restore();
}

/** The gradient beyond the clip points, where it lies outside the drawing. */
function outside(u, clip, value, side) {
  const { ctx, bbox } = u, x = u.valToPos(clip, "x", true), y = side > 0 ? bbox.top + 12 * devicePixelRatio : bbox.top + bbox.height - 5 * devicePixelRatio;
  const room = side > 0 ? bbox.left + bbox.width - x : x - bbox.left;
  if (room < 40 * devicePixelRatio) return;
  ctx.save();
  ctx.font = `${12 * devicePixelRatio}px system-ui, sans-serif`; ctx.fillStyle = theme.color("gradient"); ctx.textAlign = "center";
  ctx.fillText(`${number(value)} ${side > 0 ? "↑" : "↓"}`, x + side * Math.min(room / 2, 60 * devicePixelRatio), y);
  ctx.restore();
}

/** The exact zeros, which the histogram leaves out. */
function zeros(u, h, ink) {
  if (!h.zeros) return;
  const share = h.zeros / sums(h).total[0], { ctx, bbox } = u, x = u.valToPos(0, "x", true);
  if (share < 0.005 || x < bbox.left || x > bbox.left + bbox.width) return;
  ctx.save();
  ctx.fillStyle = theme.color(ink); ctx.fillRect(x - 1.5 * devicePixelRatio, bbox.top, 3 * devicePixelRatio, bbox.height);
  ctx.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.fillText(`${percent(share, 0)} exactly 0`, x + 7 * devicePixelRatio, bbox.top + 13 * devicePixelRatio);
  ctx.restore();
}

function upright(u, value, color, dash) {
  const { ctx, bbox } = u, x = value ? u.valToPos(value, "x", true) : -1;
  if (x < bbox.left || x > bbox.left + bbox.width) return;
  ctx.save();
  ctx.strokeStyle = theme.color(color); ctx.lineWidth = 2 * devicePixelRatio; ctx.setLineDash(dash.map((d) => d * devicePixelRatio));
  ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
  ctx.restore();
}

function point(u, x, y) {
  if (!(y > 0)) return;
  const { ctx } = u;
  ctx.save();
  ctx.beginPath(); ctx.arc(u.valToPos(x, "x", true), u.valToPos(y, "y", true), 5 * devicePixelRatio, 0, 2 * Math.PI);
  ctx.fillStyle = theme.color("paper"); ctx.fill(); ctx.lineWidth = 2 * devicePixelRatio; ctx.strokeStyle = theme.color("line"); ctx.stroke();
  ctx.restore();
}
