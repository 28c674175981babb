// How concentrated the use is, which experts go together, and how far it has drifted.

import { post } from "../api.js";
import { choose, getStatistics, on, state } from "../app.js";
import { chart } from "../charts.js";
import { fill, h, setOptions, table } from "../dom.js";
import * as format from "../format.js";
import { CellGrid, legend } from "../grid.js";
import { onLanguage, t } from "../i18n.js";
import { css, pick, scale, empty } from "../theme.js";
import { control, followStatistics, frame, note, select } from "./panel.js";
import { divergence, loadTraffic, setSides } from "./usage.js";

const REFRESH_MS = 10000;
const OCTAVES = 2;
const NUM_PAIRS = 5;

export function create() {
  const panels = [concentrationPanel(), coactivationPanel(), driftPanel()];
  return panels.map((panel) => followStatistics({ ...panel, needsStatistics: true }, REFRESH_MS));
}

function concentrationPanel() {
  const plot = h("div", { class: "chart chart-square", dataset: { chart: "lorenz" } });
  const figures = h("div");
  const node = frame("analysis", "concentration", "concentration_hint", h("div", {}, plot, figures), { wide: "third" });
  let answer = null;

  async function refresh() {
    answer = await getStatistics("experts/concentration");
    redraw();
  }

  function redraw() {
    if (!answer) return;
    const layers = answer.layers.filter((layer) => layer.coverage["50"] !== null); // of the others nothing is known
    plot.hidden = !layers.length;
    if (plot.hidden) {
      fill(figures, note(t("no_data")));
      return;
    }
    const curves = layers.map((layer) => busiestFirst(layer.lorenz));
    const x = curves.flatMap((curve) => [...curve.map((_, index) => index / (curve.length - 1)), null]);
    const y = curves.flatMap((curve) => [...curve, null]);
    const mean = curves[0].map((_, index) => curves.reduce((sum, curve) => sum + curve[index], 0) / curves.length);
    const axis = { range: [0, 1], tickformat: ".0%", tickvals: [0, 0.25, 0.5, 0.75, 1] };
    chart(plot, [
      { type: "scatter", mode: "lines", name: t("each_layer"), x, y, line: { color: css("--series-1-soft"), width: 1 }, hoverinfo: "skip" },
      { type: "scatter", mode: "lines", name: t("all_layers"), x: x.slice(0, mean.length), y: mean, line: { color: css("--series-1"), width: 2.4 }, hovertemplate: "%{y:.1%}" },
      { type: "scatter", mode: "lines", name: t("even"), x: [0, 1], y: [0, 1], line: { color: css("--muted"), width: 1, dash: "dot" }, hoverinfo: "skip" },
    ], {
      margin: { l: 48, r: 18, t: 8, b: 40 }, hovermode: "x",
      xaxis: { ...axis, title: { text: t("experts_share"), standoff: 6, font: { size: 11 } } },
      yaxis: axis,
    });
    const numExperts = curves[0].length - 1;
    fill(figures, h("div", { class: "tiles small" }, ["50", "90", "99"].map((part) => {
      const values = layers.map((layer) => layer.coverage[part]);
      const average = values.reduce((a, b) => a + b, 0) / values.length;
      return h("div", { class: "tile" }, h("span", {}, t("coverage", part)),
        h("b", {}, t("coverage_value", format.number(average, 1), numExperts)),
        h("small", {}, `${Math.min(...values)} … ${Math.max(...values)}`));
    })));
  }

  return { id: "analysis", node, refresh, redraw };
}

// The server's Lorenz curve runs from the least used expert up; ours shows what the busiest cover.
const busiestFirst = (lorenz) => lorenz.map((share) => 1 - share).reverse();

