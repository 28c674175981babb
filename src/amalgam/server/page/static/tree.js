// A conversation as a tree: editing or regenerating a message begins a branch beside it, and nothing is lost.
//
// conversation: {id, title, createdAt, updatedAt, system, sampling, tools, nodes: {id: node}, leaf, version}
// node: {id, parent (null: a first message), role: "user" | "assistant" | "tool", content, at, …}; of an assistant also
// reasoning, toolCalls: [{id, name, arguments}], finish, figures, use, error; of a tool callId and name.

export const VERSION = 1;
export const MAX_TITLE = 80;

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36).padStart(2, "0")).join("");

export function newConversation(settings = {}) {
  const now = Date.now();
  return { id: newId(), title: "", createdAt: now, updatedAt: now, system: "", sampling: {}, tools: "", ...settings, nodes: {}, leaf: null, version: VERSION };
}

export function addNode(conversation, parent, fields) {
  const node = { id: newId(), parent, at: Date.now(), ...fields };
  conversation.nodes[node.id] = node;
  show(conversation, node.id);
  return node;
}

// Shows the branch that ends at `leaf`; each message remembers which way it went.
function show(conversation, leaf) {
  conversation.leaf = leaf;
  for (let node = conversation.nodes[leaf]; node?.parent; node = conversation.nodes[node.parent]) conversation.nodes[node.parent].next = node.id;
}

// From the first message to `leaf`.
export function path(conversation, leaf = conversation.leaf) {
  const found = [];
  for (let node = conversation.nodes[leaf]; node; node = conversation.nodes[node.parent]) found.push(node);
  return found.reverse();
}

// The node and those beside it, oldest first.
export function siblings(conversation, { parent }) {
  return Object.values(conversation.nodes).filter((node) => node.parent === parent).sort((a, b) => a.at - b.at);
}

const children = (conversation, id) => Object.values(conversation.nodes).filter((node) => node.parent === id).sort((a, b) => a.at - b.at);

// Shows the branch of `node`, down to its end, as it was last shown.
export function follow(conversation, node) {
  let last = node;
  for (let next = node; next; next = conversation.nodes[last.next] ?? children(conversation, last.id).at(-1)) last = next;
  show(conversation, last.id);
}

// Takes out a node and what follows it; another branch is shown, or what came before. Returns what undoes it: they are
// there again, and shown, unless something else is shown by then.
export function removeNode(conversation, node) {
  const { leaf } = conversation;
  const beside = siblings(conversation, node);
  const doomed = [node.id];
  for (const id of doomed) doomed.push(...children(conversation, id).map((child) => child.id));
  const removed = doomed.map((id) => conversation.nodes[id]);
  for (const id of doomed) delete conversation.nodes[id];
  if (doomed.includes(conversation.leaf)) {
    const index = beside.indexOf(node);
    const other = beside[index - 1] ?? beside[index + 1];
    if (other) follow(conversation, other);
    else conversation.leaf = node.parent;
  }
  const shown = conversation.leaf;
  return () => {
    for (const one of removed) conversation.nodes[one.id] = one;
    if (conversation.leaf === shown) show(conversation, leaf);
  };
}

// The first words of the first message.
export function titleFrom(text) {
  const line = text.trim().split("\n", 1)[0].replace(/\s+/g, " ");
  const characters = [...line];
  return characters.length > MAX_TITLE ? `${characters.slice(0, MAX_TITLE - 1).join("")}…` : line;
}

// What a search looks through: the title and every message of every branch.
export function matches(conversation, words) {
  const texts = [conversation.title, ...Object.values(conversation.nodes).map((node) => node.content)];
  const all = texts.join("\n").toLowerCase();
  return words.toLowerCase().split(/\s+/).filter(Boolean).every((word) => all.includes(word));
}
