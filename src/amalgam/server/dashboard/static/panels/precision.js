// The precision of every expert's projections on the heatmap's grid, and changes of it: chosen, staged, applied.

import { followWithKey, post } from "../api.js";
import { changeWeights, choose, emit, getStatistics, loadInfo, loadMapping, loadPrecision, loadRemaps, on, relativeUse, state } from "../app.js";
import { fill, h, setOptions, table, timed } from "../dom.js";
import * as format from "../format.js";
import { CellGrid } from "../grid.js";
import { onLanguage, t, tOr } from "../i18n.js";
import { css, pick, scale, toCss } from "../theme.js";
import { control, followStatistics, frame, note, select } from "./panel.js";
import { createPlan } from "./plan.js";

const HOT = [1.25, 1.5, 2, 3, 4];
const COLD = [0.75, 0.5, 0.25, 0.1];
const MAX_TIP_NAME = 40;
const REFRESH_MS = 10000;

export function create() {
  const show = select(redraw, { id: "precision-show" });
  const hot = select(redraw, { id: "precision-hot" });
  const cold = select(redraw, { id: "precision-cold" });
  const host = h("div", { class: "grid-host", id: "precision-grid" });
  const legendHost = h("div", { class: "legend" });
  const stagedCount = h("span", { id: "staged-count" });
  const selectedCount = h("span", { id: "selected-count" });
  const mapNode = frame("precision", "precision", "precision_hint", h("div", {},
    h("div", { class: "controls" }, control("show", show), control("hot_from", hot), control("cold_to", cold)),
    host, h("div", { class: "below" }, legendHost)), { wide: "main" });

  const source = select(undefined, { id: "stage-source" });
  const device = select(undefined, { id: "stage-device" });
  const deviceField = h("label", { class: "field", hidden: true }, h("span", { dataset: { i18n: "lie_on" } }), device);
  const boxes = new Map();
  const boxHost = h("div", { class: "boxes" });
  const count = h("b", { id: "stage-count" });
  const list = h("div", { id: "stage-list" });
  const outcome = h("div", { id: "stage-outcome", role: "status" });
  const name = h("input", { id: "stage-name", autocomplete: "off", spellcheck: "false", oninput: () => { plan.forget(); showStaged(); } });
  const plan = createPlan("stage-plan", stagedBody, sizeAfter);
  const kept = h("p", { class: "note", id: "stage-kept" });
  const undo = h("button", { type: "button", id: "stage-undo", onclick: undoLast });
  const save = h("a", { class: "button", id: "stage-save", href: "dashboard/mapping.yaml", onclick: followWithKey, download: "weight_mapping.yaml", dataset: { i18n: "save_yaml" } });
  const chooseHot = h("button", { type: "button", id: "select-hot-narrow", onclick: () => selectCells(marked.hotNarrow) });
  const chooseCold = h("button", { type: "button", id: "select-cold-wide", onclick: () => selectCells(marked.coldWide) });
  const chooseLayer = h("button", { type: "button", onclick: selectLayer });
  const clear = h("button", { type: "button", onclick: () => selectCells([]) });
  const stage = h("button", { type: "button", id: "stage-add", onclick: stageSelected });
  const apply = h("button", { type: "button", class: "primary", id: "stage-apply", onclick: applyStaged });
  const discard = h("button", { type: "button", onclick: () => { state.staged.clear(); emit("staged"); } });
  const stageNode = frame("stage", "stage", null, [h("div", {},
    h("p", {}, count), h("div", { class: "buttons" }, chooseHot, chooseCold, chooseLayer, clear),
    h("div", { class: "stage-form" }, boxHost, h("label", { class: "field" }, h("span", { dataset: { i18n: "take_from" } }), source), deviceField, stage),
    h("h3", { dataset: { i18n: "staged" } }), list, plan.node, h("div", { class: "controls" }, control("stage_name", name)), h("div", { class: "buttons" }, apply, discard)),
  h("div", { class: "always" }, outcome, h("h3", { dataset: { i18n: "in_use" } }), kept, h("div", { class: "buttons" }, undo, save))], { wide: "side" });

  let map = null; // of the grid: rows, formats by width, marks
  let selected = new Map(); // "row/expert" → [row, expert]
  let marked = { hotNarrow: [], coldWide: [] };
  let use = null; // relative use since the last reset
  let isApplying = false;
  let told = () => null; // how the last change went, in the language of the moment

  const grid = new CellGrid(host, {
    height: 430, maxCellHeight: 40,
    onPick: (row, expertId, event) => {
      const key = `${row}/${expertId}`;
      if (event.shiftKey || event.ctrlKey || event.metaKey) {
        if (selected.has(key)) selected.delete(key);
        else selected.set(key, [row, expertId]);
      } else {
        selected = new Map([[key, [row, expertId]]]);
      }
      choose(map.layerIds[row], expertId);
      showSelection();
    },
    onSelect: (cells, event) => {
      if (!event.shiftKey) selected = new Map();
      for (const [row, expertId] of cells) selected.set(`${row}/${expertId}`, [row, expertId]);
      showSelection();
    },
    describe: (row, expertId) => [
      t("cell_name", map.layerIds[row], expertId),
      ...(use?.[row] ? [t("of_even", format.times(use[row][expertId]))] : []),
      ...map.projections.flatMap((projection, part) => {
        const cell = map.cell(row, expertId, part);
        return !cell.format ? [] : `${projection}: ${cell.format} · ${cell.source.slice(0, MAX_TIP_NAME)} · ${format.bytes(cell.bytes)}`;
      }),
      ...(map.devices.length > 1 ? [t("on_device", map.device(row, expertId))] : []),
    ],
  });
  mapNode.grid = grid;

  function words() {
    const projections = map?.projections ?? [];
    const byDevice = map?.devices.length > 1 ? [["device", t("show_device")]] : [];
    setOptions(show, [["split", t("show_split")], ...projections.map((name, index) => [index, name]), ...byDevice]);
    thresholds(hot, HOT, state.statistics?.hot_from);
    thresholds(cold, COLD, state.statistics?.cold_to);
    chooseLayer.textContent = t("select_layer");
    clear.textContent = t("clear_selection");
    stage.textContent = t("stage_add");
    discard.textContent = t("discard");
  }

  function adopt() {
    if (!state.precision) return;
    map = readMap(state.precision);
    const sources = Object.keys(state.info?.sources ?? {}).map((name) => [name, name]);
    const hasDevices = map.devices.length > 1;
    setOptions(source, hasDevices ? [["", t("as_it_is")], ...sources] : sources);
    setOptions(device, [["", t("as_it_is")], ...map.devices.map((name) => [name, name])]);
    deviceField.hidden = !hasDevices;
    fill(boxHost, map.projections.map((name) => {
      const box = boxes.get(name) ?? h("input", { type: "checkbox", checked: true });
      boxes.set(name, box);
      return h("label", { class: "check" }, box, h("span", {}, name));
    }));
    words();
  }

  async function refresh() {
    use = relativeUse(await getStatistics("experts/grid"));
    adopt();
    redraw();
  }

  function redraw() {
    timed("precision-update", draw);
  }

  function draw() {
    showSelection();
    if (!map) return;
    const parts = show.value === "split" ? map.projections.length : 1;
    const isByDevice = show.value === "device";
    const colors = new Uint32Array(map.layerIds.length * map.numExperts * parts);
    const table = scale("widths");
    let at = 0;
    for (let row = 0; row < map.layerIds.length; row += 1) {
      for (let expert = 0; expert < map.numExperts; expert += 1) {
        for (let part = 0; part < parts; part += 1) {
          const cell = map.formatAt(row, expert, parts === 1 && !isByDevice ? Number(show.value) : part);
          const place = isByDevice ? placeOf(map.devices, map.device(row, expert)) : cell?.place;
          colors[at] = cell ? pick(table, place) : 0; // this layer has fewer experts
          at += 1;
        }
      }
    }
    marked = findMarked(map, use, Number(hot.value), Number(cold.value));
    grid.show({
      rowNames: map.layerIds, numColumns: map.numExperts, parts, colors, outlines: [],
      label: t("grid_label", t("precision"), map.layerIds.length, map.numExperts),
      margins: [{
        title: t("bits"), values: map.bitsPerLayer, low: 0, high: Math.max(16, ...map.bitsPerLayer), text: (value) => format.number(value, 2),
      }],
    });
    const kinds = isByDevice
      ? map.devices.map((name) => ({ place: placeOf(map.devices, name), text: `${name} · ${t("device_experts", format.number(map.countOn(name)))}` }))
      : map.formats.map((item) => ({ place: item.place, text: `${item.name} · ${t("bits_each", format.number(item.bits, 2))} · ${t("format_share", format.number(item.count))}` }));
    fill(legendHost,
      kinds.map((kind) => h("span", { class: "legend-item" }, h("i", { class: "swatch", vars: { "--color": toCss(pick(table, kind.place)) } }), kind.text)),
      h("span", { class: "legend-item" }, h("i", { class: "swatch outline hot" }), t("hot_narrow", marked.hotNarrow.length)),
      h("span", { class: "legend-item" }, h("i", { class: "swatch outline cold" }), t("cold_wide", marked.coldWide.length)),
      h("span", { class: "legend-item" }, h("i", { class: "swatch corner" }), stagedCount),
      h("span", { class: "legend-item" }, h("i", { class: "swatch frame" }), selectedCount),
      map.formats.length < 2 ? h("span", { class: "quiet" }, t("one_width")) : null);
    showSelection();
  }

  function showSelection() {
    count.textContent = t("selected", selected.size);
    chooseHot.textContent = `${t("select_hot_narrow")} (${marked.hotNarrow.length})`;
    chooseCold.textContent = `${t("select_cold_wide")} (${marked.coldWide.length})`;
    stage.disabled = !selected.size;
    clear.disabled = !selected.size;
    showStaged();
    showKept();
    selectedCount.textContent = t("selected_mark", selected.size);
    if (!map || !grid.data) return;
    const stagedCells = new Map();
    for (const item of state.staged.values()) {
      const row = map.layerIds.indexOf(item.layerId);
      stagedCells.set(`${row}/${item.expertId}`, [row, item.expertId]);
    }
    stagedCount.textContent = t("staged_mark", stagedCells.size);
    grid.setOutlines([
      { cells: marked.hotNarrow, color: css("--hot"), style: "line" },
      { cells: marked.coldWide, color: css("--cold"), style: "dashed" },
      { cells: [...stagedCells.values()], color: css("--staged"), style: "corner" },
      { cells: [...selected.values()], color: css("--text"), style: "frame" },
    ]);
  }

  function selectCells(cells) {
    selected = new Map(cells.map((cell) => [cell.join("/"), cell]));
    showSelection();
  }

  function selectLayer() {
    const rows = selected.size ? new Set([...selected.values()].map(([row]) => row)) : new Set([0]);
    selectCells([...rows].flatMap((row) => Array.from({ length: map.numExperts }, (_, expert) => [row, expert])));
  }

  function stageSelected() {
    const ticked = source.value ? map.projections.filter((projection) => boxes.get(projection).checked) : [];
    if (!ticked.length && !device.value) {
      tell(() => note(t(source.value ? "no_projection" : "no_change_chosen")));
      return;
    }
    let isAny = false;
    for (const [row, expertId] of selected.values()) {
      map.projections.forEach((projection, part) => {
        const isTicked = ticked.includes(projection);
        if (isTicked || device.value) state.staged.delete(map.name(row, expertId, part));
        const wanted = { source: isTicked ? source.value : "", device: device.value }; // the device is the whole expert's
        isAny = stageWeight(row, expertId, part, wanted) || isAny;
      });
    }
    tell(() => (isAny ? null : note(t("already"))));
    if (isAny) selected = new Map();
    emit("staged");
  }

  // Stages what of `wanted`, {source, device}, a weight does not have yet. Returns whether that is anything.
  function stageWeight(row, expertId, part, wanted) {
    const name = map.name(row, expertId, part);
    if (!name) return false;
    const before = map.cell(row, expertId, part);
    const change = Object.fromEntries(Object.entries(wanted).filter(([key, value]) => value && value !== before[key]));
    if (!Object.keys(change).length) return false;
    state.staged.set(name, { name, layerId: map.layerIds[row], expertId, projection: map.projections[part], change, before });
    return true;
  }

  // Others may have changed meanwhile what is staged or selected here, or another model may be served.
  function renewStaged() {
    selected = new Map([...selected].filter(([, [row, expertId]]) => map.name(row, expertId, 0)));
    const items = [...state.staged.values()];
    state.staged.clear();
    for (const { name, layerId, expertId, projection, change } of items) {
      const [row, part] = [map.layerIds.indexOf(layerId), map.projections.indexOf(projection)];
      if (map.name(row, expertId, part) === name) stageWeight(row, expertId, part, change);
    }
    if (items.length) emit("staged");
  }

  function showStaged() {
    const groups = new Map();
    for (const item of state.staged.values()) {
      const { before, change } = item;
      const what = [[before.source, change.source], [before.device, change.device]].flatMap(([from, to]) => (to ? `${from} → ${to}` : [])).join(", ");
      const key = JSON.stringify([item.layerId, what]);
      if (!groups.has(key)) groups.set(key, { layerId: item.layerId, what, items: [] });
      groups.get(key).items.push(item);
    }
    const what = name.value.trim() ? t("apply_named", name.value.trim()) : t("apply");
    apply.textContent = isApplying ? t("applying") : `${what} (${state.staged.size})`;
    apply.disabled = isApplying || !state.staged.size;
    discard.disabled = isApplying || !state.staged.size;
    plan.redraw();
    if (!groups.size) {
      fill(list, note(t("nothing_staged")));
      return;
    }
    const rows = [...groups.values()].map((group) => h("tr", {},
      h("td", { class: "num" }, String(group.layerId)),
      h("td", {}, expertRanges(group.items)),
      h("td", {}, group.what),
      h("td", { class: "num" }, String(group.items.length)),
      h("td", {}, h("button", {
        type: "button", class: "plain", "aria-label": t("remove"), title: t("remove"),
        onclick: () => { for (const item of group.items) state.staged.delete(item.name); emit("staged"); },
      }, "×"))));
    fill(list, table([t("layer"), t("nav_usage"), t("what"), t("weights_count"), ""], rows));
  }

  // What is staged, as a change is asked for; null: nothing is.
  function stagedBody() {
    if (!state.staged.size) return null;
    const mapping = Object.fromEntries([...state.staged.values()].map(({ name: weight, change }) => [weight, change.device ? change : change.source]));
    return { weight_mapping: mapping, name: name.value.trim() || null };
  }

  // All experts' weights once the change is made: the server knows the size of a weight of any source, in use or not.
  function sizeAfter({ changes }) {
    const difference = changes.reduce((sum, group) => sum + group.bytes_after - group.bytes_before, 0);
    const sign = difference > 0 ? "+" : "";
    return h("p", { class: "note", id: "stage-size" }, t("size_change", format.bytes(map.totalBytes), format.bytes(map.totalBytes + difference),
      `${sign}${format.bytes(difference)}, ${sign}${format.percent(difference / map.totalBytes)}`));
  }

  // Whether what is in use would be there after a restart, and what can be done about it.
  function showKept() {
    const { mapping } = state;
    kept.textContent = !mapping ? "" : mapping.is_configured ? t("mapping_configured") : t("mapping_unsaved");
    kept.classList.toggle("warn", Boolean(mapping && !mapping.is_configured));
    undo.textContent = `${t("undo")} (${mapping?.num_undoable ?? 0})`;
    undo.disabled = isApplying || !mapping?.num_undoable;
  }

  function tell(what) {
    told = what;
    fill(outcome, told());
  }

  function applyStaged() {
    const body = stagedBody();
    return change(body.name ? "applied_named" : "applied", async () => {
      const { version, ...rest } = await changeWeights(body, (status) => tell(() => note(stepOf(status))));
      state.staged.clear();
      selected.clear();
      name.value = "";
      return { weight_version: version, ...rest };
    });
  }

  function undoLast() {
    return change("undone", () => post("dashboard/undo", { weight_version: state.mapping.weight_version }));
  }

  // Runs one change of the weights and tells with `word` how it went.
  async function change(word, run) {
    isApplying = true;
    tell(() => null);
    showSelection();
    try {
      const answer = await run();
      tell(() => h("p", { class: "good" }, t(word, answer.weight_version, format.number(answer.num_changed),
        format.bytes(answer.loaded_bytes), format.seconds(answer.seconds), answer.name)));
      await Promise.all([loadInfo(), loadPrecision(), loadRemaps(), loadMapping()]);
    } catch (error) {
      tell(() => h("div", { class: "panel-error", role: "alert" }, error.message));
    } finally {
      isApplying = false;
      emit("staged");
    }
  }

  const mapPanel = followStatistics({ id: "precision", node: mapNode, refresh, redraw, needsStatistics: true }, REFRESH_MS);
  on("precision", () => {
    plan.forget();
    adopt();
    if (map) renewStaged();
    redraw();
  });
  on("info", adopt);
  on("staged", () => {
    plan.forget();
    showSelection();
  });
  on("mapping", showKept);
  on("stage-expert", (expert) => {
    const row = map?.layerIds.indexOf(expert.layer_id) ?? -1;
    if (row >= 0) selectCells([[row, expert.expert_id]]);
  });
  words();
  onLanguage(words);
  onLanguage(() => tell(told));
  showSelection();
  return [mapPanel, { id: "stage", node: stageNode, redraw: showSelection, needsStatistics: true }];
}

