"use strict";
// The page of a run, made from the data; a choice of runs where there are several.

const data = JSON.parse(document.getElementById("data").textContent);
const LEVELS = { outputs: "exact", codes: "equal codes", layers: "equal layers", weights: "equal weights" };

const section = (id, title, ...content) => el("section", { id, "aria-labelledby": id + "-title" }, el("h2", { id: id + "-title" }, title), content);
const metricOf = (run) => Object.keys(resultsOf(run).kept || resultsOf(run).float || {})[0];

function show(run) {
  charts.clear();
  const panel = el("div.panel", { id: "panel" });
  const table = quantizerTable(run.quantizers, (row) => {
    for (const chart of [...charts.all]) if (panel.contains(chart.host)) chart.remove();
    panel.replaceChildren(staircase(row, () => table.move(-1), () => table.move(1)));
  });
  const byName = (name) => {
    const row = run.quantizers.find((q) => q.name === name);
    if (!row) return;
    table.select(row);
    document.getElementById("staircase").scrollIntoView();
  };
  const curves = training(run, byName);
  document.getElementById("main").replaceChildren(...[
    data.runs.length > 1 && several(),
    overview(run),
    section("quantizers", "Quantizers", run.quantizers.length ? [el("p.about", {}, "Click a heading to sort, a row to see its staircase. Hold the pointer over a heading for what it means."), table.node] : el("p.notice", {}, "No quantizer is known.")),
    section("staircase", "The staircase", panel),
    section("training", "Training", curves || el("p.about", {}, "There is no log.")),
    reproduce(run),
  ].filter(Boolean));
  const first = run.quantizers.find((row) => row.views && row.views.length && row.bits < 8) || run.quantizers[0];
  if (first) table.select(first);
}

// ---- overview ----

function overview(run) {
  const results = resultsOf(run), metric = metricOf(run);
  const node = section("overview", run.name,
    (run.missing || []).length ? el("div.notice", { role: "note" }, el("p", {}, el("strong", {}, "Missing: ")), el("ul", {}, run.missing.map((text) => el("li", {}, text)))) : null,
    el("div.cards", {}, metricCard(results, metric), bitsCard(run), sizeCard(run), verdictCard(run), findingsCard(run)),
    findings(run), el("div.pair", {}, el("div", {}, resultTable(run)), el("div", {}, verdicts(run))), shippable(run), sizes(run));
  if (run.config && run.config.task) node.firstChild.append(el("span.task", {}, run.config.task));
  return node;
}

const scroll = (label, ...content) => el("div.scroll", { tabindex: "0", role: "region", "aria-label": label }, content);
const head = (...names) => el("thead", {}, el("tr", {}, names.map((name) => el("th", { scope: "col", class: name === "compared" ? "left" : null }, name))));
const card = (title, value, ...about) => el("div.card", {}, el("h3", {}, title), el("p.figure", {}, value), el("p", {}, about));

function metricCard({ float, kept }, metric) {
  if (!metric) return card("Result", "–", "no metrics yet");
  const value = kept && known(kept[metric]) ? kept[metric] : null, whole = float ? float[metric] : null;
  const gap = known(value) && known(whole) ? value - whole : null;
  const signed = known(gap) ? (gap >= 0 ? "+" : "−") + (metric.includes("accuracy") ? Math.abs(gap).toFixed(2) : number(Math.abs(gap))) : "";
  return card(words(metric), known(value) ? measure(metric, value) : "–", known(whole) ? `float32 ${measure(metric, whole)}${signed && `, ${signed}`}` : "float32 not measured");
}

function bitsCard(run) {
  const bits = run.bits || [];
  if (!bits.length) return card("Bits", "–", "the model could not be read");
  const [[most, count], ...rest] = bits;
  return card("Bits, weights / inputs", most.replace("/", " / "), `in ${plural(count, "layer")}${rest.map(([pair, n]) => `, ${pair.replace("/", " / ")} in ${n}`).join("")}`);
}

function sizeCard({ sizes }) {
  if (!sizes || !sizes.float) return card("Size of the weights", "–", "the model could not be read");
  return card("Size of the weights", bytes(sizes.packed), `${bytes(sizes.float)} in float32, ${number(sizes.float / sizes.packed, 3)} times as much`);
}

function verdictCard({ verdicts, comparison }) {
  const [one] = verdicts || [], best = comparison && comparison.rows.find((row) => row.name === comparison.best);
  if (!one && best) return card("Verdict", LEVELS[best.level] || "not equal", `${best.name}, ${plural(comparison.samples, "sample")}; others below`);
  if (!one) return card("Verdict", "–", "no file was verified");
  return card("Verdict", LEVELS[one.level] || "not equal", `${one.profile} in ${one.runtime}, ${plural(one.samples || 0, "sample")}${verdicts.slice(1).map((v) => `; ${v.profile} in ${v.runtime}: ${LEVELS[v.level] || "not equal"}`).join("")}`);
}

