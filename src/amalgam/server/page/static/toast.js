// A sentence at the edge of the page for a while, perhaps with a way back.

import { on } from "./app.js";
import { h } from "./dom.js";
import { t } from "./i18n.js";

const SHOWN_MS = 6000;

// {word, values, undo}
export function startToasts() {
  on("toast", ({ word, values = [], undo }) => {
    const node = h("div", { class: "toast" }, h("span", {}, t(word, ...values)));
    const close = () => node.remove();
    if (undo) node.append(h("button", { type: "button", class: "ghost", onclick: () => { undo(); close(); } }, t("undo")));
    document.getElementById("toasts").append(node);
    let timer = setTimeout(close, SHOWN_MS);
    node.addEventListener("pointerenter", () => clearTimeout(timer));
    node.addEventListener("pointerleave", () => { timer = setTimeout(close, SHOWN_MS); });
  });
}
