"use strict";
// Draws routing.json, which the page holds whole. Nothing is fetched and no markup is built from
// data: every name reaches the page as text.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const R = read("routing"), LOOK = read("look");
const SITES = R.sites, COUNT = SITES.length, NAMESPACE = document.getElementById("namespace").namespaceURI;
const TYPES = { attn: "attention", ffn: "FFN" };
const darkness = matchMedia("(prefers-color-scheme: dark)");
const painters = []; // every picture's redraw, for a new width or a change between light and dark

const within = (id) => document.getElementById(id);
const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function node(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
function shape(tag, attributes, ...children) {
  const made = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
const known = (value) => typeof value === "number";
const number = (value) => !known(value) ? "–" : value === 0 ? "0"
  : Math.abs(value) < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
const percent = (value) => known(value) ? `${(100 * value).toFixed(1)} %` : "–";
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// ---- colours: one list for light and one for dark, in step with the PNG and SVG pictures
function colour(value, low, high, signed) {
  if (!known(value)) return "transparent";
  const list = LOOK[(signed ? "difference" : "share") + (darkness.matches ? "_dark" : "")];
  if (!signed && value <= 1e-12) return colourOf("--never");
  const place = signed ? (value / high + 1) / 2 : high > low ? (value - low) / (high - low) : 1;
  return list[clamp(Math.round(place * (list.length - 1)), 0, list.length - 1)];
}
function scale(host, low, high, signed, tell, words, zero = "never") {
  const list = LOOK[(signed ? "difference" : "share") + (darkness.matches ? "_dark" : "")];
  const ramp = node("span", { className: "ramp" });
  ramp.style.background = `linear-gradient(to right, ${list.filter((_, i) => i % 8 === 0).join(",")})`;
  const key = node("span", { className: "key" });
  key.style.background = colourOf("--never");
  host.replaceChildren(tell(signed ? -high : low), ramp, tell(high), node("span", {}, words));
  if (!signed && low === 0) host.append(key, zero);
}

// ---- a heat map with pointer, keyboard and tip; `spec` says what it shows, draw() may be called again
class Heat {
  constructor(host, spec) {
    Object.assign(this, { host, spec, cell: null });
    this.canvas = node("canvas", { tabIndex: 0 });
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-label", `${spec.name}. Arrow keys move from cell to cell.`);
    this.tip = node("div", { className: "tip", hidden: true });
    this.tip.setAttribute("role", "status");
    host.append(this.canvas, this.tip);
    this.canvas.addEventListener("pointermove", (event) => this.select(this.under(event)));
    this.canvas.addEventListener("pointerleave", () => this.hide());
    this.canvas.addEventListener("blur", () => this.hide());
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("click", (event) => this.pin(this.under(event)));
    painters.push(() => this.draw());
  }
  x(column) { return Math.round(this.left + column * this.wide); }
  y(row) { return Math.round(row * this.tall); }
  draw() {
    const { rows, columns } = this.spec.size();
    const room = this.host.clientWidth, ratio = window.devicePixelRatio || 1;
    const { rowTicks, columnTicks } = this.spec.ticks();
    const pen = this.canvas.getContext("2d");
    const font = '11px system-ui, "DejaVu Sans", sans-serif';
    pen.font = font;
    this.left = 12 + Math.max(...rowTicks.map((tick) => Math.min(120, pen.measureText(tick.text).width)));
    this.wide = (room - this.left - 1) / columns;
    this.tall = this.spec.square ? this.wide : clamp(420 / rows, 5, 18);
    const height = Math.ceil(rows * this.tall) + 22;
    Object.assign(this.canvas, { width: room * ratio, height: height * ratio });
    Object.assign(this.canvas.style, { width: `${room}px`, height: `${height}px` });
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
      pen.fillStyle = colour(this.spec.value(row, column), this.spec.low?.() ?? 0, this.spec.high(), this.spec.signed?.());
      pen.fillRect(this.x(column), this.y(row), this.x(column + 1) - this.x(column), this.y(row + 1) - this.y(row));
    }
    Object.assign(pen, { font, fillStyle: colourOf("--faint"), textBaseline: "middle" });
    this.letters(pen, rowTicks, columnTicks, rows);
    for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++)
      if (this.spec.marked?.(row, column)) this.frame(pen, row, column, colourOf("--own"), 0.75);
    const cut = this.spec.cut?.() ?? 0; // between the attention and the FFN part
    if (cut) {
      pen.fillStyle = colourOf("--ink");
      pen.fillRect(this.x(cut), 0, 1, this.y(rows));
      pen.fillRect(this.left, this.y(cut), this.x(columns) - this.left, 1);
    }
    if (this.cell) this.frame(pen, ...this.cell, colourOf("--ink"), 2);
  }
  letters(pen, rowTicks, columnTicks, rows) {
    pen.textAlign = "right";
    let last = -Infinity;
    for (const tick of rowTicks) {
      const y = Math.max(6, (tick.at + 0.5) * this.tall);
      if (y - last < 13) continue;
      pen.fillText(tick.text, this.left - 6, y, 120);
      last = y;
    }
    pen.textAlign = "center";
    last = -Infinity;
    for (const tick of columnTicks) {
      const x = this.left + (tick.at + 0.5) * this.wide, half = pen.measureText(tick.text).width / 2;
      if (x - half < last + 5) continue;
      pen.fillText(tick.text, Math.min(x, this.host.clientWidth - half), rows * this.tall + 13);
      last = x + half;
    }
  }
  frame(pen, row, column, ink, width) {
    Object.assign(pen, { strokeStyle: ink, lineWidth: width });
    pen.strokeRect(this.x(column), this.y(row), this.x(column + 1) - this.x(column), this.y(row + 1) - this.y(row));
  }
  under(event) {
    const { rows, columns } = this.spec.size(), box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - this.left) / this.wide);
    const row = Math.floor((event.clientY - box.top) / this.tall);
    return row >= 0 && column >= 0 && row < rows && column < columns ? [row, column] : null;
  }
  select(cell) {
    if (!cell) return this.hide();
    if (this.cell && cell[0] === this.cell[0] && cell[1] === this.cell[1] && !this.tip.hidden) return;
    this.cell = cell;
    this.draw();
    const [title, facts] = this.spec.tell(...cell);
    this.tip.replaceChildren(node("strong", {}, title), node("dl", {},
      ...facts.flatMap(([name, value]) => [node("dt", {}, name), node("dd", {}, value)])));
    this.tip.hidden = false;
    const right = this.x(cell[1] + 1) + 10, room = this.host.clientWidth;
    const left = right + this.tip.offsetWidth > room ? this.x(cell[1]) - this.tip.offsetWidth - 10 : right;
    const low = this.canvas.offsetHeight - this.tip.offsetHeight;
    this.tip.style.left = `${clamp(left, 0, Math.max(0, room - this.tip.offsetWidth))}px`;
    this.tip.style.top = `${clamp(this.y(cell[0]) - 10, 0, Math.max(0, low))}px`;
    this.spec.selected?.(...cell);
  }
  hide() { this.tip.hidden = true; }
  pin(cell) { if (cell) { this.select(cell); this.spec.pinned?.(...cell); } }
  key(event) {
    const { rows, columns } = this.spec.size(), [row, column] = this.cell ?? [0, -1];
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      Home: [0, -columns], End: [0, columns], PageUp: [-rows, 0], PageDown: [rows, 0] };
    if (event.key === "Escape") this.hide();
    else if (event.key === "Enter") this.pin(this.cell);
    else if (event.key in moves) {
      const [down, along] = moves[event.key];
      this.select([clamp(row + down, 0, rows - 1), clamp(column + along, 0, columns - 1)]);
    } else return;
    event.preventDefault();
  }
}

