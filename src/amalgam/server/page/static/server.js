// What is known of the server: whether it serves, which model, its defaults, and the precision of its experts.

import { get } from "./api.js";

const BUSY_MS = 2000; // between two looks while it loads or cannot be reached
const IDLE_MS = 15000;
const listeners = [];
let timer = 0; // of the next look
let uptime = 0; // seconds, when it was last looked at

export const server = {
  status: "connecting", // then the server's own word, or "disconnected"
  model: "", // as it calls itself
  modelId: "", // what requests name
  version: null, // of the weights, for new requests
  info: null, // GET /model_info
};

export function onServer(listener) {
  listeners.push(listener);
}

const isReady = () => server.status === "healthy";
const state = () => [server.status, server.model, server.version, server.info];

// Looks at once, calls the listeners if anything has changed, and will look again: soon, if something is wrong.
export async function look() {
  const before = state();
  try {
    const found = await get("./");
    const isRestarted = found.uptime_seconds < uptime; // its numbers mean other weights
    uptime = found.uptime_seconds;
    Object.assign(server, { status: found.status, model: found.model, version: found.weight_version });
    if (isReady() && (isRestarted || server.info?.weight_version.version !== server.version)) await describe();
  } catch (error) {
    if (error.status === undefined) server.status = "disconnected";
  }
  if (state().some((value, index) => value !== before[index])) for (const listener of listeners) listener();
  lookLater();
}

function lookLater() {
  clearTimeout(timer);
  timer = setTimeout(() => { if (document.hidden) lookLater(); else look(); }, isReady() ? IDLE_MS : BUSY_MS);
}

async function describe() {
  const [models, info] = await Promise.all([get("v1/models"), get("model_info")]);
  server.modelId = models.data[0].id;
  server.info = info;
}

// Whether answers come with the experts that they used.
export const tellsExperts = () => Boolean(server.info?.counts_experts);

// In which precision a weight version holds its experts (GET /experts/precision_map), or all its weights if there are
// no experts (GET /model_info). null: the server does not tell, or no longer has that version. It is asked each time:
// after a restart the same number may mean other weights, and the browser keeps what has not changed.
export async function precisionOf(version) {
  try {
    if (tellsExperts()) return await get("experts/precision_map", { weight_version: version });
    const info = server.info?.sizes.experts_per_layer ? null : await get("model_info");
    return info?.weight_version.version === version ? info : null;
  } catch {
    return null;
  }
}
