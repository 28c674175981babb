// Conversations, kept in this browser (IndexedDB), and told to its other tabs. Without storage they live as long as the
// page, and `isLasting` says so.

const NAME = "amalgam.chat";
const STORE = "conversations";
const channel = globalThis.BroadcastChannel ? new BroadcastChannel(NAME) : null;

let database = null;
export let isLasting = true;

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
    return await settled(database.transaction(STORE).objectStore(STORE).getAll());
  } catch {
    database = null;
    isLasting = false;
    return [];
  }
}

async function write(change) {
  if (!database) return;
  const transaction = database.transaction(STORE, "readwrite");
  const done = new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error ?? new DOMException("", "AbortError"));
  });
  change(transaction.objectStore(STORE));
  await done;
}

export async function save(conversation) {
  await write((store) => store.put(conversation));
  channel?.postMessage({ saved: conversation.id });
}

export async function remove(id) {
  await write((store) => store.delete(id));
  channel?.postMessage({ removed: id });
}

export async function read(id) {
  return database ? settled(database.transaction(STORE).objectStore(STORE).get(id)) : undefined;
}

// onChange({saved | removed: id}) for what other tabs do.
export function onOtherTabs(onChange) {
  channel?.addEventListener("message", ({ data }) => onChange(data));
}
