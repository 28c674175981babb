// The system prompt and the sampling of one conversation. What is left empty is the server's default, which is shown.

import { app, emit, keep, on, setDefaults } from "./app.js";
import { fill, h } from "./dom.js";
import { onLanguage, t } from "./i18n.js";
import { icon } from "./icons.js";
import { onServer, server } from "./server.js";

// Name → the attributes of its field, and the server's name for its default.
const SAMPLING = {
  temperature: [{ min: "0", max: "100", step: "any" }, "temperature"],
  top_p: [{ min: "0.000001", max: "1", step: "any" }, "top_p"],
  top_k: [{ min: "0", max: "2147483647", step: "1" }, "top_k"],
  min_p: [{ min: "0", max: "1", step: "any" }, "min_p"],
  max_tokens: [{ min: "1", max: "2147483647", step: "1" }, "max_new_tokens"],
  seed: [{ min: "0", max: "9007199254740991", step: "1" }, null],
};

let panel;
let opener;
const fields = {};

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
  onServer(show);
  onLanguage(() => { build(); show(); });
}

function setShown(isWanted) {
  panel.hidden = !isWanted;
  opener.setAttribute("aria-expanded", String(isWanted));
  if (isWanted) fields.system.focus();
}

function build() {
  fill(opener, icon("sliders"), h("span", {}, t("settings")));
  fields.system = h("textarea", { id: "system", rows: "5", placeholder: t("system_hint"), onchange: read });
  fields.tools = h("textarea", { id: "tools", rows: "6", spellcheck: "false", class: "mono", onchange: read });
  for (const [name, [attributes]] of Object.entries(SAMPLING)) {
    fields[name] = h("input", { type: "number", id: `set-${name}`, inputmode: "decimal", ...attributes, onchange: read });
  }
  const close = h("button", { type: "button", class: "ghost", "aria-label": t("close"), title: t("close"), onclick: () => { setShown(false); opener.focus(); } }, icon("close"));
  fill(panel,
    h("div", { class: "panel-title" }, h("h2", {}, t("settings")), close),
    h("p", { class: "quiet" }, t("settings_hint")),
    labelled("system_prompt", fields.system),
    h("div", { class: "pairs" }, Object.keys(SAMPLING).map((name) => labelled(name, fields[name]))),
    labelled("tools", fields.tools, h("small", { class: "quiet" }, t("tools_hint"))),
    h("div", { class: "row" },
      h("button", { type: "button", onclick: forNew }, t("use_for_new")), h("button", { type: "button", onclick: reset }, t("reset"))));
}

function labelled(word, field, hint = null) {
  return h("label", { class: "field" }, h("span", {}, t(word)), field, hint);
}

function show() {
  const { system, sampling, tools } = app.current;
  fields.system.value = system;
  fields.tools.value = tools;
  for (const [name, [, byServer]] of Object.entries(SAMPLING)) {
    fields[name].value = sampling[name] ?? "";
    fields[name].placeholder = byServer === null ? t("any_seed") : String(server.info?.sampling_defaults?.[byServer] ?? "");
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
  read();
  if (check()) return true;
  setShown(true);
  Object.values(fields).find((field) => !field.checkValidity()).reportValidity();
  return false;
}

function read() {
  const conversation = app.current;
  const before = JSON.stringify([conversation.system, conversation.tools, conversation.sampling]);
  check();
  conversation.system = fields.system.value;
  conversation.tools = fields.tools.value;
  for (const name of Object.keys(SAMPLING)) {
    if (fields[name].value === "" && !fields[name].validity.badInput) delete conversation.sampling[name];
    else if (fields[name].checkValidity()) conversation.sampling[name] = Number(fields[name].value);
  }
  if (JSON.stringify([conversation.system, conversation.tools, conversation.sampling]) !== before) keep(conversation);
}

function forNew() {
  read();
  setDefaults(app.current);
  emit("toast", { word: "used_for_new" });
}

function reset() {
  Object.assign(app.current, { system: "", tools: "", sampling: {} });
  show();
  keep(app.current);
}
