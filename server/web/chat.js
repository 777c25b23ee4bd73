// The chat page: which chat is shown, what is typed, and the answers that run.

import { request } from "./api.js";
import { $, ago, announce, ask, checkMathFont, h, icon, iconButton, save, show, toast } from "./dom.js";
import { bodyOf, Generation } from "./generate.js";
import { MessageView } from "./message.js";
import * as settings from "./settings.js";
import * as store from "./store.js";

// Bytes of one attached file, and of a file of chats.
const MOST_FILE = 512 * 1024;
const MOST_IMPORT = 64 * 1024 * 1024;

let config = null;
let chats = [];
let chat = store.newChat();
let files = [];
const views = new Map();
// By the id of the message that is being written.
const running = new Map();

const thread = $("#thread");
const scroller = $("#scroller");
const input = $("#input");
const wide = matchMedia("(min-width: 900px)");

// ---- scrolling: the end stays in sight while the reader is there

let sticks = true;
let frame = 0;
scroller.addEventListener("scroll", () => {
  sticks = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
}, { passive: true });

// A window that gets smaller, a panel that opens.
new ResizeObserver(() => moved()).observe(scroller);

function moved() {
  if (!sticks || frame) return;
  frame = requestAnimationFrame(() => {
    frame = 0;
    scroller.scrollTop = scroller.scrollHeight;
  });
}

// ---- the thread

const actions = {
  moved,
  edit(node, content) {
    const next = store.add(chat, node.parent, { role: "user", content, files: node.files });
    draw();
    answer(next);
  },
  again(node) {
    answer(chat.nodes[node.parent]);
  },
  goOn(node) {
    run(node, true);
  },
  choose(node) {
    store.follow(chat, node);
    store.put(chat);
    draw();
  },
  results(node, results) {
    let last = node;
    node.calls.forEach((call, index) => {
      last = store.add(chat, last.id, { role: "tool", callId: call.id, content: results[index] });
    });
    draw();
    answer(last);
  },
  async prompt(node) {
    try {
      const body = bodyOf(store.path(chat, node.parent), settings.current());
      const kept = { model: body.model, messages: body.messages, ...(body.tools ? { tools: body.tools } : {}) };
      const response = await request("v1/chat/completions/render", { body: kept });
      const { prompt, token_ids: tokens } = await response.json();
      show("The exact prompt", h("p", { class: "muted", text: `${tokens.length.toLocaleString("en")} tokens, with the settings of now` }),
        h("pre", { class: "prompt", tabindex: "0", text: prompt }));
    } catch (error) {
      toast(error.message);
    }
  },
};

/** Show the chat's branch, with as few changes as there are. */
function draw() {
  const nodes = store.path(chat);
  const shown = new Set(nodes.map((node) => node.id));
  for (const [id, view] of views) {
    if (shown.has(id) && view.chat === chat) continue;
    view.stop();
    view.element.remove();
    views.delete(id);
  }
  for (const node of nodes) {
    let view = views.get(node.id);
    if (!view) {
      view = new MessageView(chat, node, actions);
      views.set(node.id, view);
    }
    view.update(running.has(node.id));
    if (thread.children[nodes.indexOf(node)] !== view.element) thread.insertBefore(view.element, thread.children[nodes.indexOf(node)] ?? null);
  }
  $("#empty").hidden = nodes.length > 0;
  $("#title").textContent = nodes.length ? store.titleOf(chat) : "New chat";
  document.title = nodes.length ? `${store.titleOf(chat)} · oneloop` : "oneloop";
  drawButtons();
  moved();
}

const runningHere = () => store.path(chat).map((node) => running.get(node.id)).find(Boolean);

function drawButtons() {
  const busy = Boolean(runningHere());
  $("#send").hidden = busy;
  $("#stop").hidden = !busy;
}

// ---- answers

function answer(parent) {
  if (runningHere()) return;
  const node = store.add(chat, parent?.id ?? null, { role: "assistant" });
  run(node);
}

