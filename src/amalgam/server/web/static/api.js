// HTTP to the server that the page came from; addresses are relative, so that a proxy may put it under any path.

const WATCH_MS = 500;
const KEY = "amalgam.key";
const SENDABLE = /^[\x21-\x7e]+$/; // a key that the server may know; others no header may hold
export const isSendable = (text) => SENDABLE.test(text);

let key = storedKey();
let asking = null; // the answer to a question that is open: one question for all who wait
let locked = { ask: null, isWanted: () => false };

export class ApiError extends Error {
  constructor(message, status, type = null, retryAfter = null) {
    super(message);
    this.status = status;
    this.type = type; // the server's own word for the error
    this.retryAfter = retryAfter; // seconds, if the server says when
  }
}

function storedKey() {
  try {
    const found = sessionStorage.getItem(KEY);
    return found !== null && isSendable(found) ? found : null;
  } catch {
    return null; // storage may be switched off
  }
}

// ask(why, isRefused) → the key to try instead, or null; called for refusals of which isWanted(error) is true. isRefused:
// a key was given.
export function onLocked(ask, isWanted) {
  locked = { ask, isWanted };
}

async function askForKey(tried, why) {
  if (key !== tried) return true; // another has been given meanwhile
  asking ??= locked.ask(why, tried !== null).finally(() => { asking = null; });
  const given = await asking;
  if (given === null) return false;
  key = given;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // kept for as long as the page is open
  }
  return true;
}

// Asks for another key, whatever has been declined before. Whether one was given.
export const changeKey = (why) => askForKey(key, why);

async function failure(response) {
  let message = `${response.status} ${response.statusText}`;
  let type = null;
  try {
    const { error } = await response.json();
    message = error.message ?? message;
    type = error.type ?? null;
  } catch {
    // not one of the server's own answers: the status has to do
  }
  const seconds = Number.parseFloat(response.headers.get("retry-after"));
  return new ApiError(message, response.status, type, Number.isFinite(seconds) ? seconds : null);
}

async function send(path, body, signal, method = body === undefined ? "GET" : "POST") {
  for (;;) {
    const tried = key;
    const options = { method, signal, headers: { Accept: "application/json" } };
    if (tried) options.headers.Authorization = `Bearer ${tried}`;
    if (body !== undefined) {
      options.headers["Content-Type"] = "application/json";
      options.body = JSON.stringify(body);
    }
    const response = await fetch(path, options);
    if (response.ok) return response;
    const error = await failure(response);
    if (!locked.isWanted(error) || signal?.aborted || !(await askForKey(tried, error.message))) throw error;
  }
}

export async function get(path, query = {}, signal = undefined) {
  const pairs = Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const search = new URLSearchParams(pairs).toString();
  return (await send(search ? `${path}?${search}` : path, undefined, signal)).json();
}

// Any other method; `body` may be undefined.
export async function request(method, path, body = undefined, signal = undefined) {
  return (await send(path, body, signal, method)).json();
}

export async function post(path, body, signal = undefined) {
  return (await send(path, body, signal)).json();
}

// A link cannot carry a key: where there is one, what the link leads to is fetched and saved. For `onclick` of links.
export async function followWithKey(event) {
  const link = event.currentTarget;
  if (!key) return; // the browser follows it
  event.preventDefault();
  const path = link.getAttribute("href");
  const response = await send(path, undefined, undefined);
  const named = /filename="([^"]+)"/.exec(response.headers.get("content-disposition") ?? "");
  const copy = document.createElement("a");
  copy.href = URL.createObjectURL(await response.blob());
  copy.download = named?.[1] ?? (link.getAttribute("download") || path.split("/").pop());
  copy.click();
  setTimeout(() => URL.revokeObjectURL(copy.href), 60000);
}

// Server-sent events by fetch, which unlike EventSource can post a body. Returns at the end of the stream.
// It fails when no event has come for `silenceMs()`: a connection may stay open with nobody behind it, and comments that
// only keep it open do not count. Raises an ApiError of type "cut_off" if the connection breaks in the midst.
export async function stream(path, body, onEvent, { signal, silenceMs } = {}) {
  const controller = new AbortController();
  const leave = () => controller.abort(signal.reason);
  if (signal?.aborted) leave();
  signal?.addEventListener("abort", leave);
  let heardAt = performance.now();
  const watchdog = silenceMs && setInterval(() => {
    if (performance.now() - heardAt > silenceMs()) controller.abort(new Error("silence"));
  }, WATCH_MS);
  try {
    const response = await send(path, body, controller.signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        throw controller.signal.aborted ? error : new ApiError(error.message, null, "cut_off");
      });
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
        if (!data) continue;
        heardAt = performance.now();
        if (data !== "[DONE]") onEvent(JSON.parse(data));
      }
    }
  } finally {
    clearInterval(watchdog);
    signal?.removeEventListener("abort", leave);
    controller.abort(); // of a stream that was left early the rest is not wanted
  }
}
