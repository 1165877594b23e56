// Opens a page in headless Chromium the way a person would, and prints what was seen as JSON.
//
//   node look.mjs PAGE.html [--chromium /usr/bin/chromium] [--screenshots FOLDER]
//
// For each of: desktop and phone, light and dark: console errors, requests that left the page's own files, sideways
// overflow, what axe-core objects to. Once: whether every video plays, the edges of the lineage pictures, the tip of an
// edge, what the keyboard reaches.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";
import { chromium } from "playwright-core";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { chromium: { type: "string", default: "/usr/bin/chromium" }, screenshots: { type: "string" } },
});
const address = pathToFileURL(positionals[0]).href;
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const sizes = { desktop: { width: 1280, height: 900 }, phone: { width: 390, height: 844 } };

const browser = await chromium.launch({
  executablePath: values.chromium,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"],
});
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
    await page.goto(address, { waitUntil: "load" });
    view.overflow = await page.evaluate(() => document.scrollingElement.scrollWidth - innerWidth);
    if (values.screenshots) {
      await page.screenshot({ path: `${values.screenshots}/${size}-${colorScheme}.png`, fullPage: true });
    }
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
await browser.close();
process.stdout.write(JSON.stringify(seen));

async function act(page) {
  const videos = await page.evaluate(() => Promise.all([...document.querySelectorAll("video")].map(async (video) => {
    try { video.muted = true; await video.play(); } catch (error) { return { error: String(error) }; }
    const until = performance.now() + 10000;
    while (video.currentTime === 0 && performance.now() < until) await new Promise((done) => setTimeout(done, 20));
    video.pause();
    return { played: video.currentTime > 0, seconds: video.duration, width: video.videoWidth, height: video.videoHeight };
  })));
  const edges = await page.evaluate(() => [...document.querySelectorAll("svg.lineage")].map((picture) => ({
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
  const column = page.locator("svg.lineage a.column").last();
  let lit = 0;
  if (await column.count()) {
    await column.focus();
    lit = await page.locator("svg.lineage.chosen .edge.lit").count();
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
