// What begins a canary or a shadow: the candidate, its share of the requests, and the limits of its checks.

import { h, setOptions } from "../dom.js";
import { control, numberOf, select } from "./panel.js";

const FIELDS = {
  canary: ["share", "min_requests", "max_error_increase", "max_slowdown"],
  shadow: ["share", "min_requests", "max_divergence", "min_agreement", "max_slowdown"],
};
const SHARES = ["share", "max_error_increase", "min_agreement"]; // written in percent

// begin(bodyOf, button): asks the server for what `bodyOf()` gives, which fails where a field cannot be sent.
export function createTrialForm(kind, begin) {
  const candidate = select(undefined, { id: `${kind}-weights` });
  const automatic = h("input", { type: "checkbox", id: `${kind}-automatic` });
  const inputs = FIELDS[kind].map((name) => [name, h("input", {
    class: "short", type: "number", min: 0, max: SHARES.includes(name) ? 100 : null, step: "any", id: `${kind}-${name}`,
  })]);
  const button = h("button", { class: "primary", id: `${kind}-begin`, dataset: { i18n: `trial_begin_${kind}` } });
  const form = h("form", { onsubmit: submit, novalidate: true }, // which would be told in the browser's language
    h("div", { class: "stage-form" },
      control("trial_candidate", candidate),
      inputs.map(([name, input]) => h("label", { class: "field" }, h("span", { dataset: { i18n: `trial_field_${name}` } }), input)),
      h("label", { class: "check" }, automatic, h("span", { dataset: { i18n: "trial_carry_out" } })),
      button),
    h("p", { class: "figures", dataset: { i18n: "trial_defaults" } }));
  const none = h("p", { class: "figures", dataset: { i18n: "trial_no_candidate" } });

  function submit(event) {
    event.preventDefault();
    begin(body, button);
  }

  function body() {
    const given = inputs.map(([name, input]) => [name, numberOf(input)]).filter(([, value]) => value !== undefined);
    const fields = given.map(([name, value]) => [name, SHARES.includes(name) ? value / 100 : value]);
    return { weights: candidate.value, automatic: automatic.checked, ...Object.fromEntries(fields) };
  }

  // versions: those that can be tried; null: nothing can be begun now.
  function offer(versions) {
    none.hidden = versions === null || versions.length > 0;
    form.hidden = !versions?.length;
    setOptions(candidate, (versions ?? []).map((item) => [item.version, [`v${item.version}`, ...item.names].join(" · ")]));
  }

  offer(null);
  return { node: h("div", {}, form, none), offer };
}
