// A sentence at the edge of the page for a while, perhaps with a way back.

import { on } from "./app.js";
import { h } from "./dom.js";
import { t } from "./i18n.js";

const SHOWN_MS = 6000;

// {word, values, undo}
export function startToasts() {
  on("toast", ({ word, values = [], undo }) => {
    const node = h("div", { class: "toast" }, h("span", {}, t(word, ...values)));
    const close = () => {
      const hasFocus = node.contains(document.activeElement);
      node.remove();
      if (hasFocus) document.getElementById("scroller").focus();
    };
    if (undo) node.append(h("button", { type: "button", class: "ghost", onclick: () => { undo(); close(); } }, t("undo")));
    document.getElementById("toasts").append(node);
    const held = new Set(); // by what: then it stays
    let timer = setTimeout(close, SHOWN_MS);
    const hold = (what) => () => {
      held.add(what);
      clearTimeout(timer);
    };
    const release = (what) => () => {
      held.delete(what);
      clearTimeout(timer);
      if (!held.size) timer = setTimeout(close, SHOWN_MS);
    };
    node.addEventListener("pointerenter", hold("pointer"));
    node.addEventListener("pointerleave", release("pointer"));
    node.addEventListener("focusin", hold("focus"));
    node.addEventListener("focusout", release("focus"));
  });
}
