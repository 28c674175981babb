// What begins a canary or a shadow: the candidate, its share of the requests, and the limits of its checks.

import { h, setOptions } from "../dom.js";
import { control, select } from "./panel.js";

// Field → what the server's unit is multiplied with: shares are written in percent.
const FIELDS = {
  canary: { share: 100, min_requests: 1, max_error_increase: 100, max_slowdown: 1 },
  shadow: { share: 100, min_requests: 1, max_divergence: 1, min_agreement: 100, max_slowdown: 1 },
};

// begin(body, button): asks the server for it.
export function createTrialForm(kind, begin) {
  const candidate = select(undefined, { id: `${kind}-weights` });
  const automatic = h("input", { type: "checkbox", id: `${kind}-automatic` });
  const inputs = Object.keys(FIELDS[kind]).map((name) => [name, h("input", { class: "short", type: "number", min: 0, step: "any", id: `${kind}-${name}` })]);
  const button = h("button", { class: "primary", id: `${kind}-begin`, dataset: { i18n: `trial_begin_${kind}` } });
  const form = h("form", { onsubmit: submit },
    h("div", { class: "stage-form" },
      control("trial_candidate", candidate),
      inputs.map(([name, input]) => h("label", { class: "field" }, h("span", { dataset: { i18n: `trial_field_${name}` } }), input)),
      h("label", { class: "check" }, automatic, h("span", { dataset: { i18n: "trial_carry_out" } })),
      button),
    h("p", { class: "figures", dataset: { i18n: "trial_defaults" } }));
  const none = h("p", { class: "figures", dataset: { i18n: "trial_no_candidate" } });

  function submit(event) {
    event.preventDefault();
    const given = inputs.filter(([, input]) => input.value !== "").map(([name, input]) => [name, Number(input.value) / FIELDS[kind][name]]);
    begin({ weights: candidate.value, automatic: automatic.checked, ...Object.fromEntries(given) }, button);
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
