// The heatmap of layers × experts, of one set of counts or of the difference of two.

import { followWithKey, get } from "../api.js";
import { choose, emit, getStatistics, hasStatistics, on, relativeUse, state } from "../app.js";
import { coalesced, fill, h, setOptions, timed } from "../dom.js";
import * as format from "../format.js";
import { CellGrid, legend } from "../grid.js";
import { onLanguage, t } from "../i18n.js";
import { css, empty, pick, scale } from "../theme.js";
import { caption, control, frame, numberOf, select } from "./panel.js";

const OCTAVES = 3; // the scale ends at 8 times and an eighth of the even share
const SPAN_MINUTES = 30; // until another is typed
const LIVE_MS = 4000;
const IDLE_MS = 30000;
const NUM_BUSIEST = 12;

export function create() {
  const view = select(changed, { id: "usage-view" });
  const measure = select(changed, { id: "usage-measure" });
  const phase = select(changed, { id: "usage-phase" });
  const span = select(changed, { id: "usage-window" });
  const minutes = h("input", { type: "number", min: "0.1", step: "any", onchange: changed, class: "short", dataset: { i18nLabel: "minutes" } });
  const label = select(changed, { id: "usage-label" });
  const sideA = select(changed, { id: "usage-a" });
  const sideB = select(changed, { id: "usage-b" });
  const order = select(redraw, { id: "usage-order" });
  const live = h("input", { type: "checkbox", checked: true, id: "usage-live" });
  const figures = h("p", { class: "figures" });
  const busiest = h("div", { class: "busiest", id: "usage-busiest" });
  const legendHost = h("div");
  const host = h("div", { class: "grid-host", id: "usage-grid" });
  const message = h("div");
  const ofUse = [control("window", span), minutes, control("label", label)];
  const ofDifference = [control("side_a", sideA), control("side_b", sideB)];
  const controls = h("div", { class: "controls" }, control("view", view), control("measure", measure), control("phase", phase),
    ofUse, ofDifference, control("order", order),
    h("label", { class: "check" }, live, h("span", { dataset: { i18n: "live" } })));
  const links = [
    h("a", { class: "button", href: "experts/report", onclick: followWithKey, target: "_blank", rel: "noopener", dataset: { i18n: "report" } }),
    h("a", { class: "button", href: "experts/heatmap.png", onclick: followWithKey, target: "_blank", rel: "noopener" }, "PNG"),
  ];
  const node = frame("usage", "usage", "usage_hint", h("div", {}, controls, message, host, h("div", { class: "below" }, legendHost, figures), busiest),
    { wide: "main", tools: links });

  let data = null; // {kind: "use" | "difference", answer}
  let labels = [];
  let sets = [];
  let lastRead = 0;
  let isStale = false;
  let highlighted = [];
  const grid = new CellGrid(host, {
    height: 430, maxCellHeight: 72,
    onPick: (row, expertId) => choose(data.answer.layer_ids[row], expertId),
    describe: (row, expertId) => describeCell(data, row, expertId),
  });
  node.grid = grid;

  function changed() {
    showControls();
    read().catch(fail);
  }

  function fail(error) {
    fill(message, h("div", { class: "panel-error", role: "alert" }, error.message));
  }

  function words() {
    setOptions(view, [["use", t("view_use")], ["difference", t("view_difference")]]);
    setOptions(measure, [["count", t("measure_count")], ["gate_mass", t("measure_gate_mass")]]);
    setOptions(phase, ["all", "prompt", "generated"].map((name) => [name, t(`phase_${name}`)]));
    setOptions(span, [["", t("window_all")], ...windows().map((n) => [n, windowName(n)]), ["other", t("window_other")]]);
    setOptions(order, [["id", t("order_id")], ["use", t("order_use")]]);
    setOptions(label, [["", t("label_all")], ...labels.map((item) => [item.label, t("label_tokens", item.label, format.short(item.tokens))])]);
    setSides(sideA, sideB, labels, sets, labels.length ? labelSides(labels[0].label) : state.statistics?.drift);
    minutes.max = Math.max(...windows());
    minutes.value ||= Math.min(SPAN_MINUTES, minutes.max);
  }

  function showControls() {
    const isDifference = view.value === "difference";
    for (const item of ofUse) item.hidden = isDifference;
    for (const item of ofDifference) item.hidden = !isDifference;
    minutes.hidden = isDifference || span.value !== "other";
    // A label is counted since the reset, not by window.
    label.disabled = span.value !== "";
    span.disabled = label.value !== "";
  }

  const read = coalesced(async () => {
    lastRead = performance.now();
    isStale = false;
    if (view.value === "difference") {
      data = { kind: "difference", answer: await getStatistics("experts/compare", {
        a: sideA.value, b: sideB.value, measure: measure.value, phase: phase.value,
      }) };
    } else {
      const query = {
        measure: measure.value, phase: phase.value, label: label.value,
        minutes: span.value === "other" ? numberOf(minutes) : span.value,
      };
      data = { kind: "use", answer: await getStatistics("experts/grid", query) };
      state.grid = data.answer;
      emit("grid");
    }
    fill(message);
    redraw();
  });

  async function refresh() {
    ({ labels, sets } = await loadTraffic());
    words();
    showControls();
    await read();
  }

  function redraw() {
    if (data) timed("usage-update", draw);
  }

  function draw() {
    const { answer } = data;
    const isUse = data.kind === "use";
    grid.show(isUse ? useView(answer, order.value) : differenceView(answer, order.value));
    caption(node, isUse ? "usage_hint" : "usage_hint_difference");
    mark();
    showBusiest();
    if (isUse) {
      fill(legendHost, legend(scale("diverging"), [[0, "⅛×"], [1 / 3, "½×"], [0.5, "1×"], [2 / 3, "2×"], [1, "8×"]], [[empty(), t("never_used"), "boxed"]]));
      figures.textContent = answer.total_tokens
        ? t("tokens_counted", format.number(answer.total_tokens), format.seconds(answer.window.seconds)) : "";
    } else {
      const mean = meanDivergence(answer);
      fill(legendHost, h("div", { class: "legend" }, legend(scale("diverging"), [[0, "−2"], [0.5, "0"], [1, "+2"]], [[empty(), t("not_comparable"), "boxed"]]),
        h("span", { class: "quiet" }, t("difference_scale"))));
      figures.textContent = mean === null ? "" : t("mean_divergence", format.short(mean));
    }
  }

  function showBusiest() {
    const { answer } = data;
    const columns = numExperts(answer);
    const isUse = data.kind === "use";
    const cells = [];
    (isUse ? relativeUse(answer) : comparable(answer)).forEach((row, index) => row?.forEach((value, expertId) => {
      if (value) cells.push([Math.abs(value), index, expertId, value]);
    }));
    cells.sort((a, b) => b[0] - a[0]);
    fill(busiest, cells.length ? h("span", { class: "quiet" }, t(isUse ? "busiest" : "most_different")) : null,
      cells.slice(0, NUM_BUSIEST).map(([, index, expertId, value]) => h("button", {
        type: "button", class: "cell-chip", title: t("cell_name", answer.layer_ids[index], expertId),
        onclick: () => choose(answer.layer_ids[index], expertId),
      }, h("span", {}, `L${answer.layer_ids[index]}·E${expertId}`),
      h("b", {}, isUse ? format.percent(value / (answer.expert_counts?.[index] ?? columns)) : format.points(value)))));
  }

  function mark() {
    const { chosen } = state;
    if (!data) return;
    const { layer_ids: layerIds } = data.answer;
    const cells = highlighted.flatMap(([layerId, expertId]) => {
      const row = layerIds.indexOf(layerId);
      return expertId === undefined ? Array.from({ length: numExperts(data.answer) }, (_, id) => [row, id]) : [[row, expertId]];
    });
    const row = chosen ? layerIds.indexOf(chosen.layerId) : -1;
    if (row >= 0) cells.push([row, chosen.expertId]);
    grid.setOutlines([{ cells: cells.filter(([index]) => index >= 0), color: css("--text"), style: "frame" }]);
  }

  on("chosen", () => {
    highlighted = [];
    mark();
  });
  on("highlight", (cells) => { // [layer id, expert id]; no expert: the whole layer
    highlighted = cells;
    mark();
  });
  on("compare", ({ a, b }) => {
    view.value = "difference";
    measure.value = "count";
    phase.value = "all";
    chooseTraffic(sideA, a);
    chooseTraffic(sideB, b);
    changed();
  });
  on("statistics", () => { isStale = true; });
  on("event", () => {
    const age = performance.now() - lastRead;
    if (!hasStatistics() || age < (isStale ? LIVE_MS : IDLE_MS)) return; // windows move on without new tokens
    if (!panel.isVisible) panel.isDirty = true;
    else if (live.checked && !document.hidden) refresh().catch(fail);
  });
  words();
  showControls();
  onLanguage(words);
  const panel = { id: "usage", node, refresh, redraw, needsStatistics: true };
  return [panel];
}

