// The chosen expert: its use, and where each of its projections comes from. Below it, the server's hints.

import { choose, emit, getStatistics, on, state } from "../app.js";
import { fill, h, table } from "../dom.js";
import * as format from "../format.js";
import { language, t } from "../i18n.js";
import { followStatistics, frame, note } from "./panel.js";

const HINTS_MS = 15000;

export function create() {
  return [expertPanel(), hintsPanel()];
}

function expertPanel() {
  const body = h("div", { id: "expert-card" });
  const node = frame("expert", "expert_title", null, body, { wide: "side" });
  let answer = null;

  async function refresh() {
    const { chosen } = state;
    if (chosen) answer = await getStatistics("dashboard/expert", { layer_id: chosen.layerId, expert_id: chosen.expertId });
    redraw();
  }

  function redraw() {
    fill(body, answer ? card(answer) : note(t("expert_none")));
  }

  const panel = { id: "expert", node, refresh, redraw, needsStatistics: true };
  const reload = () => { panel.refresh().catch((error) => fill(body, h("div", { class: "panel-error", role: "alert" }, error.message))); };
  on("chosen", reload);
  on("precision", () => answer && reload());
  on("grid", () => answer && reload());
  return panel;
}

function card(expert) {
  const { use, projections } = expert;
  const total = projections.reduce((sum, item) => sum + item.bytes, 0);
  return [
    h("h3", {}, t("cell_name", expert.layer_id, expert.expert_id)),
    use ? h("dl", { class: "facts" },
      fact(t("activations"), format.number(use.activations),
        t("prompt_generated", format.short(use.prompt_activations), format.short(use.generated_activations))),
      fact(t("share_of_layer"), format.percent(use.share), t("of_even", format.times(use.share * expert.num_experts))),
      fact(t("rank"), use.activations ? t("rank_of", use.rank, expert.num_experts) : format.number(null)),
      fact(t("gate_mass"), format.short(use.gate_mass),
        use.activations ? t("mean_gate", format.short(use.gate_mass / use.activations)) : ""),
      fact(t("decaying_rate"), t("per_second", format.short(use.decaying_rate)),
        t("half_life", format.number(state.statistics.half_life_minutes, 1))),
      fact(t("last_activation"), use.last_activation ? format.clock(use.last_activation) : t("never")),
      fact(t("in_memory"), format.bytes(total), Object.keys(state.info?.devices ?? {}).length > 1 ? t("on_device", projections[0].device) : "")) : null,
    table([t("projection"), t("source"), t("format"), t("bits"), t("size")], projections.map((item) =>
      h("tr", {}, h("td", { title: item.name }, item.projection), h("td", { title: reasonText(item.reason) }, item.source), h("td", {}, item.format),
        h("td", { class: "num" }, format.number(item.bits, 2)), h("td", { class: "num" }, format.bytes(item.bytes))))),
    h("div", { class: "buttons" },
      h("button", { type: "button", onclick: () => { emit("stage-expert", expert); jump("precision"); } }, t("stage_this")),
      h("button", { type: "button", onclick: () => { emit("show-coactivation", expert); jump("coactivation"); } }, t("show_coactivation"))),
  ];
}

// Why a weight comes from its source, as the plan says it.
function reasonText(reason) {
  const [, kind, pattern] = reason.match(/^(exact name|pattern|no rule)\b ?(.*)$/s) ?? [];
  if (kind === "exact name") return t("reason_exact");
  if (kind === "pattern") return t("reason_pattern", pattern);
  return kind === "no rule" ? t("reason_default") : reason;
}

function fact(name, value, detail = "") {
  return h("div", {}, h("dt", {}, name), h("dd", {}, h("b", {}, value), detail ? h("small", {}, detail) : null));
}

function jump(id) {
  document.getElementById(id).scrollIntoView({ block: "start" });
}

function hintsPanel() {
  const body = h("ul", { class: "hints", id: "hint-list" });
  const count = h("span", { class: "badge", id: "hint-count", hidden: true }); // the list may be longer than what is in view
  const node = frame("hints", "hints", null, body, { tools: [count], wide: "side" });
  let answer = null;

  async function refresh() {
    answer = await getStatistics("experts/hints");
    redraw();
  }

  function redraw() {
    if (!answer) return;
    const { hints, tokens, min_tokens: minTokens } = answer;
    count.hidden = !hints.length;
    count.textContent = hints.length;
    const none = tokens < minTokens ? t("hints_wait", format.number(minTokens), format.number(tokens)) : t("no_hints");
    fill(body, hints.length ? hints.map(hint) : h("li", { class: "note" }, none));
  }

  return followStatistics({ id: "hints", node, refresh, redraw, dirtyOn: ["precision"], needsStatistics: true }, HINTS_MS);
}

function hint(item) {
  const text = language() === "zh" ? item.text_zh ?? item.text : item.text;
  const content = [h("i", { class: "dot" }), h("span", {}, text)];
  const follow = whereTo(item);
  return h("li", { dataset: { severity: item.severity, kind: item.kind } },
    follow ? h("button", { type: "button", class: "plain", onclick: follow }, content) : h("div", { class: "plain" }, content));
}

// What a click on a hint shows: the comparison it speaks of, its expert, its list of experts, or its layer.
function whereTo({ compare, figures, layer_id: layerId, expert_id: expertId }) {
  if (compare) return () => emit("compare", compare);
  if (Number.isInteger(expertId)) return () => choose(layerId, expertId);
  if (figures?.experts) return () => emit("highlight", figures.experts.map((cell) => [cell.layer_id, cell.expert_id]));
  return Number.isInteger(layerId) ? () => emit("highlight", [[layerId]]) : null;
}
