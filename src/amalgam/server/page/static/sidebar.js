// The list of conversations: search, rename, delete, and files to take them along.

import { app, discard, emit, isAnswering, keep, on, open, openNew, restore } from "./app.js";
import { fill, h } from "./dom.js";
import { onLanguage, t } from "./i18n.js";
import { icon } from "./icons.js";
import { download, fromFile, toFile, TransferError } from "./transfer.js";
import { matches, MAX_TITLE } from "./tree.js";

const DAY = 86400000;
const element = (id) => document.getElementById(id);
const isNarrow = () => matchMedia("(max-width: 760px)").matches;

let renaming = null; // the id of the conversation whose title is being edited

export function startSidebar() {
  element("new").addEventListener("click", () => { openNew(); leave(); element("prompt").focus(); });
  element("search").addEventListener("input", show);
  element("search").addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !element("search").value) return;
    event.preventDefault(); // that is what it was for
    element("search").value = "";
    show();
  });
  element("side-open").append(icon("menu"));
  element("side-close").append(icon("close"));
  element("side-open").addEventListener("click", toggle);
  element("side-close").addEventListener("click", leave);
  element("veil").addEventListener("click", leave);
  element("export").addEventListener("click", () => download("amalgam-conversations.json", toFile(sorted())));
  element("import").addEventListener("click", () => element("import-file").click());
  element("import-file").addEventListener("change", read);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented || !isNarrow() || !isShown()) return;
    event.preventDefault();
    leave();
  });
  on("list", show);
  onLanguage(words);
  words();
  setShown(!isNarrow());
  matchMedia("(max-width: 760px)").addEventListener("change", () => setShown(!isNarrow()));
}

function words() {
  fill(element("new"), icon("plus"), h("span", {}, t("new_chat")));
  fill(element("to-dashboard"), icon("chart"), h("span", {}, t("dashboard")));
  show();
}

const isShown = () => document.documentElement.dataset.side === "shown";

function setShown(isWanted) {
  document.documentElement.dataset.side = isWanted ? "shown" : "hidden";
  element("sidebar").inert = !isWanted;
  element("veil").hidden = !isWanted || !isNarrow();
  element("side-open").setAttribute("aria-expanded", String(isWanted));
}

function toggle() {
  setShown(!isShown());
  if (isShown() && isNarrow()) element("side-close").focus();
}

function leave() {
  if (isNarrow()) setShown(false);
}

const sorted = () => [...app.conversations.values()].sort((a, b) => b.updatedAt - a.updatedAt);

function show() {
  if (renaming !== null) return; // until it is done: what is being typed stays
  const words = element("search").value;
  const found = sorted().filter((conversation) => matches(conversation, words));
  const groups = new Map();
  for (const conversation of found) {
    const word = dayOf(conversation.updatedAt);
    if (!groups.has(word)) groups.set(word, []);
    groups.get(word).push(conversation);
  }
  fill(element("list"), [...groups].map(([word, rows]) => [h("h2", {}, t(`day_${word}`)), h("ul", {}, rows.map(entry))]));
  if (!found.length) element("list").append(h("p", { class: "quiet" }, t(words ? "nothing_found" : "no_conversations")));
}

function dayOf(at) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (at >= midnight) return "today";
  if (at >= midnight - DAY) return "yesterday";
  return at >= midnight - 7 * DAY ? "week" : "earlier";
}

function entry(conversation) {
  const isCurrent = conversation.id === app.current?.id;
  const title = conversation.title || t("untitled");
  const name = h("button", {
    type: "button", class: "entry-title", title, "aria-current": isCurrent ? "true" : null,
    onclick: () => { open(conversation.id); leave(); }, ondblclick: () => rename(conversation, row),
  }, isAnswering(conversation.id) ? h("i", { class: "pulse", title: t("running") }) : null, h("span", {}, title));
  const row = h("li", { class: "entry", dataset: { id: conversation.id } }, name,
    tool("edit", "rename", title, () => rename(conversation, row)), tool("trash", "delete", title, () => drop(conversation)));
  return row;
}

function tool(name, word, title, onclick) {
  return h("button", { type: "button", class: `ghost entry-${word}`, title: t(word), "aria-label": `${t(word)}: ${title}`, onclick }, icon(name));
}

function rename(conversation, row) {
  const field = h("input", { type: "text", class: "entry-name", value: conversation.title, maxlength: String(MAX_TITLE), "aria-label": t("rename") });
  const done = (isKept) => {
    if (renaming !== conversation.id) return;
    renaming = null;
    if (isKept && field.value.trim()) {
      conversation.title = field.value.trim();
      keep(conversation);
    }
    show();
  };
  renaming = conversation.id;
  field.addEventListener("blur", () => done(true));
  field.addEventListener("keydown", (event) => {
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Enter") done(true);
    if (event.key === "Escape") done(false);
    event.stopPropagation();
  });
  fill(row, field);
  field.focus();
  field.select();
}

function drop(conversation) {
  const isCurrent = conversation.id === app.current.id;
  discard(conversation);
  emit("toast", { word: "deleted", undo: () => {
    restore(conversation);
    if (isCurrent) open(conversation.id);
  } });
}

async function read() {
  const [file] = element("import-file").files;
  element("import-file").value = "";
  if (!file) return;
  try {
    const found = fromFile(await file.text());
    for (const conversation of found) await keep(conversation);
    emit("toast", { word: "imported", values: [found.length] });
  } catch (error) {
    if (!(error instanceof TransferError)) throw error;
    emit("toast", { word: error.message });
  }
}
