// Where a message is written: Enter sends, but not the Enter that ends the input of a Chinese word.

import { app, isAnswering, on, stop } from "./app.js";
import { say } from "./answering.js";
import { fill } from "./dom.js";
import { onLanguage, t } from "./i18n.js";
import { icon } from "./icons.js";

const drafts = new Map(); // conversation id → what has been written
const MAX_HEIGHT = 240;

let prompt;
let button;
let shown = null; // the id of the conversation that the text belongs to

export function startComposer() {
  prompt = document.getElementById("prompt");
  button = document.getElementById("send");
  prompt.addEventListener("input", () => { fit(prompt); words(); });
  prompt.addEventListener("keydown", (event) => {
    if (isEnter(event)) {
      event.preventDefault();
      if (!isRunning()) send();
    }
  });
  document.getElementById("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (isRunning()) stop(app.current);
    else send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return; // meant for others
    if (isRunning()) stop(app.current);
  });
  on("open", change);
  on("thread", words);
  onLanguage(words);
}

// Enter that is meant to send.
export function isEnter(event) {
  return event.key === "Enter" && !event.shiftKey && !event.altKey && !event.isComposing && event.keyCode !== 229;
}

export function fit(area) {
  area.style.setProperty("height", "auto");
  area.style.setProperty("height", `${Math.min(area.scrollHeight + 2, MAX_HEIGHT)}px`);
}

export function suggest(text) {
  prompt.value = text;
  fit(prompt);
  prompt.focus();
  words();
}

const isRunning = () => isAnswering(app.current?.id);

function change({ keepsText = false } = {}) {
  if (shown !== null) drafts.set(shown, prompt.value);
  shown = app.current.id;
  if (!keepsText) prompt.value = drafts.get(shown) ?? "";
  fit(prompt);
  words();
}

function words() {
  const word = isRunning() ? "stop" : "send";
  if (button.dataset.word !== word) fill(button, icon(word));
  button.dataset.word = word;
  button.title = t(word);
  button.setAttribute("aria-label", t(word));
  button.disabled = !isRunning() && !prompt.value.trim();
}

function send() {
  if (!prompt.value.trim() || !say(app.current, prompt.value)) return;
  prompt.value = "";
  fit(prompt);
  prompt.focus();
}
