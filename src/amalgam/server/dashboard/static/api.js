// HTTP to the server that the page came from; addresses are relative, so that a proxy may put it under any path.

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function failure(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message ?? message;
  } catch {
    // not one of the server's own answers: the status has to do
  }
  return new ApiError(message, response.status);
}

async function send(path, body, signal) {
  const options = { signal, headers: { Accept: "application/json" } };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  if (!response.ok) throw await failure(response);
  return response;
}

export async function get(path, query = {}, signal = undefined) {
  const pairs = Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const search = new URLSearchParams(pairs).toString();
  return (await send(search ? `${path}?${search}` : path, undefined, signal)).json();
}

export async function post(path, body, signal = undefined) {
  return (await send(path, body, signal)).json();
}

// Server-sent events by fetch, which unlike EventSource can post a body. Returns at the end of the stream.
export async function stream(path, body, onEvent, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.startsWith("data: ") ? part.slice(6) : "";
      if (data && data !== "[DONE]") onEvent(JSON.parse(data));
    }
  }
}
