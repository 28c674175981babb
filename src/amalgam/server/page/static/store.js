// Conversations, kept in this browser (IndexedDB) and told to its other tabs. Without storage they live as long as the
// page, and `isLasting` says so.
//
// What others have stored is never overwritten unseen: in one transaction a conversation is brought together with what
// there is of it (see merge.js).

import { apply, isSame, merge, partsOf } from "./merge.js";
import { tell } from "./tabs.js";

const NAME = "amalgam.chat";
const STORE = "conversations";

let database = null;
export let isLasting = true;
const seen = new Map(); // id → the parts of what this tab last saw stored

const settled = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

// All conversations, once, at the start.
export async function openStore() {
  try {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    database = await settled(request);
    database.onversionchange = () => database.close();
    const found = await settled(database.transaction(STORE).objectStore(STORE).getAll());
    for (const conversation of found) seen.set(conversation.id, partsOf(conversation));
    return found;
  } catch {
    database = null;
    isLasting = false;
    return [];
  }
}

async function write(change) {
  const transaction = database.transaction(STORE, "readwrite");
  const done = new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error ?? new DOMException("", "AbortError"));
  });
  change(transaction.objectStore(STORE));
  await done;
}

// Stores what has changed here of a conversation, and puts into it what has changed there. Resolves with what became of
// it here: "same", "changed" or "removed".
export async function sync(conversation) {
  if (!database) return "same";
  const { id } = conversation;
  let outcome = "same";
  let written = null;
  await write((store) => {
    store.get(id).onsuccess = ({ target: { result: stored } }) => {
      if (!stored && seen.has(id)) {
        outcome = "removed";
        return;
      }
      const [mine, theirs] = [partsOf(conversation), stored ? partsOf(stored) : new Map()];
      const merged = merge(seen.get(id) ?? new Map(), mine, theirs);
      if (!isSame(merged, mine)) outcome = "changed";
      apply(conversation, merged);
      if (stored) seen.set(id, theirs);
      if (isSame(merged, theirs)) return;
      store.put(conversation);
      written = merged;
    };
  });
  if (written) {
    seen.set(id, written);
    tell({ stored: id });
  }
  return outcome;
}

export async function remove(id) {
  if (!database) return;
  await write((store) => store.delete(id));
  tell({ stored: id });
}

// Stores a conversation that has been removed.
export function restore(conversation) {
  seen.delete(conversation.id);
  return sync(conversation);
}

// A conversation of another tab; undefined: there is none.
export async function read(id) {
  const found = database ? await settled(database.transaction(STORE).objectStore(STORE).get(id)) : undefined;
  if (found) seen.set(id, partsOf(found));
  return found;
}
