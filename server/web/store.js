// Chats, kept in this browser: a tree of messages each, and which of its branches is shown.

const NAME = "oneloop";
const STORE = "chats";
const FORMAT = "oneloop.chats.1";
const ROLES = new Set(["user", "assistant", "tool"]);

let database = null;
// Where the browser keeps nothing (private windows), chats live as long as the page.
const memory = new Map();

function open() {
  database ??= new Promise((resolve) => {
    let request;
    try {
      request = indexedDB.open(NAME, 1);
    } catch {
      resolve(null);
      return;
    }
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = request.onblocked = () => resolve(null);
  });
  return database;
}

async function run(mode, action) {
  const opened = await open();
  if (opened === null) return null;
  return new Promise((resolve, reject) => {
    const request = action(opened.transaction(STORE, mode).objectStore(STORE));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export async function all() {
  const chats = (await run("readonly", (store) => store.getAll())) ?? [...memory.values()];
  return chats.sort((a, b) => b.updated - a.updated);
}

export async function put(chat) {
  memory.set(chat.id, chat);
  await run("readwrite", (store) => store.put(chat));
}

export async function remove(id) {
  memory.delete(id);
  await run("readwrite", (store) => store.delete(id));
}

export const newId = () => {
  const bytes = crypto.getRandomValues(new Uint8Array(9));
  return Array.from(bytes, (byte) => byte.toString(36).padStart(2, "0")).join("");
};

export function newChat() {
  return { id: newId(), title: "", updated: Date.now(), nodes: {}, leaf: null };
}

/** A message under `parent` (an id, or null), which becomes the branch that is shown. */
export function add(chat, parent, fields) {
  const node = { id: newId(), parent, made: Date.now(), content: "", ...fields };
  chat.nodes[node.id] = node;
  chat.leaf = node.id;
  chat.updated = Date.now();
  return node;
}

/** The messages from the first to `leaf`. */
export function path(chat, leaf = chat.leaf) {
  const nodes = [];
  for (let node = chat.nodes[leaf]; node; node = chat.nodes[node.parent]) nodes.unshift(node);
  return nodes;
}

/** The other versions of a message, and itself, in the order in which they were made. */
export function siblings(chat, node) {
  return Object.values(chat.nodes)
    .filter((other) => other.parent === node.parent && other.role === node.role)
    .sort((a, b) => a.made - b.made);
}

/** Show the branch of a message: down to the newest of what follows it. */
export function follow(chat, node) {
  let last = node;
  for (;;) {
    const children = Object.values(chat.nodes).filter((other) => other.parent === last.id);
    if (!children.length) break;
    last = children.reduce((a, b) => (a.made >= b.made ? a : b));
  }
  chat.leaf = last.id;
}

export function titleOf(chat) {
  if (chat.title) return chat.title;
  const first = path(chat).find((node) => node.role === "user");
  const line = (first?.content ?? "").split("\n").find((one) => /[^#*`>\s]/.test(one));
  const words = (line ?? first?.files?.[0]?.name ?? "").replace(/^[#*`>\s]+|[*`]+/g, "").trim();
  return words.length > 60 ? `${words.slice(0, 60)}…` : words || "New chat";
}

export function matches(chat, words) {
  const wanted = words.toLowerCase();
  return titleOf(chat).toLowerCase().includes(wanted)
    || Object.values(chat.nodes).some((node) => node.content.toLowerCase().includes(wanted));
}

export function toJson(chats) {
  return JSON.stringify({ format: FORMAT, chats }, null, 1);
}

const isText = (value) => typeof value === "string";

/** A message of a file: only what is known, and of the right kind. Throws on anything else. */
function readNode(node) {
  if (!isText(node.id) || !ROLES.has(node.role) || !isText(node.content) || !(node.parent === null || isText(node.parent)))
    throw new Error("a message that is none");
  const known = { id: node.id, role: node.role, content: node.content, parent: node.parent, made: Number(node.made) || 0 };
  if (isText(node.reasoning)) known.reasoning = node.reasoning;
  if (isText(node.callId)) known.callId = node.callId;
  if (isText(node.finish)) known.finish = node.finish;
  if (Array.isArray(node.files))
    known.files = node.files.filter((file) => isText(file?.name) && (isText(file.text) || /^data:image\//.test(file.image)));
  if (Array.isArray(node.calls))
    known.calls = node.calls.filter((call) => isText(call?.name) && isText(call.arguments) && isText(call.id));
  if (node.stats !== null && typeof node.stats === "object")
    known.stats = Object.fromEntries(Object.entries(node.stats).filter(([, value]) => Number.isFinite(value)));
  return known;
}

/** The chats of an exported file, under ids of their own. Throws an Error that says what is wrong. */
export function fromJson(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (file?.format !== FORMAT || !Array.isArray(file.chats)) throw new Error("The file holds no chats of this page.");
  return file.chats.map((chat, index) => {
    try {
      const nodes = Object.fromEntries(Object.values(chat.nodes).map((node) => [node.id, readNode(node)]));
      for (const node of Object.values(nodes)) {
        const seen = new Set();
        for (let at = node; at; at = nodes[at.parent]) {
          if (seen.has(at.id)) throw new Error("a circle");
          seen.add(at.id);
        }
        if (node.parent !== null && !nodes[node.parent]) throw new Error("a message without its parent");
      }
      const leaf = nodes[chat.leaf] ? chat.leaf : null;
      return { id: newId(), title: isText(chat.title) ? chat.title.slice(0, 200) : "", updated: Number(chat.updated) || 0, nodes, leaf };
    } catch {
      throw new Error(`Chat ${index + 1} of the file cannot be read.`);
    }
  });
}