// "0–3, 7" and, where only some projections of the experts are staged, which.
function expertRanges(items) {
  const ids = [...new Set(items.map((item) => item.expertId))].sort((a, b) => a - b);
  const parts = [];
  for (let i = 0; i < ids.length; i += 1) {
    let j = i;
    while (ids[j + 1] === ids[j] + 1) j += 1;
    parts.push(j > i ? `${ids[i]}–${ids[j]}` : `${ids[i]}`);
    i = j;
  }
  const projections = ["gate", "up", "down"].filter((name) => items.some((item) => item.projection === name));
  const isWhole = items.length === ids.length * 3;
  return `${parts.join(", ")}${isWhole ? "" : ` · ${projections.join(", ")}`}`;
}

// At first the hints' own threshold is chosen.
function thresholds(node, values, ofHints) {
  if (ofHints === undefined) return;
  const isFirst = !node.value;
  setOptions(node, [...new Set([...values, ofHints])].map((value) => [value, format.times(value)]));
  if (isFirst) node.value = ofHints;
}

// The answer of /experts/precision_map, with widths and sizes looked up once.
function readMap(answer) {
  const { layer_ids: layerIds, num_experts: numExperts, projections } = answer;
  const seen = new Map();
  let totalBytes = 0;
  const each = (visit) => answer.formats.forEach((row, r) => row.forEach((parts, e) => parts.forEach((name, p) => visit(name, r, e, p))));
  each((name, row, expert, part) => {
    if (!name) return; // this layer has fewer experts
    const size = answer.bytes[row][expert][part];
    const item = seen.get(name) ?? { name, count: 0, bytes: 0 };
    item.count += 1;
    item.bytes += size;
    seen.set(name, item);
    totalBytes += size;
  });
  const formats = [...seen.values()];
  for (const item of formats) {
    const row = state.info?.precisions?.[item.name]; // bytes and parameters of all weights in this format
    item.bits = row ? (row.bytes * 8) / row.parameters : null;
  }
  formats.sort((a, b) => (b.bits ?? 0) - (a.bits ?? 0) || a.name.localeCompare(b.name));
  formats.forEach((item, index) => { item.place = formats.length > 1 ? 1 - index / (formats.length - 1) : 1; });
  const byName = new Map(formats.map((item) => [item.name, item]));
  const primary = state.info?.device ?? "";
  const devices = Object.keys(state.info?.devices ?? { [primary]: null }); // the one that the model runs on is the first
  const device = (row, expert) => answer.devices?.[row]?.[expert] ?? primary;
  const formatAt = (row, expert, part) => byName.get(answer.formats[row][expert][part]);
  return {
    layerIds, numExperts, projections, formats, formatAt, totalBytes,
    isNarrow: answer.is_narrow, // per expert
    isWide: answer.is_wide,
    bitsPerLayer: answer.bits.map((row) => row.reduce((sum, bits) => sum + bits, 0) / row.filter((bits) => bits > 0).length),
    devices, device,
    countOn: (name) => answer.formats.reduce((sum, row, r) => sum + row.filter((parts, e) => parts.some(Boolean) && device(r, e) === name).length, 0),
    cell: (row, expert, part) => ({
      format: answer.formats[row][expert][part], source: answer.sources[row][expert][part], bytes: answer.bytes[row][expert][part],
      device: device(row, expert),
    }),
    name: (row, expert, part) => answer.names[row]?.[expert]?.[part],
  };
}

// Where on a colour scale one of several names is.
const placeOf = (names, name) => (names.length > 1 ? names.indexOf(name) / (names.length - 1) : 1);

function findMarked(map, use, hotFrom, coldTo) {
  const hotNarrow = [];
  const coldWide = [];
  use?.forEach((row, index) => row?.forEach((value, expert) => {
    if (value >= hotFrom && map.isNarrow[index][expert]) hotNarrow.push([index, expert]);
    else if (value <= coldTo && map.isWide[index][expert]) coldWide.push([index, expert]);
  }));
  return { hotNarrow, coldWide };
}

function stepOf({ stage, num_done, num_weights }) {
  const step = tOr(`stage_${stage}`, stage);
  return num_weights ? `${step}: ${t("weights_read", format.number(num_done), format.number(num_weights))}` : step;
}
