// Opens pages in headless Chromium and says what it saw, as JSON:
// `node look.mjs CHROMIUM PROFILE-FOLDER < looks.json`, looks = [{page, width, dark, click, screenshot}].
//
// It speaks the DevTools protocol over the browser's pipe (descriptors 3 and 4), so that it needs no package
// and no port.
import { spawn } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const LIMIT_MS = 60_000;
const [chromium, profile] = process.argv.slice(2);
const looks = JSON.parse(readFileSync(0, "utf8"));

const browser = spawn(
  chromium,
  [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--hide-scrollbars", "--remote-debugging-pipe",
    `--user-data-dir=${profile}`, "about:blank",
  ],
  // A group of its own: its children end with it.
  { stdio: ["ignore", "ignore", "pipe", "pipe", "pipe"], detached: true },
);
let log = "";
browser.stderr.on("data", (data) => { log = (log + data).slice(-4000); });

function end(code, message) {
  if (message) console.error(`${message}\n${log}`);
  try { process.kill(-browser.pid, "SIGKILL"); } catch { /* it has ended */ }
  process.exit(code);
}
setTimeout(() => end(1, `not done after ${LIMIT_MS} ms`), LIMIT_MS);
browser.on("error", (error) => end(1, `${chromium} does not start: ${error.message}`));
browser.on("exit", (code, signal) => end(1, `${chromium} ended: ${code ?? signal}`));

let rest = "", last = 0;
const waiting = new Map();
let heard = () => {};
browser.stdio[4].setEncoding("utf8");
browser.stdio[4].on("data", (data) => {
  const messages = (rest + data).split("\0");
  rest = messages.pop();
  for (const text of messages) {
    const message = JSON.parse(text);
    if (message.id === undefined) { heard(message); continue; }
    const { resolve, reject } = waiting.get(message.id);
    waiting.delete(message.id);
    if (message.error) reject(new Error(message.error.message)); else resolve(message.result);
  }
});
function call(method, params = {}, sessionId = undefined) {
  const id = ++last;
  browser.stdio[3].write(`${JSON.stringify({ id, method, params, sessionId })}\0`);
  return new Promise((resolve, reject) => waiting.set(id, { resolve, reject }));
}

/// Runs inside the page.
function inspect(click) {
  // What is folded is looked at, too, and folded again for the picture.
  const folded = [...document.querySelectorAll("details:not([open])")];
  for (const details of folded) details.open = true;
  const plots = [...document.querySelectorAll("[data-plot]")].map((figure) => {
    const faults = [];
    const fault = (text) => { if (faults.length < 10) faults.push(text); };
    const svgs = [...figure.querySelectorAll("svg")];
    let drawn = 0, marks = 0;
    for (const svg of svgs) {
      const { width, height } = svg.viewBox.baseVal;
      if (svg.getBoundingClientRect().width < 50) fault("an SVG is not laid out");
      const outside = (b) => b.x < -1 || b.y < -1 || b.x + b.width > width + 1 || b.y + b.height > height + 1;
      for (const element of svg.querySelectorAll("path, rect, circle")) {
        const box = element.getBBox();
        drawn += 1;
        if (!element.matches(".grid, .axis, .band")) marks += 1;
        if (!(box.width + box.height > 0)) fault(`${element.outerHTML.slice(0, 160)} has no size`);
        if (outside(box)) fault(`${element.outerHTML.slice(0, 160)} leaves the view box`);
        const style = getComputedStyle(element);
        if (style.stroke === "none" && style.fill === "none") fault(`${element.outerHTML.slice(0, 160)} has no colour`);
      }
      const texts = [...svg.querySelectorAll("text")].map((text) => ({ text: text.textContent, box: text.getBBox() }));
      for (const { text, box } of texts) if (outside(box)) fault(`"${text}" leaves the view box`);
      for (let i = 0; i < texts.length; i++) {
        for (let j = 0; j < i; j++) {
          const [a, b] = [texts[i].box, texts[j].box];
          const x = Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x);
          const y = Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y);
          // Boxes of text are higher than its letters.
          if (x > 1 && y > 5) fault(`"${texts[i].text}" is over "${texts[j].text}"`);
        }
      }
    }
    for (const element of figure.querySelectorAll("h2, h3, figcaption, .legend, .none")) {
      if (element.scrollWidth > element.clientWidth + 1) fault(`"${element.textContent.slice(0, 60)}" overflows`);
    }
    return {
      name: figure.dataset.plot, empty: figure.dataset.empty === "true", text: figure.textContent.slice(0, 4000),
      svgs: svgs.length, drawn, marks, faults,
    };
  });
  const width = document.documentElement.scrollWidth, text = document.body.innerText;
  for (const details of folded) details.open = false;
  let toggled = 0;
  if (click) {
    const button = document.querySelector("[data-toggle]");
    button.click();
    toggled = document.querySelectorAll("svg .hidden").length;
    button.click();
    toggled -= document.querySelectorAll("svg .hidden").length;
  }
  return {
    title: document.title, plots, toggled, ground: getComputedStyle(document.body).backgroundColor,
    page_width: width, window_width: innerWidth,
    scripts: document.scripts.length, foreign: document.querySelectorAll("img, iframe, object, link, [onerror]").length,
    text, hijacked: globalThis.hijacked ?? null,
  };
}

async function look({ page, width, dark, click, screenshot }) {
  const complaints = [], requests = [];
  const url = pathToFileURL(page).href;
  const { targetId } = await call("Target.createTarget", { url: "about:blank" });
  const { sessionId } = await call("Target.attachToTarget", { targetId, flatten: true });
  const here = (method, params) => call(method, params, sessionId);
  const loaded = new Promise((resolve) => {
    heard = ({ method, params }) => {
      if (method === "Page.loadEventFired") resolve();
      if (method === "Runtime.consoleAPICalled") complaints.push(params.args.map((a) => a.value ?? a.description).join(" "));
      if (method === "Runtime.exceptionThrown") complaints.push(params.exceptionDetails.exception?.description ?? params.exceptionDetails.text);
      if (method === "Log.entryAdded") complaints.push(params.entry.text);
      if (method === "Network.requestWillBeSent" && params.request.url !== url) requests.push(params.request.url);
    };
  });
  for (const domain of ["Page", "Runtime", "Log", "Network"]) await here(`${domain}.enable`);
  await here("Emulation.setDeviceMetricsOverride", { width, height: 900, deviceScaleFactor: 1, mobile: false });
  await here("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value: dark ? "dark" : "light" }] });
  await here("Page.navigate", { url });
  await loaded;
  const expression = `(${inspect})(${Boolean(click)})`;
  const { result, exceptionDetails } = await here("Runtime.evaluate", { expression, returnByValue: true });
  if (exceptionDetails) throw new Error(exceptionDetails.exception?.description ?? exceptionDetails.text);
  const { data } = await here("Page.captureScreenshot", { captureBeyondViewport: true });
  writeFileSync(screenshot, Buffer.from(data, "base64"));
  await call("Target.closeTarget", { targetId });
  return { ...result.value, complaints, requests };
}

try {
  const seen = [];
  for (const one of looks) seen.push(await look(one));
  process.stdout.write(JSON.stringify(seen), () => end(0));
} catch (error) {
  end(1, error.stack);
}
