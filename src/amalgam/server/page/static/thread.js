// The messages of the branch that is shown. A growing answer is written at most once per frame, and seldom enough that
// the page has most of the time for other things, however long it has become.

import { app, isAnswering, on } from "./app.js";
import { suggest } from "./composer.js";
import { fill, h } from "./dom.js";
import { onLanguage, t } from "./i18n.js";
import { icon } from "./icons.js";
import { messageView } from "./message.js";
import { onServer, server } from "./server.js";
import { onTheme } from "./theme.js";
import { path } from "./tree.js";

const BUSY_FACTOR = 9; // writing takes at most a tenth of the time
const NEAR = 60; // pixels from the end: there the page follows what is written
const SUGGESTIONS = ["suggest_explain", "suggest_code", "suggest_table", "suggest_story"];

let views = [];
let frame = null;
let nextAt = 0;
let isFollowing = true;

const element = (id) => document.getElementById(id);

export function startThread() {
  const scroller = element("scroller");
  scroller.addEventListener("scroll", () => {
    isFollowing = scroller.scrollTop + scroller.clientHeight >= scroller.scrollHeight - NEAR;
    element("to-end").hidden = isFollowing;
  });
  element("to-end").append(icon("down"));
  element("to-end").addEventListener("click", toEnd);
  new ResizeObserver(() => { if (isFollowing) toEnd(); }).observe(element("thread"));
  on("open", () => { show(); toEnd(); });
  on("thread", ({ hasGrown, finished } = {}) => {
    show();
    if (hasGrown) toEnd();
    if (finished) element("thread").setAttribute("aria-busy", "false");
  });
  on("grown", (run) => {
    frame ??= requestAnimationFrame(() => write(run));
  });
  onLanguage(redraw);
  onTheme(() => {
    for (const view of views) view.repaint?.();
    show();
  });
  onServer(show);
}

function redraw() {
  views = [];
  show();
}

function toEnd() {
  isFollowing = true;
  element("to-end").hidden = true;
  element("scroller").scrollTop = element("scroller").scrollHeight;
}

// Brings the views to what the conversation holds; those that are there already stay.
function show() {
  cancelAnimationFrame(frame);
  frame = null;
  if (!app.current) return;
  const before = new Map(views.map((view) => [view.message, view]));
  const messages = path(app.current);
  views = messages.map((message) => {
    const view = before.get(message);
    if (!view) return messageView(message);
    view.update();
    return view;
  });
  const nodes = views.map((view) => view.node);
  const thread = element("thread");
  if (thread.childNodes.length !== nodes.length || nodes.some((node, index) => node !== thread.childNodes[index])) fill(thread, nodes);
  thread.setAttribute("aria-busy", String(isAnswering(app.current.id)));
  welcome(!messages.length);
  views.forEach((view, index) => view.settle(index === views.length - 1));
}

function write(run) {
  const begun = performance.now();
  frame = null;
  if (begun < nextAt) {
    frame = requestAnimationFrame(() => write(app.running.get(app.current.id) ?? run));
    return;
  }
  const view = views.at(-1);
  if (view?.message !== app.running.get(app.current.id)?.node) return;
  view.grow(app.running.get(app.current.id));
  if (isFollowing) toEnd(); // lays the text out
  const now = performance.now();
  nextAt = now + BUSY_FACTOR * (now - begun);
}

function welcome(isShown) {
  const section = element("welcome");
  section.hidden = !isShown;
  if (!isShown) return;
  fill(section,
    h("img", { src: new URL("./icon.svg", import.meta.url), alt: "", width: "48", height: "48" }),
    h("h2", {}, t("welcome")),
    h("p", { class: "quiet" }, t("welcome_text", server.model || t("this_server"))),
    h("div", { class: "suggestions" }, SUGGESTIONS.map((word) => h("button", { type: "button", class: "suggestion", onclick: () => suggest(t(word)) }, t(word)))));
}
