// Throughput, latency, queue and KV cache, now and over the last ten minutes, with the re-maps marked.

import { get } from "../api.js";
import { on, state } from "../app.js";
import { chart } from "../charts.js";
import { fill, h } from "../dom.js";
import * as format from "../format.js";
import { t } from "../i18n.js";
import { css } from "../theme.js";
import { frame } from "./panel.js";

const KEPT_SECONDS = 600;
const STEP_SECONDS = 2;
const LEAST_SECONDS = 120;
const LETTER_PX = 7; // of a mark's label

export function create() {
  const tiles = h("div", { class: "tiles" });
  const throughput = h("div", { class: "chart chart-low", dataset: { chart: "throughput" } });
  const load = h("div", { class: "chart chart-low", dataset: { chart: "load" } });
  const body = h("div", {}, tiles, h("div", { class: "two" },
    h("figure", {}, h("figcaption", { dataset: { i18n: "throughput" } }), throughput),
    h("figure", {}, h("figcaption", { dataset: { i18n: "load" } }), load)));
  const node = frame("serving", "serving", "serving_hint", body, { wide: "full" });
  let serving = null;
  let known = [];
  let startedAt = 0;

  const startOf = (figures) => figures.now - figures.uptime;

  async function refresh() {
    serving = await get("serving");
    known = serving.series;
    startedAt = startOf(serving);
    redraw();
  }

  function follow(event) {
    if (!event.serving || !serving) return;
    if (Math.abs(startOf(event.serving) - startedAt) > STEP_SECONDS) {
      refresh().catch(() => {}); // the server's clock was set, which moves all points
      return;
    }
    serving = event.serving;
    const isGap = serving.series.length && known.length && serving.series[0].t - known.at(-1).t > 1.5 * STEP_SECONDS;
    if (isGap) refresh().catch(() => {}); // events were missed: the server has the points between
    for (const point of event.serving.series ?? []) {
      const index = known.findLastIndex((item) => item.t <= point.t);
      if (known[index]?.t === point.t) known[index] = point;
      else known.splice(index + 1, 0, point);
    }
    known = known.filter((point) => point.t >= serving.now - KEPT_SECONDS);
    if (panel.isVisible && !document.hidden) redraw();
  }

  function redraw() {
    if (!serving) return;
    fill(tiles, tileList(serving));
    const points = known.filter((point) => point.t + STEP_SECONDS <= serving.now); // the last is not full yet
    const times = points.map((point) => format.plotTime(point.t));
    const start = Math.max(serving.now - KEPT_SECONDS, Math.min(points[0]?.t ?? Infinity, serving.now - LEAST_SECONDS));
    const range = [format.plotTime(start), format.plotTime(serving.now)];
    const moves = state.changes.filter((change) => movesRequests(change) && change.ended_at >= Math.max(start, startedAt));
    const secondsPerLetter = (LETTER_PX * (serving.now - start)) / (throughput.clientWidth || 1);
    const marks = {
      shapes: moves.map(({ ended_at: at }) => ({
        type: "line", xref: "x", yref: "paper", x0: format.plotTime(at), x1: format.plotTime(at), y0: 0, y1: 1,
        line: { color: css("--mark"), width: 1.5, dash: "dot" },
      })),
      annotations: labelsOf(moves, secondsPerLetter).map(({ at, text, versions }) => ({
        xref: "x", yref: "paper", x: format.plotTime(at), y: 1, yanchor: "top", xanchor: "left", showarrow: false,
        text, font: { size: 10, color: css("--mark") }, hovertext: t("remap_mark", versions.join(", ")),
      })),
    };
    const line = (name, values, color, extra = {}) => ({
      type: "scatter", mode: "lines", name, x: times, y: values, line: { color, width: 1.6, ...extra.line }, ...extra.trace,
    });
    const time = { type: "date", range, nticks: 6, tickformat: serving.now - start < 300 ? "%H:%M:%S" : "%H:%M", hoverformat: "%H:%M:%S" };
    chart(throughput, [
      line(t("generated_rate"), points.map((point) => point.generated_tps), css("--series-1"), { trace: { fill: "tozeroy", fillcolor: css("--series-1-soft") } }),
      line(t("prompt_rate"), points.map((point) => point.prompt_tps), css("--series-2")),
    ], { ...marks, xaxis: time, yaxis: { rangemode: "tozero", nticks: 4 } });
    chart(load, [
      line(t("running_mean"), points.map((point) => point.running), css("--series-1"), { line: { shape: "hv" } }),
      line(t("running_peak"), points.map((point) => point.running_peak), css("--series-1"), { line: { shape: "hv", width: 1, dash: "dot" } }),
      line(t("waiting_mean"), points.map((point) => point.waiting), css("--series-3"), { line: { shape: "hv" } }),
      line(t("kv_used"), points.map((point) => kvShare(point, serving)), css("--series-2"), { trace: { yaxis: "y2" } }),
    ], {
      ...marks, xaxis: time, margin: { l: 40, r: 44, t: 8, b: 28 },
      yaxis: { rangemode: "tozero", nticks: 4 },
      yaxis2: { overlaying: "y", side: "right", range: [0, 1], tickformat: ".0%", tickvals: [0, 0.5, 1], showgrid: false },
    });
  }

  on("event", follow);
  on("remaps", redraw);
  const panel = { id: "serving", node, refresh, redraw };
  return [panel];
}