function findingsCard({ findings }) {
  if (!findings) return card("Findings", "–", "the model could not be read");
  const count = (severity) => findings.filter((f) => f.severity === severity).length;
  const parts = ["error", "warning", "note"].map((severity) => count(severity) && plural(count(severity), severity)).filter(Boolean);
  return card("Findings of check", parts[0] || "none", parts.slice(1).join(", ") || (findings.length ? "see below" : "nothing is wrong with the quantizers"));
}

const ALIKE = 3;  // findings of one kind that are shown in full

function findings(run) {
  if (!(run.findings || []).length) return null;
  const evidence = (facts) => Object.entries(facts || {}).map(([key, value]) =>
    el("span.fact", {}, `${words(key)} ${typeof value === "number" ? number(value) : Array.isArray(value) ? value.slice(0, 6).join(", ") : value}`));
  const one = (f) => el("li." + f.severity, {},
    el("p", {}, el("strong.severity", {}, f.severity), " ", el("code", {}, f.where || "(root)"), `: ${f.message} `, el("span.code", {}, f.code)),
    el("p.evidence", {}, evidence(f.evidence)),
    el("p", {}, el("strong", {}, "Remedy: "), f.remedy));
  const kinds = new Map();
  for (const f of run.findings) kinds.set(f.code, [...(kinds.get(f.code) || []), f]);
  return [el("h3", {}, "Findings"), [...kinds.values()].map((alike) => [el("ul.findings", {}, alike.slice(0, ALIKE).map(one)),
    alike.length > ALIKE ? el("details", {}, el("summary", {}, `${plural(alike.length - ALIKE, "more finding")} of ${alike[0].code}`), el("ul.findings", {}, alike.slice(ALIKE).map(one))) : null])];
}

function resultTable(run) {
  const names = [...new Set((run.results || []).flatMap(([, , numbers]) => Object.keys(numbers)))];
  if (!names.length) return null;
  return [el("h3", {}, "Results"), scroll("Results", el("table.plain", {}, head("network", ...names.map(words)),
    el("tbody", {}, run.results.map(([, title, numbers]) => el("tr", {}, el("th", { scope: "row" }, title), names.map((name) => el("td", {}, known(numbers[name]) ? measure(name, numbers[name]) : "–")))))))];
}

function sizes(run) {
  const layers = run.layers || [];
  if (!layers.length || !run.sizes) return null;
  const largest = Math.max(...layers.map((row) => row.packed)), all = run.sizes.packed;
  const strip = el("div.strip", { "aria-hidden": "true" }, layers.map((row) => el("span", { style: `flex: ${row.packed} 1 0`, title: `${row.layer || "(root)"}: ${bytes(row.packed)}, ${row.bits} bit` }, row.packed > 0.06 * all ? row.layer : "")));
  const total = el("tr", {}, el("th", { scope: "row" }, "all"), el("td", {}, number(layers.reduce((n, row) => n + row.weights, 0))), el("td"), el("td", {}, bytes(run.sizes.float)), el("td", {}, bytes(all)),
    el("td.share", {}, el("span.text", {}, `and ${bytes(run.sizes.rest)} of other tensors in float32`)));
  return [el("h3", {}, "Size by layer"), strip, el("details", {}, el("summary", {}, `${plural(layers.length, "layer")} as a table`), scroll("Size by layer",
    el("table.plain.sizes", {}, head("layer", "weights", "bits", "float32", "packed", "share of the packed weights"),
      el("tbody", {}, layers.map((row) => el("tr", {}, el("th", { scope: "row" }, row.layer || "(root)"), el("td", {}, number(row.weights)), el("td", {}, row.bits), el("td", {}, bytes(row.float)), el("td", {}, bytes(row.packed)),
        el("td.share", {}, el("span.fill", { style: `width:${(60 * row.packed / largest).toFixed(1)}%` }), el("span.text", {}, percent(row.packed / all, 1)))))),
      el("tfoot", {}, total))))];
}

function shippable({ comparison }) {
  if (!comparison) return null;
  const { rows, batch_sizes: batches, samples, threads, machine, advice } = comparison;
  const [float] = rows, metric = rows.flatMap((row) => Object.keys(row.metrics))[0];
  const time = (row, size) => row.latency[size] ? `${number(row.latency[size].p50, 3)} (${number(row.latency[size].p20, 3)} to ${number(row.latency[size].p80, 3)})` : "–";
  const names = ["file", "bytes", "of float", ...batches.flatMap((size) => [`ms, batch ${size} (p20 to p80)`, "of float"]), ...(metric ? [words(metric)] : []), "verdict"];
  const cells = (row) => [bytes(row.bytes), row.bytes && float.bytes ? number(row.bytes / float.bytes, 2) : "–",
    ...batches.flatMap((size) => [time(row, size), known(row.ratio[size]) ? number(row.ratio[size], 2) : "–"]),
    ...(metric ? [known(row.metrics[metric]) ? measure(metric, row.metrics[metric]) : "–"] : []), row.level ? LEVELS[row.level] || row.level : "–"];
  const written = rows.filter((row) => known(row.bytes)), left = rows.filter((row) => !known(row.bytes));
  return [el("h3", {}, "Which file to ship"), el("p", {}, el("strong", {}, advice[0].toUpperCase() + advice.slice(1)), "."),
    scroll("Which file to ship", el("table.plain", {}, head(...names), el("tbody", {}, written.map((row) => el("tr", {}, el("th", { scope: "row" }, row.name), cells(row).map((text) => el("td", {}, text))))))),
    el("p.about", {}, `Time in ONNX Runtime on ${machine}, ${plural(threads, "thread")}; verdicts on ${plural(samples, "sample")}.${left.map((row) => ` ${row.name}: ${row.reason}.`).join("")}`)];
}

