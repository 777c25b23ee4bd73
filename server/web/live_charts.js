// The pictures of /live, drawn on canvases: steps, rows, pages, the radix tree. Pure but for the canvas that they get.

export const STAGES = [["schedule", 1], ["launch", 5], ["commit", 3], ["publish", 4], ["wait", 0], ["device", 2]];
export const KINDS = [["decode", 1, "decode"], ["prefill", 2, "prefill chunk"], ["forced", 3, "forced"], ["pooling", 4, "embedding"]];
export const PAGES = [["free", 0], ["running", 1], ["cached", 3], ["shared", 4], ["evictable", 5]];

/** A step as server/live_feed.py writes it; times in milliseconds. */
export function readStep(row) {
  const [number, began, scheduled, launched, waited, arrived, committed, published, deviceBegan, deviceEnded, told,
    decode, prefill, forced, pooling, tokens, running, waiting, failed, chunks] = row;
  return { number, began, scheduled, launched, waited, arrived, committed, published, deviceBegan, deviceEnded, told,
    decode, prefill, forced, pooling, tokens, running, waiting, failed, chunks };
}

let colours = {};

/** After a change of the scheme. */
export function readColours() {
  // By an element that has the colour: a canvas knows neither variables nor light-dark().
  const probe = document.createElement("span");
  document.body.append(probe);
  const of = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };
  colours = { text: of("--text"), muted: of("--muted"), line: of("--line"), sunken: of("--sunken"), ground: of("--ground"),
    sans: getComputedStyle(document.body).fontFamily, 0: of("--sunken") };
  for (let number = 1; number <= 6; number += 1) colours[number] = of(`--chart-${number}`);
  probe.remove();
}

/** The canvas at the screen's own resolution, emptied. Sizes in CSS pixels. */
function begin(canvas) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const height = Number(canvas.dataset.height ??= canvas.getAttribute("height"));
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = `12px ${colours.sans}`;
  pen.textBaseline = "middle";
  return { pen, width, height };
}

function box(pen, colour, x, y, width, height) {
  pen.fillStyle = colour;
  pen.fillRect(x, y, Math.max(1, width), height);
}

const LEFT = 52;

/** The last `count` steps that follow each other. */
export function lastRun(steps, count) {
  let first = steps.length;
  while (first > 0 && steps.length - first < count) {
    if (first < steps.length && steps[first - 1].number !== steps[first].number - 1) break;
    first -= 1;
  }
  return steps.slice(first);
}

/** Host above, device below, on one axis of time. */
export function drawTimeline(canvas, steps) {
  const { pen, width, height } = begin(canvas);
  const lanes = { host: 12, device: 74 };
  const tall = 44;
  pen.fillStyle = colours.muted;
  pen.fillText("host", 0, lanes.host + tall / 2);
  pen.fillText("device", 0, lanes.device + tall / 2);
  box(pen, colours.sunken, LEFT, lanes.host, width - LEFT, tall);
  box(pen, colours.sunken, LEFT, lanes.device, width - LEFT, tall);
  if (!steps.length) {
    pen.fillText("no step yet: send a request", LEFT + 10, lanes.host + tall / 2);
    return;
  }
  const start = steps[0].began;
  const end = Math.max(...steps.map((step) => step.published));
  const x = (time) => LEFT + ((Math.max(start, time) - start) / Math.max(1e-6, end - start)) * (width - LEFT);
  for (const step of steps) {
    for (const [colour, from, to] of [[1, step.began, step.scheduled], [5, step.scheduled, step.launched],
      [3, step.arrived, step.committed], [4, step.committed, step.published]]) {
      if (to > start) box(pen, colours[colour], x(from), lanes.host, x(to) - x(from), tall);
    }
    const [from, to] = [x(step.deviceBegan), x(step.deviceEnded)];
    pen.globalAlpha = step.number % 2 ? 1 : 0.72;
    box(pen, step.failed ? colours.muted : colours[2], from, lanes.device, Math.max(1, to - from - 1), tall);
    pen.globalAlpha = 1;
    if (to - from > 44) {
      pen.fillStyle = colours.ground;
      pen.fillText(String(step.number), from + 6, lanes.device + tall / 2);
    }
  }
  drawAxis(pen, width, height, end - start);
}

function drawAxis(pen, width, height, span) {
  const rough = span / 5;
  const power = 10 ** Math.floor(Math.log10(Math.max(1e-6, rough)));
  const every = [1, 2, 5, 10].map((digit) => digit * power).find((one) => one >= rough) ?? rough;
  pen.textAlign = "center";
  for (let at = 0; at <= span * 1.0001; at += every) {
    const x = LEFT + (at / span) * (width - LEFT);
    const text = milliseconds(at);
    pen.fillStyle = colours.muted;
    if (x + pen.measureText(text).width / 2 <= width) pen.fillText(text, Math.max(x, LEFT + 8), height - 14);
    box(pen, colours.line, x, height - 28, 1, 5);
  }
  pen.textAlign = "start";
}

