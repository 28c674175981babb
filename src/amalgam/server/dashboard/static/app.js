// What the panels share: the server's answers that several of them need, the chosen expert, and the staged changes.

import { get, request, stream } from "./api.js";
import { t } from "./i18n.js";

const listeners = new Map();

export function on(event, listener) {
  if (!listeners.has(event)) listeners.set(event, []);
  listeners.get(event).push(listener);
}

export function emit(event, detail) {
  for (const listener of listeners.get(event) ?? []) listener(detail);
}

export const state = {
  event: null, // the latest event of the stream
  info: null, // GET /model_info
  statistics: null, // GET /dashboard/statistics
  grid: null, // GET /experts/grid as the usage panel shows it
  precision: null, // GET /experts/precision_map
  changes: [], // GET /weights/changes
  mapping: null, // GET /dashboard/mapping
  chosen: null, // {layerId, expertId}
  staged: new Map(), // weight name → {name, layerId, expertId, projection, change, before}
};

// Statistics at least as new as the latest event's: all pages that had the event can be given the same answer.
export function getStatistics(path, query = {}) {
  return get(path, { ...query, statistics_version: state.event?.statistics_version });
}

export async function loadInfo() {
  state.info = await get("model_info");
  emit("info");
}

export async function loadStatistics() {
  state.statistics = await get("dashboard/statistics");
}

export async function loadPrecision() {
  state.precision = hasStatistics() ? await get("experts/precision_map") : null;
  emit("precision");
}

export async function loadRemaps() {
  ({ changes: state.changes } = await get("weights/changes"));
  emit("remaps");
}

export async function loadMapping() {
  state.mapping = await get("dashboard/mapping");
  emit("mapping");
}

// Shows each step of a change of the weights with onStep(status) until it has ended, and returns its last status.
export async function followChange(id, onStep) {
  let status = null;
  const take = (next) => {
    status = next;
    if (next.state === "running") onStep(next);
  };
  await stream(`weights/changes/${id}/events`, undefined, take);
  if (!status || status.state === "running") throw new Error(t("change_unknown"));
  return status;
}

// Begins a change, and returns its last status; what ends it otherwise is an error.
export async function changeWeights(body, onStep) {
  const status = await followChange((await request("POST", "weights/changes", body)).id, onStep);
  if (status.state !== "done") throw new Error(status.error);
  return status;
}

export function choose(layerId, expertId) {
  state.chosen = { layerId, expertId };
  emit("chosen");
}

export const hasStatistics = () => Boolean(state.statistics?.is_counted);

// The word for why panels about experts are empty; null where they are not.
export function whyEmpty() {
  if (hasStatistics()) return null;
  return state.info?.sizes.experts_per_layer ? "no_statistics" : "no_experts";
}

// Shares of a layer's use, as multiples of the even share: [layers][experts]; null for a layer without use.
export function relativeUse({ values, expert_counts: counts }) {
  return values.map((row, index) => {
    let sum = 0;
    for (const value of row) sum += value;
    return sum > 0 ? row.map((value) => (value / sum) * (counts?.[index] ?? row.length)) : null;
  });
}