function verdicts(run) {
  return (run.verdicts || []).map((v) => [el("h3", {}, `Verdict: ${v.profile} in ${v.runtime}`),
    el("p", {}, el("strong", {}, LEVELS[v.level] || "not equal"), `: level ${v.level || "none"}; ${plural(v.layers || 0, "quantized layer")}, ${plural(v.samples || 0, "sample")}.`,
      v.plain ? ` With a plain session: level ${v.plain.level || "none"}.` : ""),
    scroll("Verdict", el("table.plain", {}, head("level", "compared", "elements", "mismatches", "largest difference"),
      el("tbody", {}, (v.checks || []).map((c) => el("tr", {}, el("th", { scope: "row" }, c.level), el("td.left", {}, c.what), el("td", {}, number(c.compared)), el("td", {}, number(c.mismatches)),
        el("td", {}, number(c.largest), c.worst ? ` in ${c.worst}` : ""))))))]);
}

// ---- several runs ----

function several() {
  const metric = data.runs.map(metricOf).find(Boolean);
  const rows = data.runs.map((run, i) => {
    const results = resultsOf(run), [one] = run.verdicts || [];
    return el("tr", {}, el("th", { scope: "row" }, el("button.pick", { type: "button", onclick: () => pick(i) }, run.name)),
      el("td", {}, (run.bits || [["–"]])[0][0].replace("/", " / ")), el("td", {}, results.float && known(results.float[metric]) ? measure(metric, results.float[metric]) : "–"),
      el("td", {}, results.kept && known(results.kept[metric]) ? measure(metric, results.kept[metric]) : "–"),
      el("td", {}, run.sizes ? bytes(run.sizes.packed + run.sizes.rest) : "–"), el("td.left", {}, one ? LEVELS[one.level] || "not equal" : "–"));
  });
  return section("runs", "Runs", el("div.two", {}, scroll("Runs", el("table.plain", {}, head("run", "bits", "float32", words(metric || "metric"), "size", "verdict"), el("tbody", {}, rows))),
  comparison(data.runs, metric)), el("p.about", {}, "Size: packed weights with their steps, and all other tensors in float32. The sections below are about the chosen run."));
}

function pick(index) {
  document.getElementById("run").value = index;
  show(data.runs[index]);
}

// ---- what is needed to repeat it ----

function reproduce(run) {
  const pre = (title, text) => text ? el("div", {}, el("h3", {}, title), el("pre", { tabindex: "0" }, text)) : null;
  const flat = (object) => Object.entries(object || {}).filter(([key]) => key !== "format").map(([key, value]) =>
    [words(key), value && typeof value === "object" ? (Array.isArray(value) ? value.join(", ") || "none" : Object.entries(value).map((pair) => pair.join(" ")).join(", ")) : String(value)]);
  const list = (title, pairs) => pairs.length ? el("div", {}, el("h3", {}, title), el("dl.pairs", {}, pairs.flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, value)]))) : null;
  return section("reproduce", "Reproduce", pre("Commands", (run.commands || []).join("\n")), el("div.two", {},
    el("div", {}, pre("Recipe", run.recipe), list("Files", (run.files || []).map(([name, size]) => [name, `${number(size)} bytes`]))),
    el("div", {}, list("Settings", flat((run.config || {}).settings)), list("Environment", flat(run.environment)))));
}

// ---- start ----

function start() {
  const choice = document.getElementById("run"), button = document.getElementById("theme");
  data.runs.forEach((run, i) => choice.append(el("option", { value: i }, run.name)));
  choice.parentElement.hidden = data.runs.length < 2;
  choice.addEventListener("change", () => show(data.runs[choice.value]));
  const label = () => { button.textContent = { auto: "Theme: auto", light: "Theme: light", dark: "Theme: dark" }[theme.choice]; };
  button.addEventListener("click", () => { theme.set({ auto: "light", light: "dark", dark: "auto" }[theme.choice]); label(); });
  try { const kept = localStorage.getItem("lsquant-theme"); if (kept) theme.set(kept); } catch { /* no storage: follow the system */ }
  label();
  document.getElementById("foot").append(el("p", {}, `Written by lsquant ${data.version}. Learned Step Size Quantization, Esser et al., ICLR 2020. Charts: uPlot, MIT licence.`));
  let opened = [];
  addEventListener("beforeprint", () => {  // on paper everything is open, and light
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((part) => { part.open = true; });
    document.documentElement.dataset.theme = "light";
    charts.redraw();
  });
  addEventListener("afterprint", () => {
    opened.forEach((part) => { part.open = false; });
    theme.set(theme.choice);
  });
  show(data.runs[0]);
}

start();
