// What the parts of the page share: the conversations, the one that is shown, and the answers under way.

import * as store from "./store.js";
import { endElsewhere, startTabs, stopElsewhere, writtenElsewhere } from "./tabs.js";
import { newConversation } from "./tree.js";

const DEFAULTS = "amalgam.chat.defaults";
const listeners = new Map();
const gone = new Map(); // id → a conversation that has been removed, here or in another tab
let hearing = Promise.resolve(); // what other tabs tell is followed in its order

export const app = {
  conversations: new Map(), // id → conversation; those without messages are not kept
  current: null,
  running: new Map(), // conversation id → {node, clock, controller}, of this tab
};

// Whether an answer is being written in a conversation, here or in another tab.
export const isAnswering = (id) => app.running.has(id) || writtenElsewhere(id) !== undefined;

// Whether an answer of the conversation that is shown is being written. One that is open without was cut off with its tab.
export function isGrowing({ id, isOpen }) {
  return Boolean(isOpen) && [app.running.get(app.current.id)?.node.id, writtenElsewhere(app.current.id)].includes(id);
}

export function on(event, listener) {
  if (!listeners.has(event)) listeners.set(event, []);
  listeners.get(event).push(listener);
}

export function emit(event, detail) {
  for (const listener of listeners.get(event) ?? []) listener(detail);
}

// Events: "list" (titles, order, what runs), "open" (another conversation is shown; with keepsText what is being written
// goes along), "thread" (its messages or settings have changed), "toast" ({text, undo}).

export async function start() {
  for (const conversation of await store.openStore()) app.conversations.set(conversation.id, conversation);
  startTabs((message) => { hearing = hearing.then(() => hear(message)).catch(tellFailure); });
  app.current = app.conversations.get(location.hash.slice(1)) ?? fresh();
  on("open", showAddress);
  emit("list");
  emit("open");
}

// The address names the conversation that is shown, so that it is there again when the page is loaded again.
function showAddress() {
  const isKept = app.conversations.has(app.current.id);
  history.replaceState(null, "", isKept ? `#${app.current.id}` : location.pathname + location.search);
}

async function hear({ stored, begun, ended, tab, left, stop }) {
  if (stop) app.running.get(stop)?.controller.abort();
  if (stored ?? ended) await follow(stored ?? ended);
  if (ended) endElsewhere(ended, tab);
  if (!(stored ?? ended ?? begun ?? left)) return;
  emit("list");
  emit("thread");
}

// Takes what another tab has made of a conversation.
async function follow(id) {
  const conversation = app.conversations.get(id) ?? gone.get(id);
  if (!conversation) {
    const found = await store.read(id);
    if (found) app.conversations.set(id, found);
  } else if (await store.sync(conversation) === "removed") {
    lose(conversation);
  } else {
    gone.delete(id);
    app.conversations.set(id, conversation);
  }
}

// A conversation that another tab has removed.
function lose(conversation) {
  leave(conversation);
  if (app.current !== conversation) return;
  app.current = fresh();
  emit("open", { keepsText: true });
}

function leave(conversation) {
  gone.set(conversation.id, conversation);
  app.running.get(conversation.id)?.controller.abort();
  app.conversations.delete(conversation.id);
}

function fresh() {
  return newConversation(defaults());
}

export function openNew() {
  if (app.current.leaf !== null || app.conversations.has(app.current.id)) app.current = fresh();
  emit("open");
  emit("list");
}

export function open(id) {
  app.current = app.conversations.get(id) ?? fresh();
  emit("open");
  emit("list");
}

// Keeps a conversation that has messages.
export async function keep(conversation, { isTouched = false } = {}) {
  if (gone.has(conversation.id)) return;
  if (isTouched) conversation.updatedAt = Date.now();
  if (!app.conversations.has(conversation.id) && !conversation.leaf) return;
  app.conversations.set(conversation.id, conversation);
  if (conversation.id === app.current.id) showAddress();
  emit("list");
  try {
    const outcome = await store.sync(conversation);
    if (outcome === "same") return;
    if (outcome === "removed") lose(conversation);
    emit("list");
    emit("thread");
  } catch (error) {
    tellFailure(error);
  }
}

function tellFailure(error) {
  emit("toast", { word: "save_failed", values: [error.message] });
}

export async function discard(conversation) {
  leave(conversation);
  if (app.current.id === conversation.id) openNew();
  emit("list");
  await store.remove(conversation.id).catch(tellFailure);
}

// Brings back what was discarded.
export async function restore(conversation) {
  gone.delete(conversation.id);
  app.conversations.set(conversation.id, conversation);
  emit("list");
  await store.restore(conversation).catch(tellFailure);
}

// Stops the answer in a conversation, whichever tab writes it.
export function stop(conversation) {
  const run = app.running.get(conversation.id);
  if (run) {
    run.controller.abort();
    return;
  }
  stopElsewhere(conversation.id);
  emit("list");
  emit("thread");
}

export function defaults() {
  try {
    return JSON.parse(localStorage.getItem(DEFAULTS)) ?? {};
  } catch {
    return {};
  }
}

export function setDefaults({ system, sampling, tools }) {
  try {
    localStorage.setItem(DEFAULTS, JSON.stringify({ system, sampling, tools }));
  } catch {
    // new chats begin empty
  }
}