// Whether new requests have gone to other weights since: not for a version made, or named, beside the current one.
function movesRequests({ kind, state: outcome, name }) {
  return kind === "failed_version" || (outcome === "done" && !name && kind !== "start");
}

// One label for marks that are too close for one each.
function labelsOf(moves, secondsPerLetter) {
  const labels = [];
  for (const { ended_at: at, version } of [...moves].sort((a, b) => a.ended_at - b.ended_at)) {
    const last = labels.at(-1);
    const name = `v${Number(version)}`;
    if (last && at < last.at + secondsPerLetter * (last.text.length + 1)) {
      last.versions.push(name);
      last.text = `${last.versions[0]} … ${name}`;
    } else {
      labels.push({ at, text: name, versions: [name] });
    }
  }
  return labels;
}

function kvShare(point, serving) {
  const total = serving.kv?.total_blocks;
  return total ? point.kv_used / total : null;
}

function tileList(serving) {
  const { throughput, latency, kv, load } = serving;
  const spread = (measure) => `p90 ${format.seconds(measure?.p90)} · p99 ${format.seconds(measure?.p99)}`;
  return [
    tile(t("generated_rate"), format.short(throughput?.generated_tokens_per_second), t("tokens_per_second")),
    tile(t("prompt_rate"), format.short(throughput?.prompt_tokens_per_second), t("tokens_per_second")),
    tile(`${t("first_token")} · ${t("median")}`, format.seconds(latency?.first_token?.p50), spread(latency?.first_token)),
    tile(`${t("per_token")} · ${t("median")}`, format.seconds(latency?.per_token?.p50), spread(latency?.per_token)),
    tile(`${t("running")} · ${t("mean")}`, few(load.running.mean),
      t("load_detail", format.number(load.running.peak), few(load.waiting.mean), format.number(load.waiting.peak))),
    tile(`${t("kv_cache")} · ${t("mean")}`, kv.total_blocks ? format.percent(load.kv_blocks.mean / kv.total_blocks) : "–",
      t("kv_blocks", format.number(load.kv_blocks.peak), format.number(kv.total_blocks))),
  ];
}

// A mean of few things: one decimal, and not "0" for what was there.
const few = (mean) => (mean > 0 && mean < 0.1 ? `<${format.number(0.1, 1)}` : format.number(mean, 1));

function tile(name, value, detail) {
  return h("div", { class: "tile" }, h("span", {}, name), h("b", {}, value), h("small", {}, detail));
}