function run(node, goesOn = false) {
  const owner = chat;
  let asked;
  try {
    asked = settings.current();
  } catch (error) {
    node.error = { message: error.message };
    views.get(node.id)?.update(false);
    draw();
    return;
  }
  let queued = false;
  const generation = new Generation(node, {
    onchange() {
      // Once a frame, however many tokens it brings.
      if (queued) return;
      queued = true;
      requestAnimationFrame(() => {
        queued = false;
        if (running.has(node.id)) views.get(node.id)?.update(true);
        moved();
      });
    },
    async onend() {
      running.delete(node.id);
      owner.updated = Date.now();
      if (owner === chat) draw();
      announce(node.error ? node.error.message : "The answer is complete.");
      await keep(owner);
    },
  });
  running.set(node.id, generation);
  sticks = true;
  draw();
  announce("Answering");
  keep(owner);
  generation.run(store.path(owner, node.parent), asked, goesOn);
}

async function keep(which) {
  if (!chats.includes(which)) chats.unshift(which);
  chats.sort((a, b) => b.updated - a.updated);
  drawList();
  try {
    await store.put(which);
  } catch (error) {
    toast(`This chat cannot be kept: ${error.message}`);
  }
}

// ---- the composer

function grow() {
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight + 2, 260)}px`;
}

function send() {
  const content = input.value.trim();
  if ((!content && !files.length) || runningHere()) return;
  const node = store.add(chat, chat.leaf, { role: "user", content, ...(files.length ? { files } : {}) });
  input.value = "";
  files = [];
  drawFiles();
  grow();
  draw();
  answer(node);
}

function drawFiles() {
  $("#files").replaceChildren(...files.map((file) => h("li", { class: "chip" }, icon("file"), h("span", { text: file.name }),
    iconButton("close", `Remove ${file.name}`, () => {
      files = files.filter((other) => other !== file);
      drawFiles();
    }))));
}

async function attach(list) {
  for (const file of list) {
    if (file.size > MOST_FILE) {
      toast(`${file.name} is larger than ${MOST_FILE / 1024} KiB.`);
    } else if (file.type.startsWith("image/")) {
      if (!config?.images) toast("This model reads text only: images cannot be attached, text files can.");
      else files.push({ name: file.name, image: await dataUrl(file) });
    } else {
      try {
        const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
        if (text.includes("\0")) throw new TypeError();
        files.push({ name: file.name, text });
      } catch {
        toast(`${file.name} is no text file.`);
      }
    }
  }
  drawFiles();
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// ---- the list of chats

function drawList() {
  const wanted = $("#search").value.trim();
  const found = wanted ? chats.filter((one) => store.matches(one, wanted)) : chats;
  $("#chats").replaceChildren(...found.map((one) => h("li", { class: one === chat ? "chosen" : "" },
    h("button", { type: "button", class: "open", "aria-current": one === chat ? "true" : undefined, onclick: () => choose(one) },
      h("span", { class: "name", text: store.titleOf(one) }), h("span", { class: "muted small", text: ago(one.updated) })),
    iconButton("edit", `Rename “${store.titleOf(one)}”`, () => rename(one)),
    iconButton("delete", `Delete “${store.titleOf(one)}”`, () => drop(one)))));
  $("#none").hidden = found.length > 0;
  $("#none").textContent = wanted ? "Nothing found." : "No chats yet.";
}

function choose(one) {
  chat = one;
  sticks = true;
  draw();
  drawList();
  if (!wide.matches) setPanel("history", false);
  input.focus();
}

async function rename(one) {
  const title = await ask({ title: "Rename this chat", value: store.titleOf(one), action: "Rename" });
  if (!title?.trim()) return;
  one.title = title.trim().slice(0, 200);
  await keep(one);
  draw();
}

async function drop(one) {
  if ((await ask({ title: "Delete this chat?", text: `“${store.titleOf(one)}” is kept nowhere else.`, action: "Delete", danger: true })) === null) return;
  for (const id of Object.keys(one.nodes)) running.get(id)?.stop();
  chats = chats.filter((other) => other !== one);
  await store.remove(one.id);
  if (one === chat) fresh();
  else drawList();
}

function fresh() {
  chat = store.newChat();
  draw();
  drawList();
  if (!wide.matches) setPanel("history", false);
  input.focus();
}

async function importFile(file) {
  try {
    if (file.size > MOST_IMPORT) throw new Error("The file is too large.");
    const added = store.fromJson(await file.text());
    for (const one of added) await store.put(one);
    chats = [...added, ...chats].sort((a, b) => b.updated - a.updated);
    drawList();
    toast(added.length === 1 ? "One chat was added." : `${added.length} chats were added.`);
  } catch (error) {
    toast(error.message);
  }
}

// ---- panels

function setPanel(name, open) {
  document.body.classList.toggle(`with-${name}`, open);
  $(`#${name}`).inert = !open;
  $(`#toggle-${name}`).setAttribute("aria-expanded", String(open));
  $("#veil").hidden = wide.matches || !(document.body.classList.contains("with-history") || document.body.classList.contains("with-settings"));
}

