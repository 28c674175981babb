// The system prompt and the sampling of one conversation. What is left empty is the server's default, which is shown.

import { app, emit, keep, on, setDefaults } from "./app.js";
import { isContinuing } from "./chat.js";
import { fill, h } from "./dom.js";
import { onLanguage, t, tOr } from "./i18n.js";
import { icon } from "./icons.js";
import { onServer, server } from "./server.js";

// Name → the attributes of its field, the server's name for the model's own value, and what holds where the model has
// none, in a chat and in a text that is continued: what OpenAI's interface says.
const SAMPLING = {
  temperature: [{ min: "0", max: "100", step: "any" }, "temperature", "1", "1"],
  top_p: [{ min: "0.000001", max: "1", step: "any" }, "top_p", "1", "1"],
  top_k: [{ min: "0", max: "2147483647", step: "1" }, "top_k", "0", "0"],
  min_p: [{ min: "0", max: "1", step: "any" }, "min_p", "0", "0"],
  max_tokens: [{ min: "1", max: "2147483647", step: "1" }, "max_new_tokens", "as_fit", "16"],
  seed: [{ min: "0", max: "9007199254740991", step: "1" }, null, "any_seed", "any_seed"],
};

let panel;
let opener;
const fields = {}; // by the names of SAMPLING, `system` and `tools`
const shown = {}; // the value that a field was given last

export function startSettings() {
  panel = document.getElementById("settings");
  opener = document.getElementById("settings-open");
  opener.addEventListener("click", () => setShown(panel.hidden));
  panel.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    setShown(false);
    opener.focus();
  });
  build();
  on("open", show);
  on("thread", follow);
  onServer(words);
  onLanguage(words);
}

function setShown(isWanted) {
  panel.hidden = !isWanted;
  opener.setAttribute("aria-expanded", String(isWanted));
  if (isWanted) fields.system.focus();
}

function build() {
  fill(opener, icon("sliders"), h("span", { dataset: { i18n: "settings" } }));
  fields.system = h("textarea", { id: "system", rows: "5", dataset: { i18nPlaceholder: "system_hint" } });
  fields.tools = h("textarea", { id: "tools", rows: "6", spellcheck: "false", class: "mono" });
  for (const [name, [attributes]] of Object.entries(SAMPLING)) {
    fields[name] = h("input", { type: "number", id: `set-${name}`, inputmode: "decimal", ...attributes });
  }
  for (const [name, field] of Object.entries(fields)) field.addEventListener("change", () => read(name));
  const close = h("button", { type: "button", class: "ghost", dataset: { i18nLabel: "close" }, onclick: () => { setShown(false); opener.focus(); } }, icon("close"));
  fill(panel,
    h("div", { class: "panel-title" }, h("h2", { dataset: { i18n: "settings" } }), close),
    h("p", { class: "quiet", dataset: { i18n: "settings_hint" } }),
    labelled("system_prompt", fields.system),
    h("div", { class: "pairs" }, Object.keys(SAMPLING).map((name) => labelled(name, fields[name]))),
    labelled("tools", fields.tools, h("small", { class: "quiet", dataset: { i18n: "tools_hint" } })),
    h("div", { class: "row" },
      h("button", { type: "button", dataset: { i18n: "use_for_new" }, onclick: forNew }),
      h("button", { type: "button", dataset: { i18n: "reset" }, onclick: reset })));
}

function labelled(word, field, hint = null) {
  return h("label", { class: "field" }, h("span", { dataset: { i18n: word } }), field, hint);
}

const stored = (name) => String((name in SAMPLING ? app.current.sampling[name] : app.current[name]) ?? "");

function show() {
  for (const name of Object.keys(fields)) give(name);
  words();
}

function give(name) {
  shown[name] = fields[name].value = stored(name);
}

// What another tab has changed is shown, but not in the place of what is being written.
function follow() {
  for (const name of Object.keys(fields)) if (stored(name) !== shown[name] && fields[name] !== document.activeElement) give(name);
  check();
}

function words() {
  const defaults = server.info?.sampling_defaults;
  for (const [name, [, byModel, inChat, inText]] of Object.entries(SAMPLING)) {
    const isModels = defaults?.from_model.includes(byModel) && !(isContinuing() && name === "max_tokens");
    const value = isModels ? String(defaults[byModel]) : isContinuing() ? inText : inChat;
    fields[name].placeholder = server.info || byModel === null ? tOr(value, value) : "";
  }
  check();
}

// Marks what cannot be sent; true if all can.
function check() {
  let isList = true;
  try {
    isList = !fields.tools.value.trim() || Array.isArray(JSON.parse(fields.tools.value));
  } catch {
    isList = false;
  }
  fields.tools.setCustomValidity(isList ? "" : t("tools_wrong"));
  return Object.values(fields).every((field) => field.checkValidity());
}

// Before sending: opens the settings at the first field that cannot be sent.
export function checkSettings() {
  if (check()) return true;
  setShown(true);
  Object.values(fields).find((field) => !field.checkValidity()).reportValidity();
  return false;
}

// Keeps what has been written into a field.
function read(name) {
  check();
  const field = fields[name];
  const { sampling } = app.current;
  if (!(name in SAMPLING)) app.current[name] = field.value;
  else if (!field.checkValidity()) return;
  else if (field.value === "") delete sampling[name];
  else sampling[name] = Number(field.value);
  shown[name] = stored(name);
  keep(app.current);
}

function forNew() {
  setDefaults(app.current);
  emit("toast", { word: "used_for_new" });
}

function reset() {
  Object.assign(app.current, { system: "", tools: "", sampling: {} });
  show();
  keep(app.current);
}
