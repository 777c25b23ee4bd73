// The server: requests with the key, errors as sentences, and streams of events.

import { ask, h } from "./dom.js";

const KEY = "oneloop.key";

export function key() {
  return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";
}

export function setKey(value, keep) {
  sessionStorage.removeItem(KEY);
  localStorage.removeItem(KEY);
  if (value) (keep ? localStorage : sessionStorage).setItem(KEY, value);
}

/** Whether the key outlives this tab. */
export function keepsKey() {
  return localStorage.getItem(KEY) !== null;
}

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** What a failed answer says, in whatever way it says it. */
async function complaint(response) {
  let message = "";
  try {
    const body = await response.json();
    message = body.error?.message ?? body.message ?? "";
  } catch {
    // A proxy's page, say.
  }
  if (response.status === 401) message = key() ? "The server does not take this API key." : "The server asks for an API key.";
  return new ServerError(response.status, message || `The server answered ${response.status} ${response.statusText}.`);
}

let asking = null;

/** Ask for a key once, whoever needs it. Resolves to whether one was given. */
export function askForKey(why) {
  asking ??= (async () => {
    const keep = h("input", { type: "checkbox", id: "keep-key" });
    keep.checked = keepsKey();
    const given = await ask({
      title: "API key", text: why, value: "", kind: "password", action: "Use this key",
      extra: h("label", { class: "row", for: "keep-key" }, keep, "Keep it in this browser, not only in this tab"),
    });
    asking = null;
    if (!given) return false;
    setKey(given.trim(), keep.checked);
    return true;
  })();
  return asking;
}

/** A request of this server; a 401 asks for a key and tries again. Throws ServerError. */
export async function request(path, { body, signal, quiet = false } = {}) {
  for (;;) {
    const headers = {};
    if (key()) headers.Authorization = `Bearer ${key()}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, {
        method: body === undefined ? "GET" : "POST", headers, signal,
        body: body === undefined ? undefined : JSON.stringify(body),
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(0, "The server cannot be reached.");
    }
    if (response.ok) return response;
    const error = await complaint(response);
    if (error.status !== 401 || quiet || !(await askForKey(error.message))) throw error;
  }
}

/** The events of a stream as JSON, until [DONE]. Throws ServerError when it ends before that, or tells of an error. */
export async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ServerError(0, "The server went away in the middle of the answer.");
      rest += value;
      const parts = rest.split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        // Comments keep the connection open.
        if (!part.startsWith("data: ")) continue;
        if (part === "data: [DONE]") return;
        const event = JSON.parse(part.slice(6));
        if (event.error) throw new ServerError(event.error.code ?? 0, event.error.message ?? "The server failed.");
        yield event;
      }
    }
  } catch (error) {
    if (signal?.aborted || error instanceof ServerError) throw error;
    throw new ServerError(0, "The server went away in the middle of the answer.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
