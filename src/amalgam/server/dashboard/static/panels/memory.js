// What the weights take, format by format and source by source, and the re-maps so far.

import { on, state } from "../app.js";
import { fill, h, table } from "../dom.js";
import * as format from "../format.js";
import { t } from "../i18n.js";
import { pick, scale, toCss } from "../theme.js";
import { frame, note } from "./panel.js";

const TONES = { done: "good", failed: "bad", cancelled: "warn" };

export function create() {
  return [memoryPanel(), remapPanel()];
}

function memoryPanel() {
  const body = h("div", { id: "memory-body" });
  const node = frame("memory", "memory", null, body, { wide: "half" });

  function redraw() {
    const { info } = state;
    if (!info) return;
    const rows = Object.entries(info.precisions).map(([name, row]) => ({ name, ...row, bits: (row.bytes * 8) / row.parameters }));
    rows.sort((a, b) => b.bits - a.bits);
    const total = rows.reduce((sum, row) => sum + row.bytes, 0);
    const colors = scale("widths");
    rows.forEach((row, index) => { row.color = toCss(pick(colors, rows.length > 1 ? 1 - index / (rows.length - 1) : 1)); });
    fill(body,
      h("div", { class: "tiles small" },
        tile(t("weights_total"), format.bytes(info.memory.weights_bytes)),
        tile(t("kv_bytes"), format.bytes(info.memory.kv_cache_bytes)),
        tile(t("peak"), format.bytes(info.memory.process_peak_bytes))),
      h("div", { class: "stack" }, rows.map((row) => h("i", { vars: { "--part": `${(row.bytes / total) * 100}%`, "--color": row.color }, title: row.name }))),
      table([t("format"), t("weights_count"), t("parameters"), t("size"), t("share_short"), t("bits_per_parameter")], rows.map((row) => h("tr", {},
        h("td", { class: "num" }, h("i", { class: "swatch", vars: { "--color": row.color } }), row.name),
        h("td", { class: "num" }, format.number(row.weights)),
        h("td", { class: "num" }, format.short(row.parameters)),
        h("td", { class: "num" }, format.bytes(row.bytes)),
        h("td", { class: "num" }, format.percent(row.bytes / total)),
        h("td", { class: "num" }, format.number(row.bits, 2))))),
      devicesOf(info.devices ?? {}),
      h("h3", {}, t("sources")),
      table([t("source"), t("weights_count"), t("size")], Object.entries(info.sources).map(([name, row]) => h("tr", {},
        h("td", { title: row.path ?? "" }, name), h("td", { class: "num" }, format.number(row.weights)), h("td", { class: "num" }, format.bytes(row.bytes))))));
  }

  on("info", redraw);
  return { id: "memory", node, redraw, refresh: redraw };
}

// What lies on each device, and what went to those beside the one that the model runs on; nothing where there is only that one.
function devicesOf(devices) {
  const rows = Object.entries(devices);
  if (rows.length < 2 && !rows[0]?.[1].limit_bytes) return null;
  return [h("h3", {}, t("devices")), table([t("device"), t("nav_usage"), t("weights_total"), t("device_limit"), t("device_free"), t("sent"), t("returned")], rows.map(([name, row], index) => h("tr", {},
    h("td", {}, name),
    h("td", { class: "num" }, format.number(row.experts)),
    h("td", { class: "num" }, format.bytes(row.bytes)),
    h("td", { class: "num" }, row.limit_bytes === null ? "–" : format.bytes(row.limit_bytes)),
    h("td", { class: "num" }, format.bytes(row.available_bytes)),
    h("td", { class: "num" }, index ? format.bytes(row.sent_bytes) : "–"),
    h("td", { class: "num" }, index ? format.bytes(row.returned_bytes) : "–"))), { id: "device-table" })];
}

function remapPanel() {
  const body = h("div", { id: "remap-body" });
  const node = frame("remaps", "remaps", null, body, { wide: "half" });

  function redraw() {
    const { changes } = state;
    fill(body, changes.length
      ? table([t("when"), t("what"), t("version"), t("changed"), t("read"), t("took"), t("result")], [...changes].reverse().map((change) => h("tr", {},
        h("td", { class: "num" }, format.clock(change.started_at)),
        h("td", { title: change.what }, t(`kind_${change.kind}`)),
        h("td", { class: change.name ? "long" : "num" }, versionsOf(change)),
        h("td", { class: "num" }, format.number(change.num_changed)),
        h("td", { class: "num" }, format.bytes(change.loaded_bytes)),
        h("td", { class: "num" }, format.seconds(change.seconds)),
        h("td", { class: `${TONES[change.state] ?? ""} ${change.error ? "long" : ""}`, title: change.error ?? "" }, change.error ?? t(`result_${change.state}`)))))
      : note(t("no_remaps")));
  }

  on("remaps", redraw);
  return { id: "remaps", node, redraw, refresh: redraw };
}

function versionsOf({ kind, state: outcome, name, version, previous_version: previous }) {
  if (kind === "failed_version") return `v${previous} → v${version}`;
  if (outcome !== "done" || kind === "start") return `v${previous}`;
  return name ? `v${version} “${name}”` : `v${previous} → v${version}`;
}

function tile(name, value) {
  return h("div", { class: "tile" }, h("span", {}, name), h("b", {}, value));
}
