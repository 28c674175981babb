// The page's language. Each page has its words in a `words.js` of its own, which is served beside this file.

import { COMMON } from "./common.js";
import { WORDS } from "./words.js";

const KEY = "amalgam.language";
const listeners = [];
let current = "en";

function stored() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null; // storage may be switched off
  }
}

export function language() {
  return current;
}

// {0} is the first value; {0|expert|experts} is a word for one thing or for another number of them.
export function t(key, ...values) {
  const text = (WORDS[key] ?? COMMON[key])?.[current === "zh" ? 1 : 0] ?? key;
  return text.replace(/\{(\d)(?:\|([^|}]*)\|([^|}]*))?\}/g, (_, index, one, many) => {
    if (one === undefined) return values[index] ?? "";
    return String(values[index]) === "1" ? one : many;
  });
}

// The word for something that may have none, such as a server's own words.
export function tOr(key, text) {
  return key in WORDS || key in COMMON ? t(key) : text;
}

export function setLanguage(choice, isChosen = true) {
  current = choice === "zh" ? "zh" : "en";
  if (isChosen) {
    try {
      localStorage.setItem(KEY, current);
    } catch {
      // remembered for as long as the page is open
    }
  }
  document.documentElement.lang = current === "zh" ? "zh-CN" : "en";
  for (const listener of listeners) listener();
}

export function onLanguage(listener) {
  listeners.push(listener);
}

export function startLanguage() {
  const preferred = navigator.languages?.[0] ?? navigator.language ?? "en";
  setLanguage(stored() ?? (preferred.toLowerCase().startsWith("zh") ? "zh" : "en"), false);
}

// Gives the elements of the page their words: what they hold, what they are called, and what stands in an empty field.
export function translate(root = document) {
  for (const node of root.querySelectorAll("[data-i18n]")) node.textContent = t(node.dataset.i18n);
  for (const node of root.querySelectorAll("[data-i18n-label]")) {
    node.setAttribute("aria-label", t(node.dataset.i18nLabel));
    node.title = t(node.dataset.i18nLabel);
  }
  for (const node of root.querySelectorAll("[data-i18n-placeholder]")) node.placeholder = t(node.dataset.i18nPlaceholder);
}
