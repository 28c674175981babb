// Puts the page together.

import { app, emit, on, start } from "./app.js";
import { isContinuing } from "./chat.js";
import { startComposer } from "./composer.js";
import { fill, h } from "./dom.js";
import { language, onLanguage, setLanguage, startLanguage, t, translate } from "./i18n.js";
import { icon } from "./icons.js";
import { askForKeys } from "./key.js";
import { look, onServer, server } from "./server.js";
import { startSettings } from "./settings.js";
import { startSidebar } from "./sidebar.js";
import { isLasting } from "./store.js";
import { toggleTheme } from "./theme.js";
import { startThread } from "./thread.js";
import { startToasts } from "./toast.js";

const BANNERS = ["loading", "draining", "failed", "disconnected"];
const element = (id) => document.getElementById(id);

function words() {
  translate();
  showServer();
  showTitle();
}

function showTitle() {
  document.title = [app.current?.title, t("title")].filter(Boolean).join(" · ");
}

function showServer() {
  element("model").textContent = server.model;
  element("model").title = server.model;
  element("version").textContent = server.version ? t("weight_version", server.version) : "";
  const badge = element("status");
  badge.dataset.status = server.status;
  badge.lastElementChild.textContent = t(`status_${server.status}`);
  const word = BANNERS.includes(server.status) ? server.status : isContinuing() ? "continuing" : null;
  element("banner").hidden = word === null;
  element("banner").dataset.word = word ?? "";
  fill(element("banner"), word ? t(`banner_${word}`) : null);
  document.documentElement.dataset.loaded = String(server.status !== "connecting" && Boolean(app.current));
}

startLanguage();
askForKeys();
element("theme").append(icon("theme"));
element("language").addEventListener("click", () => setLanguage(language() === "zh" ? "en" : "zh"));
element("theme").addEventListener("click", toggleTheme);
startToasts();
startSidebar();
startSettings();
startComposer();
startThread();
onLanguage(words);
onServer(showServer);
on("open", showTitle);
on("list", showTitle);
on("thread", ({ finished } = {}) => { element("said").textContent = finished ? t("answer_ready") : ""; });
document.body.append(h("p", { id: "said", class: "unseen", role: "status" }));
await start();
words();
if (!isLasting) emit("toast", { word: "not_kept" });
element("prompt").focus();
look();
