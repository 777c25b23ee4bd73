// /live: reads the server's snapshots and keeps the page as they say. Nothing is kept but the last steps.

import { $, h } from "./dom.js";
import * as charts from "./live_charts.js";
import { sequenceDetail } from "./live_sequence.js";

const KEY = "oneloop.admin-key";
const MAX_STEPS = 256;
const WAITS_FOR = {
  slots: "waits for a place", pages: "waits for pages", prefill: "waits: a prompt is being read", turn: "its turn is next",
  held: "held back", retracted: "retracted, waits to go on",
};

const page = { steps: [], pool: null, tree: null, layout: null, chosen: -1, paused: false, key: sessionStorage.getItem(KEY) ?? "" };

function headers() {
  return page.key ? { Authorization: `Bearer ${page.key}` } : {};
}

// ---- the stream

async function follow() {
  for (let wait = 500; ; wait = Math.min(8000, wait * 2)) {
    try {
      const response = await fetch("live/events", { headers: headers(), cache: "no-store" });
      if (response.status === 401) {
        setState("locked", "warn");
        await askForKey(page.key ? "The server does not take this key." : "");
        wait = 250;
        continue;
      }
      if (!response.ok) throw new Error(await complaint(response));
      $("#problem").hidden = true;
      wait = 250;
      for await (const snapshot of read(response.body)) {
        if (!page.paused) show(snapshot);
      }
      setState("the server has closed", "warn");
    } catch (error) {
      setState("no connection", "warn");
      $("#problem").textContent = `${error.message || "The server cannot be reached."} Trying again.`;
      $("#problem").hidden = false;
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

async function complaint(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

async function* read(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event.startsWith("data: ")) yield JSON.parse(event.slice(6));
    }
  }
}

function askForKey(error) {
  const form = $("#key-form");
  form.hidden = false;
  $("#key-error").textContent = error;
  $("#key").focus();
  document.body.dataset.ready = "yes";
  return new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      page.key = $("#key").value.trim();
      sessionStorage.setItem(KEY, page.key);
      form.hidden = true;
      resolve();
    };
  });
}

function setState(text, kind) {
  const pill = $("#state");
  if (pill.textContent !== text) pill.textContent = text;
  pill.className = `pill ${kind}`;
}

// ---- a snapshot

