// An answer's Markdown as it grows. The server renders; this keeps the blocks that are final and asks again only for
// what comes after the start of the last one.

import { request, ServerError } from "./api.js";

// The one place where a string becomes HTML, and it is the server's, which lets none of the model's through.
const policy = globalThis.trustedTypes?.createPolicy("rendered", { createHTML: (html) => html });

function fragment(html) {
  const template = document.createElement("template");
  template.innerHTML = policy ? policy.createHTML(html) : html;
  return template.content;
}

// At most this often, in ms; and never more than a quarter of the time.
const EVERY = 90;
// Blocks in a section; the browser skips sections that are out of sight.
const SECTION = 10;
// Characters that the server takes at once.
const MOST = 30000;
// So long blocks are put into the page at once, in ms; then the browser has its turn.
const SLICE = 8;

export class Rendered {
  #root;
  #text = "";
  #offset = 0;
  #state = { kind: "", before: "" };
  #tail = [];
  #tailHtml = null;
  #join = null;
  #joinBefore = null;
  #final = false;
  #asked = null;
  #busy = false;
  #failures = 0;
  #timer = 0;
  #stopped = false;
  // How often it was begun anew: what was asked for before that is for another text.
  #begun = 0;

  /** onchange: called after the page has changed. */
  constructor(root, onchange = () => {}) {
    this.#root = root;
    this.onchange = onchange;
  }

  /** The whole text so far; `final` when there is no more to come. */
  set(text, final) {
    if (!text.startsWith(this.#text.slice(0, this.#offset))) this.#restart();
    this.#text = text;
    this.#final = final;
    if (this.#root.getAttribute("aria-busy") !== "true") this.#root.setAttribute("aria-busy", "true");
    // The first words are shown as they are, while the renderer wakes up.
    if (this.#asked === null) this.#showPlain(text.slice(0, 4000));
    this.#schedule(0);
  }

  stop() {
    this.#stopped = true;
    clearTimeout(this.#timer);
  }

  /** The whole text is there, or all of it that ever will be. */
  #settle(settled) {
    if (settled) this.#root.setAttribute("aria-busy", "false");
  }

  #restart() {
    this.#begun += 1;
    this.#root.replaceChildren();
    this.#offset = 0;
    this.#state = { kind: "", before: "" };
    this.#tail = [];
    this.#join = this.#joinBefore = this.#tailHtml = this.#asked = null;
  }

  #schedule(delay) {
    if (this.#busy || this.#timer || this.#stopped) return;
    this.#timer = setTimeout(() => {
      this.#timer = 0;
      this.#ask();
    }, delay);
  }

  async #ask() {
    const tail = this.#text.slice(this.#offset, this.#offset + MOST);
    const whole = this.#offset + tail.length === this.#text.length;
    const final = this.#final && whole;
    const signature = `${this.#offset}:${tail.length}:${final}`;
    if (signature === this.#asked || (tail === "" && !this.#tail.length)) {
      this.#settle(final);
      return;
    }
    this.#busy = true;
    const began = performance.now();
    const begun = this.#begun;
    try {
      const response = await request("web/api/render", { body: { text: tail, ...this.#state, final }, quiet: true });
      const made = await response.json();
      await new Promise((resolve) => requestAnimationFrame(resolve));
      this.#failures = 0;
      if (begun === this.#begun) {
        this.#asked = signature;
        if (!whole && made.blocks.length < 2) this.#plain(tail);
        else await this.#apply(made);
      }
    } catch (error) {
      // Too much for the renderer, or no renderer: the words themselves are what counts.
      const fails = !(error instanceof ServerError && error.status === 400);
      if (fails) this.#failures += 1;
      if (begun === this.#begun) {
        if (fails) {
          this.#showPlain(tail);
        } else {
          this.#plain(tail);
          this.#asked = signature;
        }
      }
    }
    this.#busy = false;
    this.#settle((final && this.#asked === signature && this.#final) || this.#failures >= 3);
    this.onchange();
    const took = performance.now() - began;
    if (this.#failures < 3) this.#schedule(Math.max(EVERY, 3 * took, this.#failures * 1000));
  }

  /** Text that is not rendered, until it may be. */
  #showPlain(text) {
    this.#clearTail();
    const block = document.createElement("p");
    block.className = "plain";
    block.textContent = text;
    this.#section().append(block);
    this.#tail = [block];
  }

  /** Text that never will be. */
  #plain(text) {
    this.#showPlain(text);
    this.#tail = [];
    this.#offset += text.length;
    this.#state = { kind: "", before: "" };
    this.#join = this.#joinBefore = null;
  }

  async #apply({ blocks, state }) {
    if (blocks.length === 1 && blocks[0].html === this.#tailHtml) return;
    this.#clearTail();
    this.#join = this.#joinBefore;
    const begun = this.#begun;
    let until = performance.now() + SLICE;
    for (const [index, block] of blocks.entries()) {
      if (performance.now() > until) {
        await new Promise((resolve) => setTimeout(resolve));
        if (begun !== this.#begun || this.#stopped) return;
        until = performance.now() + SLICE;
      }
      const last = index === blocks.length - 1;
      if (last) this.#joinBefore = this.#join;
      else this.#offset += block.length;
      const nodes = this.#place(block);
      if (last) [this.#tail, this.#tailHtml] = [nodes, block.html];
    }
    this.#state = state;
  }

  #clearTail() {
    for (const node of this.#tail) node.remove();
    this.#tail = [];
    this.#tailHtml = null;
  }

  /** Put a block at the end, or what is in it into the one before. Returns the nodes that are new. */
  #place({ html, joins }) {
    const content = fragment(html);
    const container = content.querySelector("[data-join]");
    if (joins && this.#join?.isConnected && container) {
      if (container.localName === "code" || container.localName === "tbody") {
        // Each by itself, so that the browser lays out only what is in sight.
        this.#join.after(container);
        this.#join = container;
        return [container];
      }
      const nodes = [...container.childNodes];
      this.#join.append(...nodes);
      return nodes;
    }
    const nodes = [...content.childNodes].filter((node) => node.nodeType === Node.ELEMENT_NODE || node.data.trim());
    this.#section().append(...nodes);
    this.#join = container;
    return nodes;
  }

  #section() {
    let section = this.#root.lastElementChild;
    if (!section || section.childElementCount >= SECTION) {
      section = document.createElement("div");
      section.className = "section";
      this.#root.append(section);
    }
    return section;
  }
}
