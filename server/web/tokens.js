// The tokens of an answer by their probability; the pointer, or the arrow keys, show what else was likely.

import { h } from "./dom.js";

// Tokens whose elements are made at once; the rest come as the reader scrolls.
const CHUNK = 400;
const percent = (logprob) => {
  const value = Math.exp(logprob) * 100;
  return `${value >= 99.95 ? "100" : value >= 0.1 ? value.toFixed(1) : value.toExponential(1)}%`;
};
const visible = (token) => token.replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";

function level(logprob) {
  const probability = Math.exp(logprob);
  return probability > 0.9 ? 0 : probability > 0.6 ? 1 : probability > 0.3 ? 2 : probability > 0.1 ? 3 : 4;
}

export function tokensView(tokens) {
  const detail = h("div", { class: "token-detail small", role: "status" }, "Point at a token, or use the arrow keys.");
  const list = h("div", {
    class: "tokens", tabindex: "0", role: "application", "aria-label": `${tokens.length} tokens by probability`,
    "aria-roledescription": "token list",
  });
  let made = 0;
  let chosen = -1;
  const sentinel = h("span", { class: "unseen", "aria-hidden": "true" });

  function more() {
    const end = Math.min(made + CHUNK, tokens.length);
    const chunk = h("span", { class: "token-chunk" });
    for (; made < end; made += 1) {
      const [token, logprob] = tokens[made];
      chunk.append(h("span", { class: `token level-${level(logprob)}`, "data-at": String(made), text: visible(token) }));
      if (token.includes("\n")) chunk.append(h("br"));
    }
    sentinel.before(chunk);
    if (made === tokens.length) {
      watcher.disconnect();
      sentinel.remove();
    }
  }

  function choose(at) {
    if (at < 0 || at >= tokens.length || at === chosen) return;
    while (at >= made) more();
    list.querySelector(".chosen")?.classList.remove("chosen");
    list.querySelector(`[data-at="${at}"]`).classList.add("chosen");
    chosen = at;
    const [token, logprob, others] = tokens[at];
    detail.replaceChildren(
      h("span", {}, h("code", { text: visible(token) }), ` ${percent(logprob)} `, h("span", { class: "muted", text: `(${logprob.toFixed(3)})` })),
      h("span", { class: "muted", text: others.length ? " of " : "" }),
      ...others.map(([other, value]) => h("span", { class: other === token ? "other same" : "other" },
        h("code", { text: visible(other) }), ` ${percent(value)}`)));
  }

  const watcher = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && more());
  list.append(sentinel);
  more();
  if (made < tokens.length) watcher.observe(sentinel);
  list.addEventListener("pointerover", (event) => choose(Number(event.target.dataset.at ?? -1)));
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -tokens.length, End: tokens.length }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(tokens.length - 1, chosen + step)));
    list.querySelector(".chosen").scrollIntoView({ block: "nearest" });
  });
  return h("div", { class: "token-view" }, list, detail);
}
