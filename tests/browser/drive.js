// Opens a report page in headless Chromium, uses it, and prints what it saw as JSON.
//   node drive.js NODE_MODULES_FOLDER CHROMIUM PAGE.html
"use strict";
const { createRequire } = require("node:module");
const { join } = require("node:path");
const { pathToFileURL } = require("node:url");

const [folder, executablePath, file] = process.argv.slice(2);
const { chromium } = createRequire(join(folder, "from.js"))("playwright-core");
const SIZES = { desktop: { width: 1280, height: 900 }, phone: { width: 390, height: 844 } };

const names = (page) => page.$$eval("table.quantizers tbody tr:not([hidden])", (rows) => rows.map((row) => row.dataset.name));
const cells = (page) => page.$$eval("table.quantizers tbody tr", (rows) =>
  Object.fromEntries(rows.map((row) => [row.dataset.name, [...row.cells].map((cell) => cell.textContent)])));
const headings = (page) => page.$$eval("table.quantizers thead th", (cells) => cells.map((th) => [th.textContent, th.getAttribute("aria-sort")]));

/** Scroll through the page so that every chart is drawn; how many canvases have nothing on them. */
async function drawAll(page) {
  for (const host of await page.$$(".plot")) await host.scrollIntoViewIfNeeded();
  await page.waitForFunction(() => [...document.querySelectorAll(".plot")].every((host) => host.querySelector("canvas")));
  return page.$$eval(".plot canvas", (all) => all.filter((canvas) =>
    !canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value)).length);
}

async function look(browser, size, colorScheme) {
  const page = await browser.newPage({ viewport: SIZES[size], colorScheme });
  const problems = [];
  page.on("console", (message) => problems.push(`${message.type()}: ${message.text()}`));
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("request", (request) => { if (!/^(file|data):/.test(request.url())) problems.push(`request: ${request.url()}`); });
  await page.goto(pathToFileURL(file).href);
  const seen = { blank: await drawAll(page), canvases: await page.$$eval(".plot canvas", (all) => all.length) };
  seen.wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  seen.cut = await page.$$eval("table.readout", (all) => all.filter((table) =>
    table.getBoundingClientRect().right > table.parentElement.getBoundingClientRect().right + 1).length);
  seen.background = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  seen.overlaps = await page.evaluate(overlaps);
  return { page, problems, seen };
}

/** Pairs of texts in the page that lie on one another (both visible, in normal flow). */
function overlaps() {
  const found = [], boxes = [];
  for (const node of document.querySelectorAll("main h2, main h3, main h4, main p, main .controls > *, main .plot, main dl, main pre, main .scroll, main summary")) {
    const box = node.getBoundingClientRect();
    if (box.width && box.height && node.checkVisibility()) boxes.push([node, box]);
  }
  boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
    if (a.contains(b) || b.contains(a)) return;
    const [x, y] = [Math.min(p.right, q.right) - Math.max(p.left, q.left), Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top)];
    if (x > 2 && y > 2) found.push(`${a.textContent.slice(0, 30)} / ${b.textContent.slice(0, 30)}`);
  }));
  return found;
}

/** The table beside the slider at some of its positions. */
function slide() {
  const slider = document.getElementById("step");
  return [0, 150, 290, 430, 600].map((position) => {
    slider.value = String(position);
    slider.dispatchEvent(new Event("input", { bubbles: true }));
    return [...document.querySelectorAll("table.readout tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
  });
}

/** The bars of a histogram seen from near and from far, and the numbers at the marks of axes. */
function drawing() {
  const h = { from: 0, to: 1, counts: [1, 2, 0, 1], zeros: 0, below: [0, 0, 0], above: [0, 0, 0] };
  return {
    bars: [[0, 1], [-1e6, 1e6], [0, 100]].map(([from, to]) => heights(h, from, to)),
    marks: [[-0.0005, 0, 0.0002], [0.001, 0.0012], [-0.5, 0, 1250], [0.02, 0.021]].map(tickTexts),
  };
}

async function use(page) {
  const told = { headings: await headings(page), cells: await cells(page), sorted: {}, searched: {}, slider: [], views: {} };
  for (let column = 0; column < told.headings.length; column++) {
    const button = page.locator("table.quantizers thead button").nth(column), orders = [];
    for (const how of ["click", "Enter"]) {
      if (how === "click") await button.click(); else { await button.focus(); await page.keyboard.press("Enter"); }
      orders.push([(await headings(page))[column][1], await names(page)]);
    }
    told.sorted[told.headings[column][0]] = orders;
  }
  for (const words of ["input", "weight channel", "8 bit", "nothing of that name", ""]) {
    await page.fill("#search", words);
    told.searched[words] = [await names(page), await page.textContent("[role=status]")];
  }
  for (const name of Object.keys(told.cells)) {
    await page.locator(`tr[data-name="${name}"] .pick`).focus();
    await page.keyboard.press("Enter");
    const views = await page.$$eval("#view option", (all) => all.map((option) => option.textContent));
    const some = [...new Set([0, 1, views.length - 1])].filter((view) => view >= 0 && view < Math.max(views.length, 1));
    for (const view of some) {
      if (views.length) await page.selectOption("#view", String(view));
      told.slider.push({ name, view, label: views[view] || "", numbers: await page.evaluate(slide) });
    }
  }
  told.drawing = await page.evaluate(drawing);
  await page.focus("#step");
  const before = await page.textContent(".controls output");
  await page.keyboard.press("ArrowLeft");
  told.keyboard = [before, await page.textContent(".controls output")];
  told.chosen = await page.$$eval("tr.chosen", (rows) => rows.map((row) => row.dataset.name));
  await page.getByRole("button", { name: "Previous" }).click();
  told.previous = await page.$$eval("tr.chosen", (rows) => rows.map((row) => row.dataset.name));
  await page.click("#theme");  // light
  await page.click("#theme");  // dark
  told.dark = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  told.runs = await page.$$eval("#run option", (all) => all.map((option) => option.textContent));
  if (told.runs.length > 1) {
    await page.selectOption("#run", "1");
    told.second = await page.textContent("#overview h2");
  }
  told.text = await page.textContent("main");
  return told;
}

(async () => {
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
  const result = { looks: {} };
  for (const size of Object.keys(SIZES)) for (const scheme of ["light", "dark"]) {
    const { page, problems, seen } = await look(browser, size, scheme);
    if (size === "desktop" && scheme === "light") result.used = await use(page);
    if (size === "desktop" && scheme === "light") result.pdf = (await page.pdf()).length;
    result.looks[`${size} ${scheme}`] = { ...seen, problems };
    await page.close();
  }
  await browser.close();
  process.stdout.write(JSON.stringify(result));
})().catch((error) => { console.error(error); process.exit(1); });
