// What went wrong with an answer, in words, and a way to try again.

import { h } from "./dom.js";
import * as format from "./format.js";
import { t } from "./i18n.js";

export function problemBox(problem, retry) {
  const button = h("button", { type: "button", class: "do-retry", onclick: retry }, t("retry"));
  return h("div", { class: "problem", role: "alert", dataset: { status: String(problem.status ?? problem.kind ?? "network") } },
    h("div", {}, h("b", {}, t(`error_${wordFor(problem)}`)), problem.text ? h("p", {}, problem.text) : null,
      problem.retryAfter ? h("p", {}, t("retry_after", format.seconds(problem.retryAfter))) : null),
    button);
}

function wordFor({ status, kind, text }) {
  if (status === 401) return "locked";
  if (status === 429) return "limit";
  if (status === 503) return "busy";
  if (kind === "cut_off") return "cut";
  return status === null && !text ? "network" : "refused";
}
