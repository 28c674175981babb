// Plans that follow the traffic: drift and divergence over time, what was decided and why, and the switch that freezes it.

import { get, post } from "../api.js";
import { chart } from "../charts.js";
import { fill, h, table } from "../dom.js";
import * as format from "../format.js";
import { t } from "../i18n.js";
import { css } from "../theme.js";
import { followStatistics, frame, note } from "./panel.js";

const REFRESH_MS = 10000;
const MAX_ROWS = 12;
const GOOD = new Set(["committed"]);
const BAD = new Set(["failed", "not_finite", "no_memory", "over_budget"]);

export function create() {
  const freeze = h("button", { id: "autoplan-freeze", type: "button", hidden: true, onclick: () => toggle() });
  const off = h("div");
  const tiles = h("div", { class: "tiles small" });
  const plot = h("div", { class: "chart", dataset: { chart: "autoplan" } });
  const decisions = h("div", { id: "autoplan-decisions" });
  const failure = h("div");
  const body = h("div", {}, failure, off, h("div", {}, tiles, plot), decisions);
  const node = frame("autoplan", "autoplan", "autoplan_hint", body, { tools: [freeze] });
  let answer = null;

  async function refresh() {
    answer = await get("autoplan");
    redraw();
  }

  async function toggle() {
    freeze.disabled = true;
    fill(failure);
    try {
      answer = await post("autoplan", { frozen: !answer.frozen });
      redraw();
    } catch (error) {
      fill(failure, h("div", { class: "panel-error", role: "alert" }, error.message));
    } finally {
      freeze.disabled = false;
    }
  }

  function redraw() {
    if (!answer) return;
    for (const part of [freeze, tiles, plot, decisions]) part.hidden = !answer.enabled;
    fill(off, answer.enabled ? null : note(t("autoplan_off")));
    if (!answer.enabled) return;
    freeze.textContent = t(answer.frozen ? "autoplan_unfreeze" : "autoplan_freeze");
    const { limits, points } = answer;
    const last = points.at(-1);
    fill(tiles,
      tile(t("autoplan_state"), t(answer.frozen ? "autoplan_is_frozen" : "autoplan_follows")),
      tile(t("drift"), format.short(last?.from_planned), t("autoplan_from", limits.drift)),
      tile(t("autoplan_swaps"), `${answer.swaps_in_last_hour} / ${limits.max_swaps_per_hour}`, t("autoplan_within_hour")));
    plot.hidden = !points.length;
    if (points.length) draw(points, limits);
    const rows = answer.decisions.toReversed().slice(0, MAX_ROWS);
    fill(decisions, rows.length ? table(
      ["when", "result", "changed", "autoplan_expected", "autoplan_measured", "autoplan_reason"].map((word) => t(word)), rows.map(row),
    ) : note(t("autoplan_none")));
  }

  function draw(points, limits) {
    const x = points.map((point) => new Date(point.at * 1000));
    const line = (name, key, color, extra = {}) => ({
      type: "scatter", mode: "lines+markers", name, x, y: points.map((point) => point[key]), connectgaps: true,
      line: { color, width: 1.6, ...extra.line }, marker: { size: 4, color }, ...extra.trace,
    });
    const limit = { type: "line", xref: "paper", x0: 0, x1: 1, y0: limits.drift, y1: limits.drift, line: { color: css("--muted"), width: 1, dash: "dot" } };
    chart(plot, [
      line(t("autoplan_from_planned"), "from_planned", css("--series-1")),
      line(t("autoplan_from_long"), "from_long", css("--series-3"), { line: { dash: "dot", width: 1 } }),
      line(t("autoplan_divergence"), "divergence", css("--series-2"), { trace: { yaxis: "y2" } }),
    ], {
      shapes: [limit], margin: { l: 48, r: 56, t: 8, b: 28 },
      xaxis: { type: "date", nticks: 6, tickformat: "%H:%M", hoverformat: "%H:%M:%S" },
      yaxis: { rangemode: "tozero", nticks: 4 },
      yaxis2: { overlaying: "y", side: "right", rangemode: "tozero", nticks: 4, showgrid: false },
    });
  }

  return [followStatistics({ id: "autoplan", node, refresh, redraw }, REFRESH_MS)];
}

function row(decision) {
  const { outcome, shadowed } = decision;
  const tone = GOOD.has(outcome) ? "good" : BAD.has(outcome) ? "bad" : "";
  return h("tr", {},
    h("td", { class: "num" }, format.clock(decision.at)),
    h("td", { class: tone }, t(`outcome_${outcome}`), decision.version ? ` v${decision.version}` : ""),
    h("td", { class: "num" }, format.number(decision.num_changed)),
    h("td", { class: "num" }, decision.expected_gain === null ? "–" : format.percent(-decision.expected_gain)),
    h("td", { class: "num" }, shadowed ? `${format.short(shadowed.now.value)} → ${format.short(shadowed.candidate.value)}` : "–"),
    h("td", { class: "long" }, decision.reason));
}

function tile(name, value, detail = "") {
  return h("div", { class: "tile" }, h("span", {}, name), h("b", {}, value), h("small", {}, detail));
}
