// The frame around every panel.

import { h } from "../dom.js";

export function frame(id, title, hint, body, { tools = [], wide = "" } = {}) {
  return h("section", { id, class: `panel ${wide}` },
    h("div", { class: "panel-head" },
      h("h2", { dataset: { i18n: title } }),
      hint ? h("p", { dataset: { i18n: hint } }) : null,
      h("div", { class: "panel-tools" }, tools)),
    h("div", { class: "panel-body" }, body));
}

export function select(onChange, attributes = {}) {
  return h("select", { onchange: onChange, ...attributes });
}

export function control(label, node) {
  return h("label", { class: "field" }, h("span", { dataset: { i18n: label } }), node);
}

export function note(text) {
  return h("p", { class: "note" }, text);
}