// ---- the main map
const MEASURES = {
  share: ["share of choices", percent], weight: ["mean weight π", number],
  probability: ["mean gate probability", number],
};
const state = { task: "", measure: "share", grouped: false, order: SITES.map((_, index) => index) };
const taken = () => state.task ? R.tasks[state.task] : R;
const pooled = (row, column) => SITES[row].pool === SITES[column].pool;
// One scale for all tasks. A gate's probabilities lie close together, so theirs begins at the lowest.
const ranges = {};
function range(measure) {
  if (ranges[measure]) return ranges[measure];
  const parts = measure === "difference" ? [R.compare] : [R, ...Object.values(R.tasks ?? {})];
  let low = Infinity, high = 0;
  for (const part of parts) part[measure].forEach((row, at) => row.forEach((value, column) => {
    if (!known(value) || !pooled(at, column)) return;
    low = Math.min(low, value);
    high = Math.max(high, Math.abs(value));
  }));
  return ranges[measure] = { low: measure === "probability" && low < high ? low : 0, high: high || 1 };
}
const shown = (row, column) => {
  const from = state.measure === "difference" ? R.compare : taken();
  return pooled(row, column) ? from[state.measure][row][column] : null;
};
function layerTicks() {
  if (COUNT <= 16) return state.order.map((site, at) => ({ at, text: SITES[site].name }));
  const ticks = [];
  state.order.forEach((site, at) => {
    const text = String(SITES[site].layer), last = ticks.at(-1);
    if (last?.text === text) Object.assign(last, { at: (last.first + at) / 2 });
    else ticks.push({ at, first: at, text });
  });
  return ticks;
}
function tellCell(at, across) {
  const row = state.order[at], column = state.order[across], from = taken();
  const title = `${SITES[row].name} → ${SITES[column].name}${row === column ? " (its own)" : ""}`;
  if (!pooled(row, column)) return [title, [["pool", "not in this block's pool"]]];
  const facts = [["share", percent(from.share[row][column])], ["chosen", `${from.counts[row][column]} times`],
    ["weight π", number(from.weight[row][column])], ["probability", number(from.probability[row][column])]];
  if (R.compare) facts.push(["difference", number(R.compare.difference[row][column])]);
  return [title, facts];
}
function tellBlock(at) {
  const row = state.order[at], from = taken();
  const best = from.share[row].map((share, control) => [share, control]).filter(([share]) => share > 0)
    .sort((a, b) => b[0] - a[0] || a[1] - b[1]);
  const items = best.slice(0, 12).map(([share, control]) => {
    const bar = node("i", { className: SITES[control].block });
    bar.style.width = `${100 * share / best[0][0]}%`;
    return node("li", {}, node("span", {}, SITES[control].name), node("div", { className: "meter" }, bar),
      node("span", {}, percent(share)));
  });
  const rest = best.length > 12 ? [node("p", { className: "faint" }, `and ${best.length - 12} more`)] : [];
  within("block").replaceChildren(node("h3", {}, `Block ${SITES[row].name} chooses`),
    node("ol", {}, ...items), ...rest,
    node("p", { className: "faint" }, `${from.decisions} decisions${state.task ? ` on ${state.task}` : ""}`));
}
const map = new Heat(within("map"), {
  name: "Blocks by controls", square: true, size: () => ({ rows: COUNT, columns: COUNT }),
  ticks: () => ({ rowTicks: layerTicks(), columnTicks: layerTicks() }),
  value: (row, column) => shown(state.order[row], state.order[column]),
  low: () => range(state.measure).low, high: () => range(state.measure).high, signed: () => state.measure === "difference",
  cut: () => state.grouped ? SITES.filter((site) => site.block !== "ffn").length : 0,
  marked: (row, column) => row === column, tell: tellCell, selected: tellBlock,
  pinned: (row, column) => keep(`${state.order[row]}.${state.order[column]}`),
});
painters.push(() => {
  const signed = state.measure === "difference", { low, high } = range(state.measure);
  const [words, tell] = MEASURES[state.measure];
  scale(map.host.parentNode.querySelector(".scale"), low, high, signed, tell, words,
    state.measure === "share" ? "never" : "0");
});
function keep(cell) {
  const parts = { task: state.task, measure: state.measure, cell };
  const words = Object.entries(parts).filter(([, value]) => value)
    .map(([name, value]) => `${name}=${encodeURIComponent(value)}`);
  history.replaceState(null, "", `#${words.join("&")}`); // without an event: all is shown already
}
function choose() {
  const rank = (index) => (state.grouped ? SITES[index].block === "ffn" : 0);
  state.order = SITES.map((_, index) => index).sort((a, b) => rank(a) - rank(b) || a - b);
  map.hide();
  painters.forEach((paint) => paint());
  tellBlock(map.cell?.[0] ?? 0);
}
function choices() {
  const option = (value, text) => node("option", { value }, text);
  const measure = node("select", {}, ...Object.entries(MEASURES).map(([key, [text]]) => option(key, text)));
  const task = node("select", {}, option("", "all"), ...Object.keys(R.tasks ?? {}).map((name) => option(name, name)));
  const grouped = node("input", { type: "checkbox" });
  measure.addEventListener("change", () => { state.measure = measure.value; choose(); });
  task.addEventListener("change", () => { state.task = task.value; choose(); });
  grouped.addEventListener("change", () => { state.grouped = grouped.checked; map.cell = null; choose(); });
  within("choices").append(node("label", {}, "Show", measure), node("label", {}, "Task", task),
    node("label", {}, grouped, "attention before FFN"));
  const follow = () => {
    const asked = new URLSearchParams(location.hash.slice(1));
    if (asked.get("measure") in MEASURES) measure.value = state.measure = asked.get("measure");
    if (Object.hasOwn(R.tasks ?? {}, asked.get("task") ?? "")) task.value = state.task = asked.get("task");
    choose();
    const cell = (asked.get("cell") ?? "").split(".").map(Number);
    if (cell.length === 2 && cell.every((index) => Number.isInteger(index) && index >= 0 && index < COUNT))
      map.select(cell.map((index) => state.order.indexOf(index)));
  };
  addEventListener("hashchange", follow);
  return follow;
}
