// One answer as it comes: the body that asks for it, the stream, and what is measured on the way.

import { events, request, ServerError } from "./api.js";

/** A chat's message in the API's words. */
function message(node) {
  if (node.role === "tool") return { role: "tool", tool_call_id: node.callId, content: node.content };
  if (node.role === "assistant") {
    const calls = (node.calls ?? []).map(({ id, name, arguments: given }) => (
      { id, type: "function", function: { name, arguments: given } }));
    return { role: "assistant", content: node.content, ...(calls.length ? { tool_calls: calls } : {}) };
  }
  const files = node.files ?? [];
  const texts = files.filter((file) => file.text !== undefined).map((file) => {
    const longest = Math.max(2, ...(file.text.match(/`+/g) ?? []).map((run) => run.length));
    const fence = "`".repeat(longest + 1);
    return `${file.name}:\n${fence}\n${file.text}\n${fence}`;
  });
  const text = [...texts, node.content].filter(Boolean).join("\n\n");
  const images = files.filter((file) => file.image !== undefined);
  if (!images.length) return { role: "user", content: text };
  return {
    role: "user",
    content: [...images.map((file) => ({ type: "image_url", image_url: { url: file.image } })), { type: "text", text }],
  };
}

/** The body for the answer to these messages. settings: see settings.js. */
export function bodyOf(nodes, settings) {
  const messages = nodes.map(message);
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  return { model: settings.model, messages, ...settings.sampling, ...settings.structure };
}

/** The answer that `node` becomes. onchange: called for each piece, onend once. */
export class Generation {
  #abort = new AbortController();
  #began = performance.now();
  #first = 0;

  constructor(node, { onchange, onend }) {
    this.node = node;
    this.onchange = onchange;
    this.onend = onend;
  }

  stop() {
    this.#abort.abort();
  }

  /** nodes: what came before. goesOn: whether what the node holds already is to be continued. */
  async run(nodes, settings, goesOn = false) {
    const { node } = this;
    delete node.error;
    const body = { ...bodyOf(nodes, settings), stream: true, stream_options: { include_usage: true } };
    if (goesOn) {
      body.messages.push({ role: "assistant", content: node.content });
      Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
    }
    if (settings.logprobs) Object.assign(body, { logprobs: true, top_logprobs: 5 });
    try {
      const response = await request("v1/chat/completions", { body, signal: this.#abort.signal });
      for await (const event of events(response, this.#abort.signal)) this.#take(event);
    } catch (error) {
      if (this.#abort.signal.aborted) node.finish = "stopped";
      else node.error = { message: error.message, status: error instanceof ServerError ? error.status : 0 };
    }
    const took = performance.now() - this.#began;
    node.stats = { ...node.stats, total: took };
    if (this.#first) {
      node.stats.first = this.#first - this.#began;
      node.stats.writing = performance.now() - this.#first;
    }
    this.onend(this);
  }

  #take(event) {
    const { node } = this;
    if (event.usage) {
      const { prompt_tokens: prompt, completion_tokens: completion, prompt_tokens_details: details } = event.usage;
      node.stats = { ...node.stats, prompt, completion, cached: details?.cached_tokens ?? 0 };
      const reasoning = event.usage.completion_tokens_details?.reasoning_tokens;
      if (reasoning) node.stats.reasoning = reasoning;
    }
    const choice = event.choices?.[0];
    if (!choice) return;
    const { delta = {} } = choice;
    const reasoning = delta.reasoning_content ?? delta.reasoning;
    if (!this.#first && (delta.content || reasoning || delta.tool_calls)) this.#first = performance.now();
    if (reasoning) node.reasoning = (node.reasoning ?? "") + reasoning;
    if (delta.content) node.content += delta.content;
    for (const call of delta.tool_calls ?? []) {
      node.calls ??= [];
      const known = (node.calls[call.index] ??= { id: "", name: "", arguments: "" });
      known.id ||= call.id ?? "";
      known.name += call.function?.name ?? "";
      known.arguments += call.function?.arguments ?? "";
    }
    for (const token of choice.logprobs?.content ?? []) {
      node.tokens ??= [];
      node.tokens.push([token.token, token.logprob, token.top_logprobs.map((other) => [other.token, other.logprob])]);
    }
    if (choice.finish_reason) node.finish = choice.finish_reason;
    this.onchange(this);
  }
}