function show(snapshot) {
  setState(snapshot.state, snapshot.state === "serving" ? "good" : "warn");
  const steps = snapshot.steps.map(charts.readStep);
  if (steps.length && page.steps.length && steps[0].number < page.steps.at(-1).number) page.steps = []; // another server
  page.steps = [...page.steps, ...steps].slice(-MAX_STEPS);
  showTiles(snapshot);
  if (steps.length || !page.steps.length) showSteps();
  showSequences(snapshot);
  showKeys(snapshot);
  if (snapshot.pool) showPages(snapshot.pool, snapshot.limits);
  if (snapshot.tree) showTree(snapshot.tree);
  if (snapshot.memory) showMemory(snapshot.memory);
  document.body.dataset.ready = "yes";
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

function showTiles(snapshot) {
  const { rates, ttft, itl, lag, limits } = snapshot;
  // A number stays with its unit.
  const part = (name, value) => `${name} ${charts.seconds(value)}`.replaceAll(" ", "\u00a0");
  const three = (values) => (values ? `${part("p90", values[1])}\u2003${part("p99", values[2])}` : "");
  const tiles = [
    ["Output", whole.format(rates.output), "tok/s", `${rates.requests.toFixed(1)} answers/s`],
    ["Prompts", whole.format(rates.prompt), "tok/s", "without cached ones"],
    ["Running", snapshot.num_running, `of ${limits.sequences}`, `${whole.format(rates.steps)} steps/s`],
    ["Waiting", snapshot.num_waiting, "", snapshot.waiting.length ? `the oldest for ${charts.seconds(snapshot.waiting[0].age).replace(" ", "\u00a0")}` : ""],
    ["First token", charts.seconds(ttft?.[0]), "", three(ttft)],
    ["Between tokens", charts.seconds(itl?.[0]), "", three(itl)],
    ["Loop lag", charts.seconds(lag?.[0]), "", lag ? `${part("p99", lag[1])}\u2003${part("max", lag[2])}` : ""],
  ];
  const place = $("#tiles");
  if (place.children.length !== tiles.length) {
    place.replaceChildren(...tiles.map(([name]) => h("dl", { class: "tile" },
      h("dt", { text: name }), h("dd", {}, h("span"), " ", h("small")), h("dd", { class: "more" }))));
  }
  tiles.forEach(([, value, unit, more], number) => {
    const tile = place.children[number];
    write($("dd span", tile), String(value));
    write($("small", tile), unit);
    write($(".more", tile), more);
  });
}

function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function legend(place, entries) {
  if (place.children.length !== entries.length) {
    place.replaceChildren(...entries.map(([, colour]) => h("li", {}, h("span", { class: `swatch c${colour}` }), h("span"))));
  }
  entries.forEach(([name, , figure], number) => {
    write(place.children[number].lastChild, figure === undefined ? name : `${name} ${figure}`);
  });
}

function showSteps() {
  const steps = charts.lastRun(page.steps, Number($("#zoom").value));
  charts.drawTimeline($("#timeline"), steps);
  charts.drawRows($("#rows"), steps);
  legend($("#stage-legend"), charts.STAGES);
  const last = steps.at(-1);
  legend($("#row-legend"), charts.KINDS.map(([kind, colour, name]) => [name, colour, last?.[kind]]));
  if (!last) return;
  const of = (from, to) => charts.milliseconds(charts.median(steps.map((step) => step[to] - step[from])));
  const span = last.published - steps[0].began;
  const busy = steps.reduce((sum, step) => sum + Math.max(0, step.deviceEnded - Math.max(step.deviceBegan, steps[0].began)), 0);
  const told = last.told ? "" : " (as the host saw it)";
  const words = `Medians: schedule ${of("began", "scheduled")}, launch ${of("scheduled", "launched")}, `
    + `commit ${of("arrived", "committed")}, publish ${of("committed", "published")}; `
    + `device ${of("deviceBegan", "deviceEnded")}${told}, busy ${Math.min(100, Math.round((100 * busy) / span))}% of the time.`;
  write($("#stage-words"), words);
  $("#timeline").setAttribute("aria-label", `Host and device over ${steps.length} steps. ${words}`);
}

function showSequences(snapshot) {
  const rows = [...snapshot.running, ...snapshot.waiting];
  const body = $("#sequences tbody");
  const known = new Map([...body.children].map((row) => [row.dataset.id, row]));
  const wanted = rows.map((row) => {
    const waits = row.running === null || row.state in WAITS_FOR;
    const line = known.get(row.id) ?? h("tr", { "data-id": row.id },
      h("td", {}, h("button", { type: "button", class: "id", text: short(row.id), title: row.id,
        "aria-label": `Details of ${row.id}`, onclick: () => showDetail(row.id) })),
      ...["", "n", "n", "n", "n", "n", "n"].map((kind) => h("td", { class: kind })));
    line.className = waits ? "waits" : "";
    const state = waits ? (WAITS_FOR[row.state] ?? row.state) + (row.state === "pages" ? ` (${row.wanted})` : "") : row.state;
    const told = row.state === "retracted" ? 1 : 0;
    const again = row.retractions > told ? `, retracted ${row.retractions}×` : "";
    const cells = [state + again, whole.format(row.prompt), whole.format(row.cached), whole.format(row.output), row.pages, row.shared,
      charts.seconds(row.age)];
    cells.forEach((text, number) => write(line.children[number + 1], String(text)));
    return line;
  });
  if (wanted.length !== body.children.length || wanted.some((line, place) => body.children[place] !== line)) {
    const focused = document.activeElement?.closest?.("#sequences tr")?.dataset.id;
    body.replaceChildren(...wanted);
    if (focused) wanted.find((line) => line.dataset.id === focused)?.querySelector("button").focus();
  }
  const hidden = snapshot.num_running + snapshot.num_waiting - rows.length;
  write($("#sequence-words"), rows.length
    ? `${snapshot.num_running} run, ${snapshot.num_waiting} wait${hidden > 0 ? `; ${hidden} are not shown` : ""}. Click one to see why its prefix was found or not.`
    : "Nothing runs. Requests appear here as they come.");
}

function short(id) {
  return id.length > 22 ? `${id.slice(0, 14)}…${id.slice(-6)}` : id;
}

async function showDetail(id) {
  const dialog = $("#detail");
  const close = () => dialog.close();
  dialog.replaceChildren(h("h2", { id: "detail-title", text: id }), h("p", { class: "muted", text: "Looking …" }));
  if (!dialog.open) dialog.showModal();
  try {
    const response = await fetch(`requests/${encodeURIComponent(id)}/cache`, { headers: headers(), cache: "no-store" });
    if (!response.ok) throw new Error(await complaint(response));
    const { data } = await response.json();
    dialog.replaceChildren(...data.flatMap((answer) => sequenceDetail(answer, close)));
  } catch (error) {
    dialog.replaceChildren(h("h2", { id: "detail-title", text: id }), h("p", { class: "bad", text: error.message }),
      h("button", { type: "button", class: "plain", text: "Close", onclick: close }));
  }
}

function showPages(pool, limits) {
  page.pool = pool;
  charts.drawPages($("#pages"), pool);
  legend($("#page-legend"), charts.PAGES.map(([state, colour]) => [state, colour, whole.format(pool.counts[state])]));
  const each = pool.pages_per_cell > 1 ? `A square is ${pool.pages_per_cell} pages. ` : "";
  const words = `${each}${whole.format(limits.pages)} pages of ${limits.page_size} tokens. `
    + `Of what runs, ${Math.round(100 * pool.unfilled)}% of the room has no token yet. `
    + (pool.free_runs === 1 ? "All free pages lie side by side."
      : `Free pages lie in ${whole.format(pool.free_runs)} places, ${whole.format(pool.longest_run)} side by side at most.`);
  write($("#page-words"), words);
  $("#pages").setAttribute("aria-label", charts.PAGES.map(([state]) => `${state}: ${pool.counts[state]}`).join(", "));
}

function showTree(tree) {
  page.tree = tree;
  page.layout = charts.layOutTree(tree.nodes);
  if (page.chosen >= tree.nodes.length) page.chosen = -1;
  charts.drawTree($("#tree"), tree.nodes, page.layout, page.chosen);
  const more = tree.is_whole ? "" : ` of ${whole.format(tree.seen)} and more`;
  write($("#tree-words"), `${tree.nodes.length}${more} runs of pages in ${tree.namespaces} namespace${tree.namespaces === 1 ? "" : "s"}, `
    + `the longest ${whole.format(page.layout.end)} pages. To the right: later in the prompt. Blue: in use; the darker, the more came by.`);
  if (page.chosen >= 0) showNode();
}

function showNode() {
  const node = page.tree.nodes[page.chosen];
  const words = node === undefined
    ? "Point at a run of pages, or move with the arrow keys."
    : `Pages ${node.start} to ${node.start + node.pages}: ${node.hits} came by, ${node.locks} hold it now`
      + `${node.hidden > 0 ? `, ${node.hidden} more go on from here` : ""}${node.text ? `: “${node.text}”` : ""}`;
  write($("#node-words"), words);
}

function choose(place) {
  if (!page.tree || place === page.chosen) return;
  page.chosen = place;
  charts.drawTree($("#tree"), page.tree.nodes, page.layout, place);
  showNode();
}

function showMemory(owners) {
  $("#memory tbody").replaceChildren(...owners.map(([name, size]) => h("tr", {},
    h("th", { scope: "row", text: name }), h("td", { class: "n", text: charts.bytes(size) }))));
}

function showKeys(snapshot) {
  const priced = snapshot.currency !== null;
  $("#cost-head").hidden = !priced;
  const body = $("#keys tbody");
  const text = JSON.stringify(snapshot.accounts);
  if (body.dataset.shown === text) return;
  body.dataset.shown = text;
  body.replaceChildren(...snapshot.accounts.map((one) => h("tr", {},
    h("th", { scope: "row", text: one.key }),
    ...[one.cached, one.prompt, one.output].map((count) => h("td", { class: "n", text: whole.format(count) })),
    priced && h("td", { class: "n", text: `${one.cost.toFixed(4)} ${snapshot.currency}` }))));
  if (!snapshot.accounts.length) {
    body.replaceChildren(h("tr", {}, h("td", { colspan: "5", class: "muted", text: "Nothing has ended yet." })));
  }
}

// ---- hands

function redraw() {
  charts.readColours();
  showSteps();
  if (page.pool) charts.drawPages($("#pages"), page.pool);
  if (page.tree) charts.drawTree($("#tree"), page.tree.nodes, page.layout, page.chosen);
}

$("#pause").addEventListener("click", (event) => {
  page.paused = !page.paused;
  event.currentTarget.setAttribute("aria-pressed", String(page.paused));
  event.currentTarget.textContent = page.paused ? "Go on" : "Pause";
});
$("#zoom").addEventListener("change", showSteps);
$("#tree").addEventListener("pointermove", (event) => {
  if (page.layout) choose(charts.nodeAt(page.layout, event.offsetX / event.target.clientWidth, event.offsetY / event.target.clientHeight));
});
$("#tree").addEventListener("keydown", (event) => {
  const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!way || !page.tree?.nodes.length) return;
  event.preventDefault();
  choose((page.chosen + way + page.tree.nodes.length) % page.tree.nodes.length);
});
new ResizeObserver(redraw).observe($("main"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
redraw();
follow();
