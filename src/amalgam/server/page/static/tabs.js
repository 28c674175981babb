// What the tabs of this page tell each other: what they have stored, and which answers they are writing.
//
// {stored: id}: a conversation was saved or removed. {begun: id, node, tab}, {ended: id, tab}: an answer in it.
// {asked: true}: a new tab wants to hear what is being written. {left: tab}: one was closed. {stop: id}: whoever writes in
// this conversation shall stop.

import { newId } from "./tree.js";

const channel = globalThis.BroadcastChannel ? new BroadcastChannel("amalgam.chat") : null;
const tab = newId();
const own = new Map(); // conversation id → the id of the answer that this tab is writing
const others = new Map(); // conversation id → {node, tab}

// onMessage(message) is called after what it says of answers has been noted, but for an end: the caller ends it, once it
// has what was stored before.
export function startTabs(onMessage) {
  channel?.addEventListener("message", ({ data }) => {
    if (data.begun) others.set(data.begun, { node: data.node, tab: data.tab });
    if (data.asked) for (const [id, node] of own) tell({ begun: id, node, tab });
    if (data.left) for (const [id, writer] of others) if (writer.tab === data.left) others.delete(id);
    onMessage(data);
  });
  addEventListener("pagehide", () => tell({ left: tab }));
  tell({ asked: true });
}

export function tell(message) {
  channel?.postMessage(message);
}

export function begin(id, node) {
  own.set(id, node);
  tell({ begun: id, node, tab });
}

export function end(id) {
  own.delete(id);
  tell({ ended: id, tab });
}

// The id of the answer that another tab is writing in a conversation; undefined: none.
export const writtenElsewhere = (id) => others.get(id)?.node;

export function endElsewhere(id, writer) {
  if (others.get(id)?.tab === writer) others.delete(id);
}

// Should that tab have vanished without a word, its answer is over, too.
export function stopElsewhere(id) {
  others.delete(id);
  tell({ stop: id });
}
