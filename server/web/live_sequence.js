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
  if (event.kind === "tokens") return `${event.value} tokens written`;
  if (event.kind === "admitted") return `${name}, ${event.value} tokens cached`;
  return event.kind === "finished" ? `${name}: ${event.value}` : name;
}

// What a sequence is about, between what happens to it: by the last event, [name, colour].
const PHASES = {
  queued: ["waits", 0], admitted: ["reads its prompt", 2], first_token: ["writes", 1], retracted: ["waits again", 5],
};

/** The same as a bar: how long it waited, read and wrote. Nothing where less than two moments are known. */
function spans(timeline) {
  // One that was retracted reads all of it again, and has no first token after that: its last chunk stands for it.
  const again = timeline.findIndex((event) => event.kind === "retracted");
  const turns = timeline.flatMap((event, place) => {
    if (event.kind in PHASES || event.kind === "finished" || event.kind === "tokens") return [event];
    const isLast = again >= 0 && place > again && event.kind === "prefill" && timeline[place + 1]?.kind !== "prefill";
    return isLast ? [{ ...event, kind: "first_token" }] : [];
  });
  const found = turns.slice(1).map((event, place) => [PHASES[turns[place].kind], event.ms - turns[place].ms])
    .filter(([phase]) => phase);
  const whole = found.reduce((sum, [, took]) => sum + took, 0);
  if (!(whole > 0)) return [];
  const line = h("div", { class: "spans", role: "img",
    "aria-label": found.map(([[name], took]) => `${name} for ${milliseconds(took)}`).join(", ") });
  for (const [[, colour], took] of found) {
    const part = h("span", { class: `c${colour}` });
    part.style.width = `${(100 * took) / whole}%`;
    line.append(part);
  }
  const shown = Object.values(PHASES).filter((phase) => found.some(([one]) => one === phase));
  return [line, h("ul", { class: "legend" }, ...shown.map(([name, colour]) => h("li", {}, h("span", { class: `swatch c${colour}` }),
    h("span", { text: `${name} ${milliseconds(found.filter(([one]) => one[0] === name).reduce((sum, [, took]) => sum + took, 0))}` }))))];
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
    h("h3", { text: `Prefix: ${answer.cause === "hit" && !answer.cacheable_tokens ? "Too short to be cached" : CAUSES[answer.cause] ?? answer.cause}` }),
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
    parts.push(...spans(answer.timeline), h("table", {}, h("tbody", {}, ...answer.timeline.map((event) => h("tr", {},
      h("td", { class: "n", text: milliseconds(event.ms) }), h("td", { text: describe(event) }))))));
  } else {
    parts.push(h("p", { class: "small muted", text: "It ended before anybody looked." }));
  }
  return parts;
}