/** Stacked bars, a step each. */
export function drawRows(canvas, steps) {
  const { pen, width, height } = begin(canvas);
  const most = Math.max(1, ...steps.map((step) => KINDS.reduce((sum, [kind]) => sum + step[kind], 0)));
  const bottom = height - 6;
  pen.fillStyle = colours.muted;
  pen.fillText(String(most), 0, 10);
  pen.fillText("0", 0, bottom - 2);
  box(pen, colours.line, LEFT, bottom, width - LEFT, 1);
  const wide = (width - LEFT) / Math.max(1, steps.length);
  steps.forEach((step, place) => {
    let y = bottom;
    for (const [kind, colour] of KINDS) {
      const tall = (step[kind] / most) * (bottom - 6);
      if (!tall) continue;
      y -= tall;
      box(pen, colours[colour], LEFT + place * wide, y, Math.max(1, wide - Math.min(2, wide / 4)), tall);
    }
  });
}

/** A square for each cell of the pool. */
export function drawPages(canvas, pool) {
  const cells = pool.cells.length;
  const wide = canvas.clientWidth;
  let side = 14;
  while (side > 3 && Math.floor(wide / side) * Math.floor(200 / side) < cells) side -= 1;
  const columns = Math.max(1, Math.floor(wide / side));
  canvas.dataset.height = String(Math.ceil(cells / columns) * side + 1);
  const { pen } = begin(canvas);
  const gap = side > 5 ? 1 : 0;
  const colour = PAGES.map(([, number]) => colours[number]);
  for (let cell = 0; cell < cells; cell += 1) {
    const state = pool.cells.charCodeAt(cell) - 48;
    box(pen, colour[state], (cell % columns) * side, Math.floor(cell / columns) * side, side - gap, side - gap);
  }
}

/** Places of the tree's nodes: to the right what comes later in a text, as tall as all that hangs there. */
export function layOutTree(nodes) {
  const weight = nodes.map((node) => node.pages);
  for (let place = nodes.length - 1; place >= 0; place -= 1) {
    if (nodes[place].parent >= 0) weight[nodes[place].parent] += weight[place];
  }
  const end = Math.max(1, ...nodes.map((node) => node.start + node.pages));
  // By its root, so that namespaces stay together.
  const children = new Map();
  nodes.forEach((node, place) => {
    const of = node.parent >= 0 ? node.parent : -1;
    if (!children.has(of)) children.set(of, []);
    children.get(of).push(place);
  });
  const boxes = new Array(nodes.length);
  const put = (places, top, bottom) => {
    const sum = places.reduce((all, place) => all + Math.sqrt(weight[place]), 0);
    let y = top;
    for (const place of [...places].sort((one, other) => nodes[one].namespace - nodes[other].namespace)) {
      const tall = ((bottom - top) * Math.sqrt(weight[place])) / sum;
      boxes[place] = { x: nodes[place].start / end, width: nodes[place].pages / end, y, height: tall };
      put(children.get(place) ?? [], y, y + tall);
      y += tall;
    }
  };
  put(children.get(-1) ?? [], 0, 1);
  return { boxes, end };
}

export function drawTree(canvas, nodes, layout, chosen) {
  const { pen, width, height } = begin(canvas);
  if (!nodes.length) {
    pen.fillStyle = colours.muted;
    pen.fillText("nothing is cached yet", 0, 12);
    return;
  }
  const most = Math.max(1, ...nodes.map((node) => node.hits));
  nodes.forEach((node, place) => {
    const { x, y, width: wide, height: tall } = layout.boxes[place];
    const [left, top] = [x * width, y * height];
    pen.globalAlpha = 0.25 + 0.75 * (Math.log1p(node.hits) / Math.log1p(most));
    box(pen, node.locks ? colours[1] : colours[5], left, top, Math.max(1, wide * width - 1), Math.max(1, tall * height - 1));
    pen.globalAlpha = 1;
    if (place === chosen) {
      pen.strokeStyle = colours.text;
      pen.lineWidth = 2;
      pen.strokeRect(left + 1, top + 1, Math.max(2, wide * width - 3), Math.max(2, tall * height - 3));
    }
  });
}

/** Which node is at a place (0..1 each), -1 for none. */
export function nodeAt(layout, x, y) {
  return layout.boxes.findIndex((one) => x >= one.x && x < one.x + one.width && y >= one.y && y < one.y + one.height);
}

export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (value < 0.9995) return `${Math.round(value * 1000)} µs`;
  if (value < 9.995) return `${value.toFixed(2)} ms`;
  return value < 999.5 ? `${value.toFixed(value < 99.95 ? 1 : 0)} ms` : `${(value / 1000).toFixed(2)} s`;
}

export function seconds(value) {
  return value === null || value === undefined ? "–" : milliseconds(value * 1000);
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (value >= 1024 && place < units.length - 1) {
    value /= 1024;
    place += 1;
  }
  return `${value.toFixed(place && value < 100 ? 1 : 0)} ${units[place]}`;
}

export function median(values) {
  const sorted = [...values].sort((one, other) => one - other);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : 0;
}
