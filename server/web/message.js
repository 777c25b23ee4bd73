// One message on the page: what is in it, what is under it, and its buttons.

import { copy, h, icon, iconButton } from "./dom.js";
import { Rendered } from "./rendered.js";
import { siblings } from "./store.js";
import { tokensView } from "./tokens.js";

const ENDS = {
  length: "It ended at the limit of tokens.", stopped: "You stopped it.", abort: "It was ended by the server.",
  content_filter: "It was cut off.",
};
const number = (value) => value.toLocaleString("en");

function statsLine({ prompt, completion, cached, first, writing, reasoning }) {
  const parts = [];
  if (completion !== undefined) parts.push(`${number(completion)} tokens`);
  if (reasoning) parts.push(`${number(reasoning)} of them reasoning`);
  if (first !== undefined) parts.push(`first after ${first < 1000 ? `${Math.round(first)} ms` : `${(first / 1000).toFixed(1)} s`}`);
  // A few tokens come in one event, and tell nothing of the speed.
  if (completion > 4 && writing > 20) parts.push(`${((completion - 1) / (writing / 1000)).toPrecision(3)} tokens/s`);
  if (prompt !== undefined) parts.push(`prompt ${number(prompt)}${cached ? `, ${number(cached)} cached` : ""}`);
  return parts.join(" · ");
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

export class MessageView {
  #body;
  #reasoning = null;
  #calls = null;
  #foot;
  #rendered = null;
  #thoughts = null;

  /** actions: edit, again, goOn, choose, prompt, results, moved (the page has grown). */
  constructor(chat, node, actions) {
    this.chat = chat;
    this.node = node;
    this.actions = actions;
    const who = { user: "You", assistant: "Answer", tool: "Result of a tool" }[node.role];
    this.#body = h("div", { class: "body" });
    this.#foot = h("div", { class: "foot" });
    this.element = h("article", { class: `message ${node.role}`, "data-id": node.id, "aria-label": who },
      h("h2", { class: "unseen", text: who }), this.#body, this.#foot);
    this.update(false);
  }

  /** Show the node as it is now. */
  update(running) {
    const { node } = this;
    if (node.role === "assistant") this.#answer(running);
    else this.#asIs();
    if (!running) this.#ending();
    else if (!this.#foot.firstChild) this.#foot.replaceChildren(h("span", { class: "dots", role: "img", "aria-label": "Answering" }, h("i"), h("i"), h("i")));
  }

  stop() {
    this.#rendered?.stop();
    this.#thoughts?.stop();
  }

  #asIs() {
    const { node } = this;
    const files = (node.files ?? []).map((file) => (file.image
      ? h("img", { class: "attached", src: file.image, alt: file.name })
      : h("details", { class: "file" }, h("summary", { text: `${file.name} · ${number(file.text.length)} characters` }), h("pre", { tabindex: "0", text: file.text }))));
    this.#body.replaceChildren(...files, ...(node.content ? [h("p", { class: "plain", text: node.content })] : []));
  }

  #answer(running) {
    const { node } = this;
    if (node.reasoning) this.#think(running);
    if (node.content) {
      if (!this.#rendered) {
        const place = h("div", { class: "rendered" });
        place.addEventListener("click", (event) => {
          const button = event.target.closest("button.copy-code");
          if (button) copy([...button.closest("figure").querySelectorAll("code")].map((code) => code.textContent).join(""), button);
        });
        this.#body.append(place);
        this.#rendered = new Rendered(place, this.actions.moved);
      }
      this.#rendered.set(node.content, !running);
    }
    if (node.calls?.length) this.#call(running);
  }

  /** The reasoning is folded; it is rendered once somebody looks. */
  #think(running) {
    const { node } = this;
    if (!this.#reasoning) {
      const place = h("div", { class: "rendered" });
      const label = h("span");
      const details = h("details", {
        class: "reasoning", ontoggle: () => {
          if (details.open) this.#thoughts ??= new Rendered(place, this.actions.moved);
          this.#thoughts?.set(this.node.reasoning, !this.#reasoning.running);
        },
      }, h("summary", {}, label), place);
      this.#reasoning = { label, running };
      this.#body.prepend(details);
    }
    const still = running && !node.content && !node.calls?.length;
    this.#reasoning.running = still;
    const text = still ? "Reasoning …" : "Reasoning";
    if (this.#reasoning.label.textContent !== text) this.#reasoning.label.textContent = text;
    this.#thoughts?.set(node.reasoning, !still);
  }

  #call(running) {
    const { node } = this;
    const shown = node.calls.filter(Boolean).map((call) => h("figure", { class: "call" },
      h("figcaption", {}, icon("tool"), h("span", {}, "Calls ", h("code", { text: call.name }))),
      h("pre", { tabindex: "0" }, h("code", { text: running ? call.arguments : pretty(call.arguments) }))));
    const group = h("div", { class: "calls" }, ...shown);
    if (!running && this.chat.leaf === node.id) group.append(this.#resultForm());
    if (this.#calls) this.#calls.replaceWith(group);
    else this.#body.append(group);
    this.#calls = group;
  }

  #resultForm() {
    const { node } = this;
    const areas = node.calls.map((call) => h("textarea", { class: "code", rows: 2, "aria-label": `Result of ${call.name}`, placeholder: `What ${call.name} gave back` }));
    return h("form", {
      class: "results", onsubmit: (event) => {
        event.preventDefault();
        this.actions.results(node, areas.map((area) => area.value));
      },
    }, ...areas, h("div", { class: "row end" }, h("button", { class: "plain", text: areas.length > 1 ? "Send the results" : "Send the result" })));
  }

  #ending() {
    const { node, chat, actions } = this;
    const buttons = h("div", { class: "row buttons" });
    const versions = siblings(chat, node);
    if (versions.length > 1) {
      const at = versions.indexOf(node);
      buttons.append(h("span", { class: "versions", role: "group", "aria-label": "Versions" },
        iconButton("left", "The version before", () => actions.choose(versions[at - 1]), { disabled: at === 0 }),
        h("span", { class: "small numeric", text: `${at + 1}/${versions.length}` }),
        iconButton("right", "The next version", () => actions.choose(versions[at + 1]), { disabled: at === versions.length - 1 })));
    }
    const copyButton = iconButton("copy", "Copy the text", () => copy(node.content, copyButton));
    if (node.content) buttons.append(copyButton);
    if (node.role === "user") buttons.append(iconButton("edit", "Edit", () => this.edit()));
    if (node.role === "assistant") {
      buttons.append(iconButton("again", "Answer again", () => actions.again(node)),
        iconButton("prompt", "The exact prompt", () => actions.prompt(node)));
      if (node.tokens?.length) {
        buttons.append(h("button", { type: "button", class: "text-button small", text: "Tokens", "aria-expanded": "false", onclick: (event) => this.#toggleTokens(event.currentTarget) }));
      }
    }
    const notes = [];
    if (node.error) {
      notes.push(h("div", { class: "error", role: "alert" }, h("p", { text: node.error.message }),
        h("div", { class: "row" },
          node.content && !node.calls?.length
            ? h("button", { type: "button", class: "plain", text: "Go on from here", onclick: () => actions.goOn(node) }) : null,
          h("button", { type: "button", class: "plain", text: "Try again", onclick: () => actions.again(node) }))));
    } else if (ENDS[node.finish]) {
      notes.push(h("p", { class: "note small muted" }, ENDS[node.finish],
        node.content && !node.calls?.length && h("button", { type: "button", class: "text-button small", text: "Go on", onclick: () => actions.goOn(node) })));
    }
    const line = node.stats && statsLine(node.stats);
    this.#foot.replaceChildren(...notes, h("div", { class: "row under" }, buttons, line && h("p", { class: "stats small muted numeric", text: line })));
  }

  #toggleTokens(button) {
    const open = this.element.querySelector(".token-view");
    button.setAttribute("aria-expanded", String(!open));
    if (open) open.remove();
    else this.#body.append(tokensView(this.node.tokens));
  }

  /** The message as a text that can be changed; a changed one is another version. */
  edit() {
    const { node } = this;
    const area = h("textarea", { rows: Math.min(12, node.content.split("\n").length + 1), "aria-label": "Your message" });
    area.value = node.content;
    const done = () => this.#asIs();
    this.#body.replaceChildren(h("form", {
      class: "editing",
      onsubmit: (event) => {
        event.preventDefault();
        if (area.value.trim() || node.files?.length) this.actions.edit(node, area.value);
      },
      onkeydown: (event) => {
        if (event.key === "Escape") done();
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) event.currentTarget.requestSubmit();
      },
    }, area, h("div", { class: "row end" },
      h("button", { type: "button", class: "plain", text: "Cancel", onclick: done }),
      h("button", { class: "primary", text: "Send" }))));
    area.focus();
  }
}