function coactivationPanel() {
  const layer = select(() => read().catch(fail), { id: "pairs-layer" });
  const relation = select(() => read().catch(fail), { id: "pairs-relation" });
  const host = h("div", { class: "grid-host", id: "pairs-grid" });
  const figures = h("div");
  const message = h("div");
  const node = frame("coactivation", "coactivation", "coactivation_hint", h("div", {},
    h("div", { class: "controls" }, control("layer", layer), control("relation", relation)), message, host, figures), { wide: "third" });
  let answer = null; // {rows, columns, lift [[..]], counts [[..]], sampledTokens, isSymmetric}
  const grid = new CellGrid(host, {
    height: 260, maxCellHeight: 18, minCellWidth: 2, minCellHeight: 2,
    onPick: (row) => choose(answer.layerId, row),
    describe: (row, column) => [
      answer.isSymmetric ? `${row} · ${column}` : `${row} → ${column}`,
      `${t("tokens")}: ${format.number(answer.counts[row][column])}`,
      `${t("lift")}: ${format.times(answer.lift[row][column])}`,
    ],
  });
  node.grid = grid;

  function fail(error) {
    fill(message, h("div", { class: "panel-error", role: "alert" }, error.message));
  }

  function words() {
    const ids = state.grid?.layer_ids ?? state.precision?.layer_ids ?? [];
    setOptions(layer, ids.map((id) => [id, t("layer_n", id)]));
    setOptions(relation, [["within", t("within")], ["next", t("to_next")]]);
  }

  async function read() {
    const layerId = layer.value;
    if (layerId === "") return;
    const isNext = relation.value === "next";
    const isLast = isNext && layer.selectedIndex === layer.options.length - 1;
    host.hidden = figures.hidden = isLast; // they hold what was asked for before
    if (isLast) {
      fill(message, note(t("no_next_layer")));
      return;
    }
    const raw = await getStatistics(isNext ? "experts/transitions" : "experts/coactivation", { layer_id: layerId });
    answer = isNext ? readPairs(raw, raw.matrix, false) : readPairs(raw, raw.pairs, true);
    fill(message);
    redraw();
  }

  async function refresh() {
    if (!layer.value) words();
    await read();
  }

  function redraw() {
    if (!answer) return;
    const isKnown = answer.sampledTokens > 0;
    const size = answer.counts.length;
    const columns = answer.counts[0]?.length ?? 0;
    const colors = new Uint32Array(size * columns);
    const table_ = scale("diverging");
    for (let row = 0; row < size; row += 1) {
      for (let column = 0; column < columns; column += 1) {
        const lift = answer.lift[row][column];
        colors[row * columns + column] = lift > 0 ? pick(table_, (Math.log2(lift) / OCTAVES + 1) / 2) : empty();
      }
    }
    grid.show({ rowNames: Array.from({ length: size }, (_, i) => i), numColumns: columns, colors, label: t("grid_label_pairs", t("coactivation"), size, columns),
      emptyText: isKnown ? null : t(answer.sampling ? "no_data" : "no_sampling") });
    fill(figures, isKnown ? [
      legend(table_, [[0, "¼×"], [0.5, "1×"], [1, "4×"]], [[empty(), t("never"), "boxed"]]),
      h("p", { class: "figures" }, t("sampled", format.number(answer.sampledTokens))),
      table([t("pair"), t("tokens"), t("lift")], topPairs(answer).map(([row, column]) => h("tr", {},
        h("td", {}, answer.isSymmetric ? `${row} · ${column}` : `${row} → ${column}`),
        h("td", { class: "num" }, format.number(answer.counts[row][column])),
        h("td", { class: "num" }, format.times(answer.lift[row][column]))))),
    ] : null);
  }

  on("show-coactivation", (expert) => {
    words();
    layer.value = String(expert.layer_id);
    relation.value = "within";
    read().catch(fail);
  });
  on("info", () => { if (!layer.options.length) words(); });
  words();
  onLanguage(words);
  return { id: "coactivation", node, refresh, redraw };
}

