// The frame around every panel.

import { on } from "../app.js";
import { h } from "../dom.js";
import { t } from "../i18n.js";

export function frame(id, title, hint, body, { tools = [], wide = "" } = {}) {
  return h("section", { id, class: `panel ${wide}` },
    h("div", { class: "panel-head" },
      h("h2", { dataset: { i18n: title } }),
      hint ? h("p", { dataset: { i18n: hint } }) : null,
      h("div", { class: "panel-tools" }, tools)),
    h("div", { class: "panel-body" }, body));
}

// Another line below the title, for a panel that shows more than one thing.
export function caption(node, word) {
  const line = node.querySelector(".panel-head p");
  line.dataset.i18n = word;
  line.textContent = t(word);
}

// Puts one sentence, the word `reason`, in place of what a panel shows, but for parts that are `always` there; null:
// shows it again.
export function explainEmpty(node, reason) {
  const body = node.querySelector(".panel-body");
  body.querySelector(":scope > .panel-empty")?.remove();
  node.classList.toggle("is-empty", reason !== null);
  if (reason !== null) body.prepend(h("p", { class: "note panel-empty", dataset: { i18n: reason } }, t(reason)));
}

// Reads a panel again when the statistics have changed, at most every `everyMs`; the last change is never left out.
export function followStatistics(panel, everyMs) {
  const { refresh } = panel;
  let last = -Infinity;
  let timer = null;
  panel.refresh = async () => {
    last = performance.now();
    await refresh();
  };
  on("statistics", () => {
    timer ??= setTimeout(() => {
      timer = null;
      if (panel.isVisible && !document.hidden) panel.refresh().catch(() => {});
      else panel.isDirty = true;
    }, Math.max(0, last + everyMs - performance.now()));
  });
  return panel;
}

export function select(onChange, attributes = {}) {
  return h("select", { onchange: onChange, ...attributes });
}

export function control(label, node) {
  return h("label", { class: "field" }, h("span", { dataset: { i18n: label } }), node);
}

// What a field for numbers holds; undefined: nothing. What cannot be sent is an error in the field's own words and unit.
export function numberOf(input) {
  const { validity, value, min, max } = input;
  const name = input.labels[0]?.textContent || input.getAttribute("aria-label");
  if (validity.badInput) throw new Error(t("not_a_number", name));
  if (validity.rangeOverflow) throw new Error(t("at_most", name, value, max));
  if (validity.rangeUnderflow) throw new Error(t("at_least", name, value, min));
  return value === "" ? undefined : Number(value);
}

export function note(text) {
  return h("p", { class: "note" }, text);
}
