// Opens pages in headless Chromium the way a person would, and prints what was seen of each as a JSON list.
//
//   node look.mjs PAGE.html ... [--chromium /usr/bin/chromium] [--screenshots FOLDER]
//
// For each of: desktop and phone, light and dark: the time until the page is loaded, console errors, requests that left
// the page's own files, sideways overflow, what axe-core objects to. Once: whether every video plays, the edges of the
// lineage pictures, the tip of an edge, what the keyboard reaches; on the list of a large run: searching and scrolling.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename } from "node:path";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";
import { chromium } from "playwright-core";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { chromium: { type: "string", default: "/usr/bin/chromium" }, screenshots: { type: "string" } },
});
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const sizes = { desktop: { width: 1280, height: 900 }, phone: { width: 390, height: 844 } };

const browser = await chromium.launch({
  executablePath: values.chromium,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"],
});
const seen = [];
for (const path of positionals) seen.push(await look(path));
await browser.close();
process.stdout.write(JSON.stringify(seen));

async function look(path) {
  const seen = { views: [] };
  for (const [size, viewport] of Object.entries(sizes)) {
    for (const colorScheme of ["light", "dark"]) {
      const context = await browser.newContext({ viewport, colorScheme, bypassCSP: false, reducedMotion: "reduce" });
      const page = await context.newPage();
      const view = { size, colorScheme, errors: [], requests: [] };
      page.on("console", (message) => { if (["error", "warning"].includes(message.type())) view.errors.push(message.text()); });
      page.on("pageerror", (error) => view.errors.push(String(error)));
      page.on("request", (request) => { if (!/^(file|data|blob):/.test(request.url())) view.requests.push(request.url()); });
      page.on("requestfailed", (request) => {
        if (request.failure()?.errorText !== "net::ERR_ABORTED") view.errors.push(`${request.url().slice(0, 200)} failed`);
      });
      const began = performance.now();
      await page.goto(pathToFileURL(path).href, { waitUntil: "load" });
      await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
      view.seconds = (performance.now() - began) / 1000;
      view.overflow = await page.evaluate(() => document.scrollingElement.scrollWidth - innerWidth);
      if (values.screenshots) {
        const name = basename(path, ".html");
        await page.screenshot({ path: `${values.screenshots}/${name}-${size}-${colorScheme}.png`, fullPage: true });
      }
      if (size === "desktop" && colorScheme === "light") seen.list = await find(page);
      await page.evaluate(() => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
      if ((size === "desktop") === (colorScheme === "light")) {  // colours and sizes do not depend on each other
        await page.evaluate(axe);
        const { violations } = await page.evaluate(() => axe.run());
        view.violations = violations.map(({ id, impact, nodes }) => (
          { id, impact, where: nodes.slice(0, 3).map((node) => node.html.slice(0, 160)) }));
      }
      if (size === "desktop" && colorScheme === "light") Object.assign(seen, await act(page));
      seen.views.push(view);
      await context.close();
    }
  }
  return seen;
}

// Searches in the list of stories and scrolls to its end; null on a page without a list.
async function find(page) {
  const rows = page.locator(".index .row");
  if (!await rows.count()) return null;
  const shown = () => page.locator(".index .row:visible").count();
  const result = { rows: await rows.count() };
  result.counts = await page.evaluate(() => Object.fromEntries(
    [...document.querySelectorAll("[data-count]")].map((count) => [count.dataset.count, Number(count.textContent)])));
  await page.locator(".search input[value=finished]").check();
  result.finished = await shown();
  await page.locator(".search input[value='']").check();
  await page.locator("#filter").fill(" STORY_1 ");
  result.found = await shown();
  result.output = await page.locator("#filter-count").innerText();
  await page.locator("#filter").fill("");
  result.scrolling = await page.evaluate(async () => {  // slowest frame while all of it passes by, in milliseconds
    let slowest = 0;
    for (let y = 0, last = performance.now(); y <= document.body.scrollHeight; y += 400) {
      scrollTo(0, y);
      await new Promise((done) => requestAnimationFrame(done));
      slowest = Math.max(slowest, performance.now() - last);
      last = performance.now();
    }
    scrollTo(0, 0);
    return slowest;
  });
  const link = rows.first().locator("a");
  result.first = await link.textContent();
  await link.click();
  await page.waitForLoadState("load");
  result.opened = await page.locator("h1").innerText();
  await page.locator("nav a", { hasText: "All stories" }).click();
  await page.waitForLoadState("load");
  result.back = await rows.count();
  return result;
}

async function act(page) {
  const videos = await page.evaluate(() => Promise.all([...document.querySelectorAll("video")].map(async (video) => {
    try { video.muted = true; await video.play(); } catch (error) { return { error: String(error) }; }
    const until = performance.now() + 10000;
    while (video.currentTime === 0 && performance.now() < until) await new Promise((done) => setTimeout(done, 20));
    video.pause();
    return { played: video.currentTime > 0, seconds: video.duration, width: video.videoWidth, height: video.videoHeight };
  })));
  const edges = await page.evaluate(() => [...document.querySelectorAll(".lineage")].map((picture) => ({
    picture: picture.getAttribute("aria-label"),
    shown: [...picture.querySelectorAll(".edge.shown")].map((edge) => [edge.dataset.from, edge.dataset.to]),
    gone: [...picture.querySelectorAll(".edge.gone")].map((edge) => [edge.dataset.from, edge.dataset.to]),
  })));
  let tip = null;
  const edge = page.locator(".edge.shown").first();
  if (await edge.count()) {
    await edge.scrollIntoViewIfNeeded();
    await edge.hover();
    tip = await page.locator("#tip").innerText();
  }
  await page.mouse.move(0, 0);
  await page.evaluate(() => { document.activeElement?.blur(); scrollTo(0, 0); });
  await page.keyboard.press("Tab");
  const firstStop = await page.evaluate(() => document.activeElement.textContent);
  const column = page.locator(".lineage a.column").last();
  let lit = 0;
  if (await column.count()) {
    await column.focus();
    lit = await page.locator(".lineage.chosen .edge.lit").count();
  }
  let sought = null;
  const link = page.locator("a[data-seek]").last();
  if (await link.count()) {
    const wanted = Number(await link.getAttribute("data-seek"));
    const card = (await link.getAttribute("href")).slice(1);
    await link.click();
    await page.waitForFunction(([id, seconds]) => Math.abs(document.getElementById(id).querySelector("video").currentTime - seconds) < 0.01,
                               [card, wanted], { timeout: 10000 });
    sought = wanted;
  }
  await page.locator("#theme").click();
  const theme = await page.evaluate(() => document.documentElement.dataset.theme);
  return { videos, edges, tip, firstStop, lit, sought, theme };
}
