// Two copies of a conversation, each changed by a tab of its own, become one.
//
// A conversation falls into parts: each message, each value of the sampling, and each other field, as JSON by its place.
// A part that this copy has changed since it last saw the store stays as it is here, and others are as they are stored.

const NESTED = ["nodes", "sampling"];
const NODES = "nodes/";

export function partsOf(conversation) {
  const rows = Object.entries(conversation).flatMap(([name, value]) => (NESTED.includes(name)
    ? Object.entries(value).map(([key, inner]) => [`${name}/${key}`, inner]) : [[name, value]]));
  return new Map(rows.map(([place, value]) => [place, JSON.stringify(value)]));
}

export const isSame = (one, other) => one.size === other.size && [...one].every(([place, part]) => other.get(place) === part);

// seen: the parts that this copy had when it last was as stored; mine: those that it has; theirs: those that are stored.
export function merge(seen, mine, theirs) {
  const merged = new Map();
  for (const place of new Set([...mine.keys(), ...theirs.keys()])) {
    const part = (mine.get(place) === seen.get(place) ? theirs : mine).get(place);
    if (part !== undefined) merged.set(place, part);
  }
  keepParents(merged, seen);
  merged.set("leaf", leafOf(merged, [merged.get("leaf"), theirs.get("leaf"), mine.get("leaf")]));
  return merged;
}

// A message that was removed in one copy, and followed by another one in the other, stays.
function keepParents(merged, seen) {
  const removed = new Map([...seen].filter(([place]) => place.startsWith(NODES) && !merged.has(place)));
  if (!removed.size) return;
  const pending = [...merged.keys()].filter((place) => place.startsWith(NODES));
  for (const place of pending) {
    const parent = NODES + JSON.parse(merged.get(place)).parent;
    if (!merged.has(parent) && removed.has(parent)) {
      merged.set(parent, removed.get(parent));
      pending.push(parent);
    }
  }
}

// The branch that is shown: the first of `wanted` that is there, or the newest.
function leafOf(merged, wanted) {
  const found = wanted.find((leaf) => leaf && merged.has(NODES + JSON.parse(leaf)));
  if (found) return found;
  const nodes = [...merged].filter(([place]) => place.startsWith(NODES)).map(([, part]) => JSON.parse(part));
  return JSON.stringify(nodes.sort((a, b) => a.at - b.at).at(-1)?.id ?? null);
}

// Brings a conversation to these parts. Its messages stay the same objects.
export function apply(conversation, parts) {
  const before = partsOf(conversation);
  for (const [place, part] of parts) {
    if (before.get(place) === part) continue;
    const [holder, key] = holderOf(conversation, place);
    const value = JSON.parse(part);
    if (place.startsWith(NODES) && holder[key]) replace(holder[key], value);
    else holder[key] = value;
  }
  for (const place of before.keys()) {
    if (parts.has(place)) continue;
    const [holder, key] = holderOf(conversation, place);
    delete holder[key];
  }
}

function holderOf(conversation, place) {
  const [name, key] = place.split("/");
  return key === undefined ? [conversation, name] : [conversation[name], key];
}

function replace(target, source) {
  for (const name of Object.keys(target)) delete target[name];
  Object.assign(target, source); // in the order that it is stored in, or it would look changed
}
