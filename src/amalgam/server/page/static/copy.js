// A button that copies a text and says so.

import { h } from "./dom.js";
import { t } from "./i18n.js";
import { icon } from "./icons.js";

const SHOWN_MS = 1500;

export function copyButton(text, attributes = {}) {
  const word = h("span", {}, t("copy"));
  const button = h("button", { type: "button", class: "ghost copy", title: t("copy"), onclick: run, ...attributes }, icon("copy"), word);
  let timer = null;

  async function run() {
    const isCopied = await copy(text());
    word.textContent = t(isCopied ? "copied" : "copy_failed");
    button.dataset.state = isCopied ? "copied" : "failed";
    clearTimeout(timer);
    timer = setTimeout(() => {
      word.textContent = t("copy");
      delete button.dataset.state;
    }, SHOWN_MS);
  }

  return button;
}

// Browsers give the clipboard only to secure pages; from another one, a selection can still be copied.
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = h("textarea", { class: "unseen preformatted", value: text, readonly: true, "aria-hidden": "true" });
    const before = document.activeElement;
    document.body.append(field);
    field.select();
    const isCopied = document.execCommand("copy");
    field.remove();
    before?.focus();
    return isCopied;
  }
}
