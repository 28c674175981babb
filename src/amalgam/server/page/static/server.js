// What is known of the server: whether it serves, which model, its defaults, and the precision of its experts.

import { get } from "./api.js";

const BUSY_MS = 2000; // between two looks while it loads or cannot be reached
const IDLE_MS = 15000;
const listeners = [];
let timer = 0; // of the next look
const maps = new Map(); // weight version → the precision map, or null where there is none

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

// Looks at once, calls the listeners if anything has changed, and will look again: soon, if something is wrong.
export async function look() {
  const before = JSON.stringify([server.status, server.model, server.version, Boolean(server.info)]);
  try {
    const found = await get("./");
    Object.assign(server, { status: found.status, model: found.model, version: found.weight_version });
    if (isReady() && (!server.info || server.info.weight_version !== server.version)) await describe();
  } catch (error) {
    if (error.status === undefined) server.status = "disconnected";
  }
  if (JSON.stringify([server.status, server.model, server.version, Boolean(server.info)]) !== before) for (const listener of listeners) listener();
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

// Of one weight version; null where the server does not tell, or no longer has that version.
export async function precisionMap(version) {
  if (!maps.has(version)) {
    try {
      const map = await get("experts/precision_map");
      maps.set(map.weight_version, map);
    } catch {
      return null;
    }
  }
  return maps.get(version) ?? null;
}
