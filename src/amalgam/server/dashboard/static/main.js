// Puts the page together: panels, language, theme, and the event stream that tells when something has changed.

import { changeKey, stream } from "./api.js";
import { emit, loadInfo, loadMapping, loadPrecision, loadRemaps, loadStatistics, on, state, whyEmpty } from "./app.js";
import { h } from "./dom.js";
import * as format from "./format.js";
import { language, onLanguage, setLanguage, startLanguage, t, translate } from "./i18n.js";
import { askForKeys } from "./key.js";
import { onTheme, toggleTheme } from "./theme.js";
import * as analysis from "./panels/analysis.js";
import * as autoplan from "./panels/autoplan.js";
import * as expert from "./panels/expert.js";
import * as inspector from "./panels/inspector.js";
import * as memory from "./panels/memory.js";
import { explainEmpty } from "./panels/panel.js";
import * as playground from "./panels/playground.js";
import * as precision from "./panels/precision.js";
import * as serving from "./panels/serving.js";
import * as trials from "./panels/trials.js";
import * as usage from "./panels/usage.js";
import * as weights from "./panels/weights.js";

// Each module makes its panels: [{id, node, refresh, redraw}]. `refresh` reads from the server, when the panel comes
// into view and when `dirtyOn` says that what it shows has changed; `redraw` shows the same in another language or theme.
// With `needsStatistics` a panel says why it is empty where nothing is counted, and reads nothing.
const MODULES = [serving, usage, expert, precision, inspector, analysis, autoplan, weights, trials, memory, playground];
const NAV = ["serving", "usage", "precision", "inspector", "analysis", "weights", "memory", "playground"];
const RECONNECT_MS = [1000, 2000, 5000, 10000];
const SILENT_INTERVALS = 3.5; // without an event, and nobody is there
const FIRST_INTERVAL = 2; // seconds, until an event tells

const panels = [];
let isLoaded = false;
let loadedFrom = null; // when the process started whose figures these are
let isLoading = false;
let connection = "connecting"; // then "open", "lost", or "locked": the server wants another key
let connectNow = () => {}; // instead of waiting for the next try
let liveAt = null; // when the latest event came from a server that serves, Unix seconds

function build() {
  const main = document.getElementById("panels");
  for (const module of MODULES) {
    for (const panel of module.create()) {
      panel.isVisible = false;
      panel.isDirty = true;
      main.append(panel.node);
      panels.push(panel);
      for (const name of panel.dirtyOn ?? []) on(name, () => markDirty(panel));
    }
  }
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const panel = panels.find((item) => item.node === entry.target);
      panel.isVisible = entry.isIntersecting;
      refreshIfDue(panel);
    }
  }, { rootMargin: "120px" });
  for (const panel of panels) seen.observe(panel.node);
  document.addEventListener("visibilitychange", () => panels.forEach(refreshIfDue));

  const nav = document.getElementById("nav");
  nav.append(...NAV.map((id) => h("a", { href: `#${id}`, dataset: { i18n: `nav_${id}` } })));

  const enterKey = async () => { if (await changeKey(t("locked"))) connectNow(); };
  main.before(h("div", { id: "locked", role: "alert", hidden: true }, h("span", { dataset: { i18n: "locked" } }),
    h("button", { type: "button", dataset: { i18n: "enter_key" }, onclick: enterKey })));
}

function markDirty(panel) {
  panel.isDirty = true;
  refreshIfDue(panel);
}

async function refreshIfDue(panel) {
  if (!isLoaded || !panel.isDirty || !panel.isVisible || document.hidden) return;
  panel.isDirty = false;
  await attempt(panel);
}

async function attempt(panel) {
  if (panel.needsStatistics) {
    const reason = whyEmpty();
    explainEmpty(panel.node, reason);
    if (reason !== null) return;
  }
  const error = panel.node.querySelector(".panel-error");
  try {
    await panel.refresh?.();
    error?.remove();
  } catch (failure) {
    const text = failure.message || String(failure);
    if (error) error.firstChild.textContent = text;
    else {
      const again = h("button", { type: "button", dataset: { i18n: "retry" }, onclick: () => attempt(panel) }, t("retry"));
      panel.node.querySelector(".panel-body").prepend(h("div", { class: "panel-error", role: "alert" }, h("span", {}, text), again));
    }
  }
}

function showWords() {
  document.title = t("title");
  translate();
  showHeader();
}

function redraw() {
  showWords();
  for (const panel of panels) panel.redraw?.();
}

function showHeader() {
  const event = state.event;
  const status = connection === "lost" ? "disconnected" : connection === "locked" ? "locked" : event?.status ?? "connecting";
  const isLive = status === "healthy" || status === "draining";
  document.documentElement.dataset.stale = String(isLoaded && !isLive); // figures on the page are of earlier then
  document.getElementById("model").textContent = event?.model ?? "";
  const badge = document.getElementById("status");
  badge.dataset.status = status;
  badge.lastElementChild.textContent = t(`status_${status}`);
  document.getElementById("locked").hidden = status !== "locked";
  document.getElementById("stale").textContent = isLoaded && !isLive ? t("figures_of", format.clock(liveAt)) : "";
  document.getElementById("version").textContent = event?.weight_version ? t("weight_version", event.weight_version) : "";
  document.getElementById("uptime").textContent = event ? t("uptime", format.seconds(Math.round(event.uptime))) : "";
}

async function load() {
  await loadStatistics();
  await Promise.all([loadInfo(), loadPrecision(), loadRemaps(), loadMapping()]);
  isLoaded = true;
  showWords();
  for (const panel of panels) markDirty(panel);
  document.documentElement.dataset.loaded = "true";
}


async function onEvent(event) {
  const before = state.event;
  state.event = event;
  connection = "open";
  if (event.status === "healthy" || event.status === "draining") liveAt = Date.now() / 1000;
  showHeader();
  emit("event", event);
  const isReady = event.status === "healthy" || event.status === "draining";
  if (isReady && event.started_at !== loadedFrom && !isLoading) {
    isLoading = true;
    try {
      await load();
      loadedFrom = event.started_at;
    } finally {
      isLoading = false;
    }
    return;
  }
  if (!isReady || !isLoaded) return;
  if (event.remapped_at !== before?.remapped_at || event.weight_version !== before?.weight_version) {
    await Promise.all([loadInfo(), loadPrecision(), loadRemaps(), loadMapping()]);
  }
  if (event.statistics_version !== before?.statistics_version) emit("statistics");
}

async function follow() {
  for (let tries = 0; ; tries += 1) {
    try {
      await stream("dashboard/events", undefined, (event) => {
        tries = 0;
        onEvent(event).catch(() => { state.event = null; }); // the next event tries again
      }, { silenceMs: () => SILENT_INTERVALS * (state.event?.interval ?? FIRST_INTERVAL) * 1000 });
      connection = "lost";
    } catch (error) {
      connection = wantsKey(error) ? "locked" : "lost";
    }
    showHeader();
    await new Promise((resolve) => {
      connectNow = resolve;
      setTimeout(resolve, RECONNECT_MS[Math.min(tries, RECONNECT_MS.length - 1)]);
    });
  }
}

// Most of what is shown here needs the admin key.
const wantsKey = ({ type }) => ["unauthorized", "forbidden"].includes(type);

startLanguage();
askForKeys({ isWanted: wantsKey, isOnce: true });
build();
document.getElementById("language").addEventListener("click", () => setLanguage(language() === "zh" ? "en" : "zh"));
document.getElementById("theme").addEventListener("click", toggleTheme);
onLanguage(redraw);
onTheme(redraw);
showWords();
follow();
