// Asks for an API key when the server wants one. It is kept for as long as the tab is open.

import { isSendable, onLocked } from "./api.js";
import { h } from "./dom.js";
import { t } from "./i18n.js";

// isWanted(error): whether a key may help against a refusal. With `isOnce` a question that was declined is not asked
// again, for pages that try by themselves.
export function askForKeys({ isWanted = (error) => error.status === 401, isOnce = false } = {}) {
  let isDeclined = false;
  onLocked(async (why, isRefused) => {
    const key = await ask(why, isRefused);
    isDeclined = isOnce && key === null;
    return key;
  }, (error) => !isDeclined && isWanted(error));
}

// Resolves with the key, or null if there will be none. `why` is the server's own sentence; isRefused: of a key.
function ask(why, isRefused) {
  return new Promise((resolve) => {
    const input = h("input", { type: "text", class: "secret", id: "key-input", autocomplete: "off", spellcheck: "false", "aria-label": t("key") });
    let given = null;
    const close = (value) => {
      given = value;
      dialog.close();
    };
    const use = () => {
      const text = input.value.trim();
      input.setCustomValidity(!text || isSendable(text) ? "" : t("key_letters"));
      if (input.reportValidity()) close(text || null);
    };
    const leave = () => { // once the focus is back where it was: without its caret, in Chromium, so it is given again
      dialog.remove();
      const focused = document.activeElement;
      focused.blur();
      focused.focus();
      resolve(given);
    };
    const dialog = h("dialog", { class: "dialog", id: "key-dialog", "aria-labelledby": "key-title", onclose: leave },
      h("h2", { id: "key-title" }, t("key_title")),
      isRefused ? h("p", { id: "key-refused", role: "alert" }, t("key_refused")) : null,
      h("p", {}, why),
      h("label", { class: "field" }, h("span", {}, t("key")), input),
      h("p", { class: "quiet" }, t("key_kept")),
      h("div", { class: "dialog-buttons" },
        h("button", { type: "button", onclick: () => close(null) }, t("cancel")),
        h("button", { type: "button", class: "primary", id: "key-ok", onclick: use }, t("use_key"))));
    input.addEventListener("input", () => input.setCustomValidity(""));
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.isComposing) return;
      event.preventDefault(); // or what has the focus next gets a line break
      use();
    });
    document.body.append(dialog);
    dialog.showModal();
    input.focus();
  });
}