function togglePanel(name) {
  const open = !document.body.classList.contains(`with-${name}`);
  if (open && !wide.matches) setPanel(name === "history" ? "settings" : "history", false);
  setPanel(name, open);
  if (open) $(`#${name} input, #${name} select, #${name} button`)?.focus();
}

// ---- start

function wire() {
  $("#composer").addEventListener("submit", (event) => (event.preventDefault(), send()));
  input.addEventListener("input", grow);
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  input.addEventListener("paste", (event) => event.clipboardData.files.length && (event.preventDefault(), attach(event.clipboardData.files)));
  scroller.addEventListener("dragover", (event) => event.preventDefault());
  scroller.addEventListener("drop", (event) => event.dataTransfer.files.length && (event.preventDefault(), attach(event.dataTransfer.files)));
  $("#attach").addEventListener("click", () => $("#file").click());
  $("#file").addEventListener("change", async (event) => {
    await attach(event.target.files);
    event.target.value = "";
  });
  for (const idea of document.querySelectorAll("#ideas button")) {
    idea.addEventListener("click", () => {
      // A draft is not written over; what cannot be sent now is not left in its place.
      if (!input.value.trim() && !runningHere()) {
        input.value = idea.textContent;
        send();
      }
      input.focus();
    });
  }
  $("#stop").addEventListener("click", () => runningHere()?.stop());
  $("#new").addEventListener("click", fresh);
  $("#search").addEventListener("input", drawList);
  $("#export").addEventListener("click", () => save("oneloop-chats.json", store.toJson(chats)));
  $("#import").addEventListener("click", () => $("#import-file").click());
  $("#import-file").addEventListener("change", async (event) => {
    if (event.target.files.length) await importFile(event.target.files[0]);
    event.target.value = "";
  });
  for (const name of ["history", "settings"]) $(`#toggle-${name}`).addEventListener("click", () => togglePanel(name));
  for (const name of ["history", "settings"]) $(`#close-${name}`).addEventListener("click", () => (setPanel(name, false), $(`#toggle-${name}`).focus()));
  $("#veil").addEventListener("click", () => (setPanel("history", false), setPanel("settings", false)));
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") {
      if (!wide.matches && !$("#veil").hidden) $("#veil").click();
      else runningHere()?.stop();
    } else if ((event.ctrlKey || event.metaKey) && event.key === "k") {
      event.preventDefault();
      setPanel("history", true);
      $("#search").focus();
    }
  });
  const fit = () => (setPanel("history", wide.matches), setPanel("settings", false));
  wide.addEventListener("change", fit);
  fit();
}

async function start() {
  wire();
  checkMathFont();
  draw();
  try {
    chats = await store.all();
  } catch (error) {
    toast(`Earlier chats cannot be read: ${error.message}`);
  }
  drawList();
  try {
    config = await (await request("web/api/config")).json();
  } catch (error) {
    $("#empty-text").textContent = error.message;
    $("#retry").hidden = false;
    return;
  }
  $("#retry").hidden = true;
  $("#model").textContent = config.models[0];
  $("#empty-text").textContent = config.chats ? "Ask it something." : "This model does not chat.";
  const attach = config.images ? "Attach a file" : "Attach a text file";
  $("#attach").title = attach;
  $("#attach").setAttribute("aria-label", attach);
  $("#file").accept = config.images ? "" : "text/*,.md,.json,.csv,.py,.js,.ts,.c,.cc,.h,.rs,.go,.java,.sh,.yaml,.yml,.toml,.xml,.log,.sql,.tex";
  settings.build(config);
  $("#ideas").hidden = $("#keys").hidden = !config.chats;
  input.disabled = !config.chats;
  document.body.dataset.ready = "yes";
  if (wide.matches) input.focus();
}

$("#retry").addEventListener("click", () => location.reload());
start();
