// A text's tokens and, for each, the experts that the router gave it, layer by layer.

import { post } from "../api.js";
import { choose } from "../app.js";
import { characters } from "../characters.js";
import { fill, h, setOptions, table } from "../dom.js";
import * as format from "../format.js";
import { CellGrid } from "../grid.js";
import { onLanguage, t } from "../i18n.js";
import { expertColor, toCss } from "../theme.js";
import { frame, select } from "./panel.js";

const EXAMPLE = "It was a dark night. 床前明月光，疑是地上霜。 def fibonacci(n):";

export function create() {
  const text = h("textarea", { id: "trace-text", rows: "4", value: EXAMPLE, spellcheck: "false", dataset: { i18nLabel: "text" } });
  const chat = h("input", { type: "checkbox", id: "trace-chat" });
  const run = h("button", { type: "button", class: "primary", id: "trace-run", onclick: trace });
  const message = h("div");
  const layer = select(redraw, { id: "trace-layer" });
  const chips = h("div", { class: "chips", id: "trace-tokens" });
  const host = h("div", { class: "grid-host", id: "trace-grid" });
  const detail = h("div", { class: "trace-detail", id: "trace-detail" });
  const result = h("div", { hidden: true },
    h("div", { class: "trace-columns" },
      h("div", {},
        h("label", { class: "field inline" }, h("span", { dataset: { i18n: "color_by" } }), layer), chips,
        h("h3", { dataset: { i18n: "routes" } }), host),
      detail));
  const node = frame("inspector", "inspector", "inspector_hint", h("div", {},
    h("div", { class: "trace-form" }, text,
      h("div", { class: "buttons" }, h("label", { class: "check" }, chat, h("span", { dataset: { i18n: "as_chat" } })), run)),
    message, result), { wide: "full" });

  let answer = null;
  let groups = []; // of tokens: one per character where a character has several
  let groupOf = []; // token → its group
  let token = 0;
  let isRunning = false;
  const grid = new CellGrid(host, {
    height: 200, maxCellHeight: 18, minCellWidth: 9,
    onPick: (row, index) => {
      layer.value = String(row);
      pickToken(index);
    },
    describe: (row, index) => [
      `${t("token_n", index + 1)} · ${t("layer_n", answer.layer_ids[row])}`, piece(index),
      ...top(index, row).map(([expertId, weight]) => `${t("expert_n", expertId)} · ${t("gate_weight", format.percent(weight))}`),
    ],
  });
  node.grid = grid;

  async function trace() {
    if (isRunning || !text.value) return;
    isRunning = true;
    showButton();
    fill(message);
    try {
      answer = await post("experts/trace", { text: text.value, chat: chat.checked });
      token = 0;
      groups = characters(answer.tokens);
      groupOf = [];
      for (const group of groups) for (const index of group.indices) groupOf[index] = group;
      setOptions(layer, layerOptions());
      redraw();
    } catch (error) {
      fill(message, h("div", { class: "panel-error", role: "alert" }, error.message));
    } finally {
      isRunning = false;
      showButton();
    }
  }

  const layerOptions = () => (answer?.layer_ids ?? []).map((id, index) => [index, t("layer_n", id)]);

  // [expert id, gate weight] of one token in one layer, heaviest first.
  function top(index, row) {
    const weights = answer.gate_weights[index][row];
    return answer.experts[index][row].map((expertId, k) => [expertId, weights[k]]).sort((a, b) => b[1] - a[1]);
  }

  function pickToken(index) {
    token = index;
    showTokens();
    showDetail();
  }

  function redraw() {
    showButton();
    if (!answer) return;
    result.hidden = false;
    showTokens();
    showDetail();
    const numTokens = answer.tokens.length;
    const colors = new Uint32Array(answer.layer_ids.length * numTokens);
    answer.layer_ids.forEach((_, row) => answer.tokens.forEach((_token, index) => {
      const [expertId, weight] = top(index, row)[0];
      colors[row * numTokens + index] = expertColor(expertId, weight);
    }));
    grid.show({
      rowNames: answer.layer_ids, numColumns: numTokens, colors,
      columnNames: answer.tokens.map((_, index) => index + 1), label: t("grid_label_tokens", t("routes"), answer.layer_ids.length, numTokens),
    });
  }

  function showButton() {
    run.textContent = isRunning ? t("tracing") : t("trace");
    run.disabled = isRunning;
  }

  // A token as it is read: its character, and of one that is only a part of it, its bytes too.
  function piece(index) {
    const { indices, text } = groupOf[index];
    const { bytes } = answer.tokens[index];
    if (text === null) return hex(bytes);
    return indices.length > 1 ? `${visible(text)} · ${indices.indexOf(index) + 1}/${indices.length}${bytes ? ` ${hex(bytes)}` : ""}` : visible(text);
  }

  const idsOf = ({ indices }) => t("token_id", indices.map((index) => answer.tokens[index].id).join(", "));

  function showTokens() {
    const row = Number(layer.value);
    fill(chips, groups.map((group) => {
      const { indices, text } = group;
      const tops = indices.map((index) => top(index, row)[0]);
      const isChosen = groupOf[token] === group;
      return h("button", {
        type: "button", class: isChosen ? "chip chosen" : "chip", "aria-pressed": String(isChosen),
        vars: { "--color": toCss(expertColor(...tops[0])) },
        title: `${idsOf(group)} · ${t("expert_n", tops.map(([expertId]) => expertId).join(", "))}`,
        onclick: () => pickToken(indices[0]),
      }, h("span", { class: "chip-text" }, text === null ? hex(answer.tokens[indices[0]].bytes) : visible(text)),
      h("span", { class: "chip-experts" }, tops.map(([expertId, weight]) =>
        h("small", { vars: { "--color": toCss(expertColor(expertId, weight)) } }, String(expertId)))));
    }));
  }

  function showDetail() {
    const group = groupOf[token];
    const { indices } = group;
    const [first, last] = [indices[0] + 1, indices.at(-1) + 1];
    fill(detail,
      h("h3", {}, `${first === last ? t("token_n", first) : t("tokens_n", first, last)} `,
        h("code", {}, group.text === null ? hex(answer.tokens[token].bytes) : visible(group.text)), ` ${idsOf(group)}`),
      indices.length > 1 ? h("div", { class: "buttons", role: "group" }, indices.map((index) => h("button", {
        type: "button", class: "piece", "aria-pressed": String(index === token), onclick: () => pickToken(index),
      }, answer.tokens[index].bytes ? hex(answer.tokens[index].bytes) : visible(answer.tokens[index].text)))) : null,
      table([t("layer"), t("experts_by_gate")], answer.layer_ids.map((layerId, row) => h("tr", {},
        h("td", { class: "num" }, String(layerId)),
        h("td", { class: "routes" }, top(token, row).map(([expertId, weight]) => h("button", {
          type: "button", class: "route", vars: { "--part": `${Math.round(weight * 100)}%`, "--color": toCss(expertColor(expertId, weight)) },
          title: t("gate_weight", format.percent(weight)), onclick: () => choose(layerId, expertId),
        }, h("b", {}, String(expertId)), h("small", {}, format.percent(weight, 0)))))))));
  }

  showButton();
  onLanguage(() => setOptions(layer, layerOptions()));
  return [{ id: "inspector", node, redraw, needsStatistics: true }];
}

// Whitespace that matters, made visible.
function visible(text) {
  return text.replace(/\r/g, "␍").replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·") || "∅";
}

const hex = (bytes) => `⟨${bytes.match(/../g).join(" ")}⟩`;
