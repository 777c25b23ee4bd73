// Small tools: elements by a call, icons, and text for people.

/** An element with properties (class, text, data-*, aria-*, on*) and children. */
export function h(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "text") node.textContent = value;
    else if (key in node && typeof value !== "string") node[key] = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const $ = (selector, root = document) => root.querySelector(selector);

/** One of the symbols of chat.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon; its words are for ears and for the pointer that rests on it. */
export function iconButton(name, label, onclick, properties = {}) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...properties },
    icon(name));
}

/** Say something to who cannot see it happen. */
export function announce(text) {
  $("#status").textContent = text;
}

let toastTimer = 0;

/** A line at the bottom of the page that goes away by itself. */
export function toast(text) {
  const place = $("#toast");
  place.textContent = text;
  place.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (place.hidden = true), 6000);
}

export async function copy(text, button) {
  let worked = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // No clipboard outside of https and localhost: the old way.
    const area = h("textarea", { class: "unseen", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    worked = document.execCommand("copy");
    area.remove();
  }
  announce(worked ? "Copied" : "Copying failed");
  if (button === undefined) return;
  button.classList.toggle("done", worked);
  setTimeout(() => button.classList.remove("done"), 1500);
}

/** Ask by a dialog of the page; resolves to what was typed, or null. */
export function ask({ title, text = "", value, action = "OK", danger = false, kind = "text", extra = null }) {
  const dialog = $("#ask");
  const field = h("input", { type: kind, "aria-label": title, hidden: value === undefined, autocomplete: "off" });
  field.value = value ?? "";
  const form = h("form", { method: "dialog" },
    h("h2", { text: title, id: "ask-title" }),
    text && h("p", { text }),
    field,
    extra,
    h("div", { class: "row end" },
      h("button", { type: "button", class: "plain", text: "Cancel", onclick: () => dialog.close("") }),
      h("button", { class: danger ? "plain danger" : "primary", value: "yes", text: action })));
  dialog.replaceChildren(form);
  dialog.returnValue = "";
  dialog.showModal();
  if (value !== undefined) field.select();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes" ? field.value : null), { once: true });
  });
}

/** A dialog that shows something to read. */
export function show(title, ...content) {
  const dialog = $("#show");
  dialog.replaceChildren(
    h("header", { class: "row" },
      h("h2", { text: title, id: "show-title" }),
      iconButton("close", "Close", () => dialog.close())),
    ...content);
  dialog.showModal();
}

/** Formulas need a font of theirs: where there is none, the sheet draws the roots. */
export function checkMathFont() {
  const probe = document.createElementNS("http://www.w3.org/1998/Math/MathML", "math");
  const root = probe.appendChild(document.createElementNS(probe.namespaceURI, "msqrt"));
  root.append(document.createElementNS(probe.namespaceURI, "mspace"));
  document.body.append(probe);
  if (root.getBoundingClientRect().width < 2) document.documentElement.classList.add("no-math-font");
  probe.remove();
}

const RELATIVE = new Intl.RelativeTimeFormat("en", { numeric: "auto" });

export function ago(time) {
  const minutes = Math.round((time - Date.now()) / 60000);
  if (minutes > -1) return "now";
  if (minutes > -60) return RELATIVE.format(minutes, "minute");
  if (minutes > -24 * 60) return RELATIVE.format(Math.round(minutes / 60), "hour");
  return RELATIVE.format(Math.round(minutes / 60 / 24), "day");
}

export function save(name, text) {
  const link = h("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