// Rows of differences of shares; null where one of the two sides has not used the layer.
function comparable(answer) {
  const { perLayer } = divergence(answer);
  return answer.difference.map((row, index) => (Number.isFinite(perLayer[index]) ? row : null));
}
const numExperts = (answer) => answer.num_experts ?? answer.difference?.[0]?.length ?? 0;

function useView(answer, order) {
  const relative = relativeUse(answer);
  const columns = numExperts(answer);
  const colors = new Uint32Array(answer.layer_ids.length * columns);
  const table = scale("diverging");
  const blank = empty();
  relative.forEach((row, index) => {
    const count = answer.expert_counts?.[index] ?? columns; // others stay transparent
    for (let column = 0; column < count; column += 1) {
      const value = row ? row[column] : 0;
      colors[index * columns + column] = value > 0 ? pick(table, (Math.log2(value) / OCTAVES + 1) / 2) : blank;
    }
  });
  const { balance } = answer;
  return {
    rowNames: answer.layer_ids, numColumns: columns, colors,
    order: order === "use" ? orderBy(answer.values) : null,
    label: t("grid_label", t("usage"), answer.layer_ids.length, columns),
    emptyText: relative.every((row) => row === null) ? t("no_data") : null,
    margins: [
      { title: t("max_to_mean"), values: column(balance, "max_to_mean"), low: 1, high: Math.max(4, ...finite(column(balance, "max_to_mean"))), text: format.times },
      { title: t("entropy"), values: column(balance, "normalized_entropy"), low: 0, high: 1, text: (value) => format.percent(value, 0) },
      { title: t("gini"), values: column(balance, "gini"), low: 0, high: 1, text: format.short },
    ],
  };
}

