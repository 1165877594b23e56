// Follows a live page in headless Chromium while a run goes on, and prints what was seen as JSON (the last line).
//
//   node live.mjs ADDRESS LIST [--chromium /usr/bin/chromium] [--screenshots FOLDER]
//
// Both have the token; LIST is of a server with several runs. Before each step that the run or the server must take, its name is printed, and a line is awaited.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { parseArgs } from "node:util";
import { chromium } from "playwright-core";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { chromium: { type: "string", default: "/usr/bin/chromium" }, screenshots: { type: "string" } },
});
const [address, list] = positionals;
const origin = new URL(address).origin;
const own = new Set([origin, new URL(list).origin]);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const step = async (name) => { process.stdout.write(`${name}\n`); await lines.next(); };
const timeout = 20000;

const browser = await chromium.launch({
  executablePath: values.chromium,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required"],
});
const seen = { errors: [], foreign: [], violations: [] };

const open = async (viewport, where) => {
  const context = await browser.newContext({ viewport, reducedMotion: "reduce" });
  const page = await context.newPage();
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) seen.errors.push(message.text());
  });
  page.on("pageerror", (error) => seen.errors.push(String(error)));
  page.on("request", (request) => {
    if (!own.has(new URL(request.url()).origin) && !/^(data|blob):/.test(request.url())) seen.foreign.push(request.url());
  });
  await page.goto(where, { waitUntil: "load" });
  return page;
};
const check = async (page) => {
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => axe.run());
  for (const { id, impact, nodes } of violations) {
    seen.violations.push({ id, impact, where: nodes.slice(0, 2).map((node) => node.html.slice(0, 160)) });
  }
};
const state = (page, text) => page.locator(".live .state", { hasText: text }).waitFor({ timeout });
const noted = async (page, text) => {
  await page.locator(".live .note", { hasText: text }).waitFor({ timeout });
  return page.locator(".live .note").innerText();
};
const shot = (name) => `[data-part="shot:story_0:${name}"]`;

const page = await open({ width: 1280, height: 900 }, address);
await state(page, "live");
seen.addressAfter = page.url();

// What a reader does: opens a part, plays a clip, scrolls, puts the focus somewhere.
await page.evaluate(async () => {
  window.stays = true;
  const video = document.querySelector(".film video");
  video.muted = true;
  await video.play();
  document.querySelectorAll("details").forEach((part) => { part.open = true; });
  document.querySelector("#timeline-title").scrollIntoView({ block: "center" });
  document.querySelector("#theme").focus({ preventScroll: true });
});
const top = () => page.evaluate(() => document.querySelector("#timeline-title").getBoundingClientRect().top);
const before = await top();
await step("begin shot_02");
await page.locator(`${shot("shot_02")} progress`).waitFor({ timeout });
seen.progress = await page.locator(`${shot("shot_02")} progress`).getAttribute("value");
await step("finish shot_02");
await page.locator(`${shot("shot_02")} video`).waitFor({ timeout, state: "attached" });
const time = await page.evaluate(() => document.querySelector(".film video").currentTime);
await page.waitForFunction((then) => document.querySelector(".film video").currentTime !== then, time, { timeout });
seen.kept = await page.evaluate(() => ({
  page: window.stays === true,
  closed: [...document.querySelectorAll("details")].filter((part) => !part.open).length,
  playing: !document.querySelector(".film video").paused,
  focus: document.activeElement.id,
}));
seen.moved = Math.abs(await top() - before);
seen.newVideoPlays = await page.evaluate(async (where) => {
  const video = document.querySelector(`${where} video`);
  video.muted = true;
  await video.play();
  return video.videoWidth;
}, shot("shot_02"));
seen.playButton = await page.locator(`${shot("shot_02")} .play`).count();

// The buttons.
seen.asked = {};
await page.getByRole("button", { name: "Pause: the run" }).click();
seen.asked.pause = await noted(page, "request 1");
await page.getByRole("button", { name: "Resume: the run" }).click({ timeout });
seen.asked.resume = await noted(page, "request 2");
await page.getByRole("button", { name: "Skip: story_0" }).first().click();
seen.asked.skip = await noted(page, "request 3");
await page.getByRole("button", { name: "Unskip: story_0" }).first().click({ timeout });
seen.asked.unskip = await noted(page, "request 4");
await page.getByRole("button", { name: "First: story_0" }).first().click();
seen.asked.first = await noted(page, "request 5");
await page.getByRole("button", { name: "Render again: story_0 shot_01" }).click();
await check(page);
await page.getByRole("button", { name: "Only this shot" }).click();
seen.asked.rerender = await noted(page, "request 6");
await page.getByRole("button", { name: "Stop: the run" }).click();
await page.keyboard.press("Escape");
seen.dialogsLeft = await page.locator("dialog").count();
await page.getByRole("button", { name: "Stop: the run" }).click();
await page.getByRole("button", { name: "Now", exact: true }).click();
seen.asked.stop = await noted(page, "request 7");
await page.evaluate(() => scrollTo(0, 0));
await check(page);
if (values.screenshots) await page.screenshot({ path: `${values.screenshots}/live-desktop.png`, fullPage: true });
seen.errorsWhileOpen = seen.errors.splice(0);

// The server goes and comes back; the page goes on by itself.
await step("stop the server");  // a step's answer comes when it is done
await state(page, "connection lost, trying again");
await step("start the server");
await state(page, /^live$/);
await step("finish shot_03");
await page.locator(`${shot("shot_03")} video`).waitFor({ timeout, state: "attached" });
seen.stillTheSame = await page.evaluate(() => window.stays === true);
seen.errors = [];  // those of the lost connection

// A hidden page reads nothing. Chromium shows no hidden tab without a window, so the page is made to believe it.
await page.evaluate(() => {
  Object.defineProperty(document, "visibilityState", { value: "hidden", configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
});
await step("count the followers");
await page.close();

// A phone without the token: it shows, and changes nothing.
const phone = await open({ width: 390, height: 844 }, `${origin}/`);
await state(phone, "live");
seen.overflow = await phone.evaluate(() => document.scrollingElement.scrollWidth - innerWidth);
seen.buttonsWithoutToken = await phone.locator("[data-actions] button").count();
seen.wordsWithoutToken = await phone.locator(".live .note").innerText();
await check(phone);
if (values.screenshots) await phone.screenshot({ path: `${values.screenshots}/live-phone.png` });

// Several runs: their list takes the token and keeps it for the page of each.
await phone.goto(list, { waitUntil: "load" });
await state(phone, "live");
seen.listAfter = phone.url();
await phone.locator("#runs a").last().click();
await state(phone, "live");
seen.buttonsOfListed = await phone.locator("[data-actions] button").count();
await browser.close();
process.stdout.write(`${JSON.stringify(seen)}\n`);