// Lift: the pair's count over what independent choices with the same totals would give.
function readPairs(raw, given, isSymmetric) {
  const counts = given.length ? given : Array.from({ length: raw.num_experts }, () => new Array(raw.num_experts).fill(0));
  const rowSums = counts.map((row, r) => row.reduce((sum, value, c) => sum + (isSymmetric && r === c ? 0 : value), 0));
  const columnSums = (counts[0] ?? []).map((_, c) => counts.reduce((sum, row, r) => sum + (isSymmetric && r === c ? 0 : row[c]), 0));
  const total = rowSums.reduce((a, b) => a + b, 0);
  const self = isSymmetric && total ? rowSums.reduce((sum, value, i) => sum + (value * columnSums[i]) / total / total, 0) : 0;
  const lift = counts.map((row, r) => row.map((value, c) => {
    if (isSymmetric && r === c) return 0;
    const expected = ((rowSums[r] * columnSums[c]) / (total || 1)) / (1 - self || 1);
    return expected > 0 ? value / expected : 0;
  }));
  return { layerId: raw.layer_id, counts, lift, sampledTokens: raw.sampled_tokens, sampling: raw.sampling, isSymmetric };
}

function topPairs({ counts, lift, isSymmetric }) {
  const pairs = [];
  counts.forEach((row, r) => row.forEach((count, c) => {
    if (count >= 5 && (!isSymmetric || c > r)) pairs.push([r, c, lift[r][c] * Math.sqrt(count)]);
  }));
  return pairs.sort((a, b) => b[2] - a[2]).slice(0, NUM_PAIRS);
}

function driftPanel() {
  const now = select(() => read().catch(fail), { id: "drift-now" });
  const reference = select(() => read().catch(fail), { id: "drift-reference" });
  const plot = h("div", { class: "chart chart-square", dataset: { chart: "drift" } });
  const figures = h("p", { class: "figures" });
  const message = h("div");
  const name = h("input", { type: "text", maxlength: "100", pattern: "[A-Za-z0-9][A-Za-z0-9._\\-]*", id: "set-name" });
  const keep = h("button", { type: "button", id: "set-save", dataset: { i18n: "save_set" }, onclick: () => save().catch(fail) });
  const node = frame("drift", "drift", "drift_hint", h("div", {},
    h("div", { class: "controls" }, control("now_side", now), control("reference_side", reference)), message, plot, figures,
    h("div", { class: "controls" }, control("set_name", name), keep)), { wide: "third" });
  let answer = null;
  let labels = [];
  let sets = [];

  function fail(error) {
    fill(message, h("div", { class: "panel-error", role: "alert" }, error.message));
  }

  function words() {
    setSides(now, reference, labels, sets, state.statistics?.drift);
  }

  async function read() {
    answer = await getStatistics("experts/compare", { a: now.value, b: reference.value });
    fill(message);
    redraw();
  }

  async function save() {
    if (!name.value || !name.checkValidity()) {
      name.focus();
      return;
    }
    const saved = await post("experts/sets", { name: name.value });
    name.value = "";
    await refresh();
    reference.value = `saved:${saved.name}`;
    await read();
  }

  async function refresh() {
    ({ labels, sets } = await loadTraffic());
    words();
    await read();
  }

  function redraw() {
    if (!answer) return;
    const { perLayer, mean } = divergence(answer);
    plot.hidden = mean === null;
    figures.textContent = mean === null ? t("no_divergence") : t("mean_divergence", format.short(mean));
    if (plot.hidden) return;
    chart(plot, [{
      type: "bar", x: answer.layer_ids, y: perLayer, marker: { color: css("--series-1") }, hovertemplate: "%{y:.4f}", name: "",
    }], {
      showlegend: false, margin: { l: 44, r: 12, t: 8, b: 40 }, bargap: 0.25,
      xaxis: { title: { text: t("layer"), standoff: 6, font: { size: 11 } }, dtick: Math.ceil(answer.layer_ids.length / 12) },
      yaxis: { range: [0, Math.max(0.05, ...perLayer.filter(Number.isFinite)) * 1.1], nticks: 5 },
    });
  }

  words();
  onLanguage(words);
  return { id: "drift", node, refresh, redraw };
}