function differenceView(answer, order) {
  const columns = numExperts(answer);
  const colors = new Uint32Array(answer.layer_ids.length * columns);
  const table = scale("diverging");
  const rows = comparable(answer);
  const blank = empty();
  rows.forEach((row, index) => {
    for (let place = 0; place < columns; place += 1) {
      colors[index * columns + place] = row ? pick(table, (row[place] * columns) / 4 + 0.5) : blank;
    }
  });
  const { perLayer } = divergence(answer);
  return {
    rowNames: answer.layer_ids, numColumns: columns, colors,
    order: order === "use" ? orderBy(answer.difference) : null,
    label: t("grid_label", t("view_difference"), answer.layer_ids.length, columns),
    emptyText: rows.every((row) => row === null) ? t("no_divergence") : null,
    margins: [{ title: t("jensen_shannon"), values: perLayer, low: 0, high: Math.max(0.1, ...finite(perLayer)), text: format.short }],
  };
}

// Helper for both shapes in which a list per layer may come: a list, or one object per layer.
function column(rows, name) {
  return Array.isArray(rows) ? rows.map((row) => row?.[name] ?? null) : rows?.[name] ?? [];
}

const windows = () => state.statistics?.windows ?? [];
const windowName = (n) => (n < 120 ? t("window_minutes", format.number(n, 1)) : t("window_hours", format.number(n / 60, 1)));
const labelSides = (name) => ({ a: `label:${name}`, b: `rest:${name}` });

// Offers both selects everything that /experts/compare takes; at first they are at `sides`.
export function setSides(selectA, selectB, labels, sets, sides) {
  if (!state.statistics?.is_counted) return;
  const values = [
    "all", ...(state.statistics.has_reference ? ["reference"] : []),
    ...windows().flatMap((n) => [`minutes:${n}`, `before:${n}`]),
    ...labels.flatMap((item) => Object.values(labelSides(item.label))),
    ...sets.map((name) => `saved:${name}`),
  ];
  const isFirst = !selectA.value;
  for (const [node, first] of [[selectA, sides.a], [selectB, sides.b]]) {
    setOptions(node, values.map((value) => [value, trafficName(value)]));
    if (isFirst) node.value = first;
  }
}

// Chooses traffic that may be newer than the options are.
function chooseTraffic(node, value) {
  if (![...node.options].some((option) => option.value === value)) node.append(h("option", { value }, trafficName(value)));
  node.value = value;
}

function trafficName(value) {
  const [, kind, name] = value.match(/^(\w+):?(.*)$/s);
  switch (kind) {
    case "all": return t("window_all");
    case "reference": return t("reference_file");
    case "minutes": return windowName(Number(name));
    case "before": return t("before_window", windowName(Number(name)));
    case "label": return t("label_side", name);
    case "rest": return t("rest_side", name);
    default: return t("saved_set", name);
  }
}

export async function loadTraffic() {
  const [labels, sets] = await Promise.all([
    getStatistics("experts/labels").then((answer) => answer.labels),
    get("experts/sets").then((answer) => answer.sets),
  ]);
  return { labels, sets };
}

export function divergence(answer) {
  const value = answer.jensen_shannon;
  return { perLayer: value?.by_layer ?? [], mean: value?.mean ?? null };
}

function meanDivergence(answer) {
  return divergence(answer).mean;
}

const finite = (values) => values.filter((value) => Number.isFinite(value));

function orderBy(rows) {
  return rows.map((row) => Uint16Array.from(row.keys()).sort((a, b) => row[b] - row[a] || a - b));
}

function describeCell({ kind, answer }, row, expertId) {
  const name = t("cell_name", answer.layer_ids[row], expertId);
  if (kind === "difference") {
    const difference = comparable(answer)[row];
    return [name, difference ? `A − B: ${format.points(difference[expertId])} ${t("share")}` : t("not_comparable")];
  }
  const value = answer.values[row][expertId];
  const sum = answer.values[row].reduce((a, b) => a + b, 0);
  if (!sum) return [name, t("never_used")];
  return [
    name,
    `${format.short(value)} · ${format.percent(value / sum)} ${t("share")}`,
    t("of_even", format.times((value / sum) * answer.values[row].length)),
  ];
}
