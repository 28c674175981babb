// What the panels share: the server's answers that several of them need, the chosen expert, and the staged changes.

import { get } from "./api.js";

const listeners = new Map();

export function on(event, listener) {
  if (!listeners.has(event)) listeners.set(event, []);
  listeners.get(event).push(listener);
}

export function emit(event, detail) {
  for (const listener of listeners.get(event) ?? []) listener(detail);
}

export const state = {
  paths: new Set(), // what this server offers
  event: null, // the latest event of the stream
  info: null, // GET /model_info
  grid: null, // GET /experts/grid as the usage panel shows it
  precision: null, // GET /experts/precision_map
  hints: [],
  remaps: [],
  chosen: null, // {layerId, expertId}
  staged: new Map(), // weight name → {name, layerId, expertId, projection, source}
};

export const offers = (path) => state.paths.has(path);

export async function loadPaths() {
  state.paths = new Set(Object.keys((await get("openapi.json")).paths));
}

export async function loadInfo() {
  state.info = await get("model_info");
  emit("info");
}

export async function loadPrecision() {
  if (!offers("/experts/precision_map")) return;
  state.precision = await get("experts/precision_map");
  emit("precision");
}

export async function loadRemaps() {
  if (!offers("/remaps")) return;
  state.remaps = (await get("remaps")).remaps;
  emit("remaps");
}

export function choose(layerId, expertId) {
  state.chosen = { layerId, expertId };
  emit("chosen");
}

export const hasExperts = () => Boolean(state.info?.sizes?.experts_per_layer) && offers("/experts/grid");

// Shares of a layer's use, as multiples of the even share: [layers][experts]; null for a layer without use.
export function relativeUse(values) {
  return values.map((row) => {
    let sum = 0;
    for (const value of row) sum += value;
    return sum > 0 ? row.map((value) => (value / sum) * row.length) : null;
  });
}
