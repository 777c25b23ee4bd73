// A sequence by itself: what happened to it, and why its prefix was found as far as it was.

import { h } from "./dom.js";
import { milliseconds } from "./live_charts.js";

const CAUSES = {
  hit: "Found", first: "Nothing like it before", differs: "Differs", evicted: "Evicted", flushed: "Flushed",
  namespace: "Another namespace", not_cached_yet: "Not computed yet", not_resumable: "Cannot be resumed",
  every_token: "Every token was needed", disabled: "Prefix cache off",
};
const EVENTS = {
  queued: "queued", admitted: "admitted", prefill: "chunk of the prompt", forced: "forced by the grammar",
  pooling: "chunk of the text", first_token: "first token", retracted: "retracted", finished: "finished",
};

function describe(event) {
  const name = EVENTS[event.kind] ?? event.kind;
  if (event.kind === "queued" || event.kind === "prefill" || event.kind === "forced" || event.kind === "pooling") {
    return event.value ? `${name}, ${event.value} tokens` : name;
  }
  if (event.kind === "admitted") return `${name}, ${event.value} tokens cached`;
  return event.kind === "finished" ? `${name}: ${event.value}` : name;
}

/** The dialog's content. answer: of /requests/{id}/cache. */
export function sequenceDetail(answer, close) {
  const share = answer.prompt_tokens ? answer.cached_tokens / answer.prompt_tokens : 0;
  const hit = h("div", { class: "c3 swatch" });
  hit.style.width = `${(share * 100).toFixed(1)}%`;
  hit.style.height = "100%";
  const parts = [
    h("div", { class: "heading" },
      h("h2", { id: "detail-title", text: answer.id }),
      h("button", { type: "button", class: "plain", text: "Close", onclick: close })),
    h("h3", { text: `Prefix: ${CAUSES[answer.cause] ?? answer.cause}` }),
    h("div", { class: "bar-line", role: "img",
      "aria-label": `${answer.cached_tokens} of ${answer.prompt_tokens} prompt tokens were cached` }, hit),
    h("p", { class: "small numeric",
      text: `${answer.cached_tokens} of ${answer.prompt_tokens} prompt tokens were cached `
        + `(${answer.cacheable_tokens} could be: whole pages, one token short). ${answer.explanation}` }),
  ];
  if (answer.nearest) {
    parts.push(h("p", { class: "small", text: `It agrees the longest with ${answer.nearest}: ${answer.common_tokens} tokens.` }));
  }
  if (answer.hint === "number") {
    parts.push(h("p", { class: "small", text: "Both go on with a number: a time, a date or a counter?" }));
  }
  if (answer.text) {
    for (const [title, words] of [["This prompt", answer.text.here], ["The other one", answer.text.there]]) {
      parts.push(h("p", { class: "small muted", text: title }),
        h("div", { class: "differ" }, `… ${answer.text.common}`, h("mark", { text: words || "(its end)" }), " …"));
    }
  } else if (answer.first_difference !== null) {
    parts.push(h("p", { class: "small muted", text: "The text is shown where the server was started with --live-text." }));
  }
  parts.push(h("h3", { text: "What happened" }));
  if (answer.timeline.length) {
    parts.push(h("table", {}, h("tbody", {}, ...answer.timeline.map((event) => h("tr", {},
      h("td", { class: "n", text: milliseconds(event.ms) }), h("td", { text: describe(event) }))))));
  } else {
    parts.push(h("p", { class: "small muted", text: "It ended before anybody looked." }));
  }
  return parts;
}
