// What the parts of the page share: the conversations, the one that is shown, and the answers under way.

import * as store from "./store.js";
import { newConversation } from "./tree.js";

const DEFAULTS = "amalgam.chat.defaults";
const listeners = new Map();

export const app = {
  conversations: new Map(), // id → conversation; those without messages are not kept
  current: null,
  running: new Map(), // conversation id → {node, controller, watch}
};

export function on(event, listener) {
  if (!listeners.has(event)) listeners.set(event, []);
  listeners.get(event).push(listener);
}

export function emit(event, detail) {
  for (const listener of listeners.get(event) ?? []) listener(detail);
}

// Events: "list" (titles, order, what runs), "open" (another conversation is shown), "thread" (its messages have
// changed), "toast" ({text, undo}).

export async function start() {
  for (const conversation of await store.openStore()) {
    for (const node of Object.values(conversation.nodes)) if (node.isOpen) close(node);
    app.conversations.set(conversation.id, conversation);
  }
  store.onOtherTabs(follow);
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

// An answer that was under way when its page was closed.
function close(node) {
  delete node.isOpen;
  node.finish ??= "interrupted";
}

async function follow({ saved, removed }) {
  const id = saved ?? removed;
  if (app.running.has(id)) return;
  const conversation = saved ? await store.read(saved) : undefined;
  if (conversation) app.conversations.set(id, conversation);
  else app.conversations.delete(id);
  emit("list");
  if (app.current.id !== id) return;
  app.current = conversation ?? fresh();
  emit(conversation ? "thread" : "open");
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
  if (isTouched) conversation.updatedAt = Date.now();
  if (!app.conversations.has(conversation.id) && !conversation.leaf) return;
  app.conversations.set(conversation.id, conversation);
  if (conversation.id === app.current.id) showAddress();
  emit("list");
  try {
    await store.save(conversation);
  } catch (error) {
    emit("toast", { word: "save_failed", values: [error.message] });
  }
}

export async function discard(conversation) {
  app.running.get(conversation.id)?.controller.abort();
  app.conversations.delete(conversation.id);
  if (app.current.id === conversation.id) openNew();
  emit("list");
  await store.remove(conversation.id);
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
