// Opens graphs in ComfyUI's page in headless Chromium the way a person would, and prints what was seen as JSON.
//
//   node graph.mjs http://127.0.0.1:8188 GRAPH.json ... [--chromium /usr/bin/chromium] [--screenshot PICTURE.png]
//
// GRAPH.json: as the browser saves it, or an API prompt. Printed for each: the nodes with their widgets, what the page
// marks as wrong, the prompt that it would queue, and the graph as it would be saved. The picture is of the last one.

import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { chromium } from "playwright-core";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { chromium: { type: "string", default: "/usr/bin/chromium" }, screenshot: { type: "string" } },
});
const [address, ...graphs] = positionals;

const browser = await chromium.launch({
  executablePath: values.chromium,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"],
});
await fetch(`${address}/settings`, {  // a first visit shows templates over the graph
  method: "POST", body: JSON.stringify({ "Comfy.TutorialCompleted": true }), headers: { "Content-Type": "application/json" },
});
const page = await browser.newPage({ viewport: { width: 1900, height: 1000 } });
let errors = [];
page.on("pageerror", (error) => errors.push(String(error)));
await page.route((url) => url.origin !== new URL(address).origin, (route) => route.abort());
await page.goto(address, { waitUntil: "load" });
await page.waitForFunction(() => window.app?.graph && window.app.vueAppReady !== false
  && window.LiteGraph?.registered_node_types?.KSampler, null, { timeout: 90000 });
const seen = [];
for (const path of graphs) {
  errors = [];
  seen.push({ ...await page.evaluate(open, JSON.parse(readFileSync(path, "utf8"))), errors });
}
if (values.screenshot) await page.screenshot({ path: values.screenshot });
await browser.close();
process.stdout.write(JSON.stringify(seen));

async function open(given) {
  if (given.nodes) await app.loadGraphData(given);
  else await app.loadApiJson(given, "graph");
  await new Promise((done) => setTimeout(done, 500));
  app.canvas.ds.fitToBounds?.(boundsOf(app.graph._nodes), { zoom: 0.9 });
  app.canvas.setDirty(true, true);
  await new Promise((done) => setTimeout(done, 500));
  const nodes = app.graph._nodes.map((node) => ({
    id: String(node.id),
    type: node.type,
    known: node.type in LiteGraph.registered_node_types,
    wrong: Boolean(node.has_errors),
    unlinked: (node.inputs ?? []).filter((input) => input.link == null && !input.widget).map((input) => input.name),
    widgets: Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, widget.value])),
  }));
  const dialogs = [...document.querySelectorAll("[role=dialog]")].map((dialog) => dialog.innerText);
  return { nodes, dialogs, prompt: (await app.graphToPrompt()).output, saved: app.graph.serialize() };

  function boundsOf(nodes) {
    const left = Math.min(...nodes.map((node) => node.pos[0])), top = Math.min(...nodes.map((node) => node.pos[1] - 30));
    return [left, top, Math.max(...nodes.map((node) => node.pos[0] + node.size[0])) - left,
            Math.max(...nodes.map((node) => node.pos[1] + node.size[1])) - top];
  }
}
