// ---- words, tables and charts around the map
function table(host, columns, rows) {
  const body = node("tbody");
  const fill = (list) => body.replaceChildren(...list.map((row) => node("tr", { className: row.dead ? "dead" : "" },
    ...columns.map(([, key, tell]) => node("td", { className: tell ? "" : "text" },
      tell ? tell(row[key]) : String(row[key] ?? "–"))))));
  const heads = columns.map(([title, key, tell]) => {
    const head = node("th", { className: tell ? "" : "text", scope: "col" });
    const button = node("button", { type: "button" }, title);
    button.addEventListener("click", () => {
      const down = head.ariaSort !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.ariaSort = down ? "descending" : "ascending";
      const order = (a, b) => tell ? (b[key] ?? -Infinity) - (a[key] ?? -Infinity) : String(b[key]).localeCompare(String(a[key]), undefined, { numeric: true });
      fill([...rows].sort((a, b) => (down ? 1 : -1) * order(a, b)));
    });
    head.append(button);
    return head;
  });
  fill(rows);
  host.append(node("table", {}, node("thead", {}, node("tr", {}, ...heads)), body));
}
function tables() {
  const change = Object.fromEntries((R.ablation ?? []).map((entry) => [entry.site, entry.loss_change]));
  const sites = R.per_site.map((entry, index) => ({ ...entry, name: SITES[index].name,
    change: change[SITES[index].name], distance: R.compare?.distance[index] }));
  table(within("sites"), [["block", "name"], ["local share", "local_share", percent],
    ["most chosen", "top"], ["effective controls", "effective", number],
    ["entropy of use", "use_entropy", number], ["entropy of gate", "gate_entropy", number],
    ["lead", "margin", number], ["update ÷ output", "relative_size", number],
    ...(R.compare ? [["distance", "distance", number]] : []),
    ...(R.ablation ? [["loss change", "change", number]] : [])], sites);
  const controls = R.per_control.map((entry) => ({ ...entry, mark: entry.dead ? "dead" : "" }));
  table(within("controls"), [["control", "name"], ["use", "use", percent], ["norm ‖B A‖", "norm", number],
    ["", "mark"]], controls);
}
function summary() {
  const all = R.summary;
  const facts = [["local share", percent(all.local_share)], ["local share by chance", percent(all.chance_local)],
    ["attention → FFN", percent(all.attn_to_ffn)], ["FFN → attention", percent(all.ffn_to_attn)],
    ["effective controls", number(all.effective)], ["entropy of use (nats)", number(all.use_entropy)],
    ["entropy of gate (nats)", number(all.gate_entropy)], ["lead of the chosen", number(all.margin)]];
  const dead = all.dead.length ? `${all.dead.length}: ${all.dead.join(", ")}` : "none";
  within("summary").append(...facts.map(([name, value]) =>
    node("div", {}, node("dt", {}, name), node("dd", {}, value))),
    node("div", { className: "wide" }, node("dt", {}, "dead controls"), node("dd", {}, dead)));
}
function warnings() {
  const host = within("warnings");
  host.hidden = !R.warnings.length;
  for (const warning of R.warnings) host.append(node("p", { className: "warning" },
    node("strong", {}, `${warning.name.replaceAll("_", " ")}: `), warning.message,
    ...(warning.key ? [" Recipe key: ", node("code", {}, warning.key)] : [])));
}
// Round numbers from low to high, three or more of them.
function rounds(low, high) {
  const rough = (high - low) / 3, power = 10 ** Math.floor(Math.log10(rough));
  const step = [5, 2.5, 2, 1].find((factor) => factor * power <= rough) * power, found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++)
    found.push(Number((at * step).toPrecision(6)));
  return found;
}
// A chart's frame: pixels from values, with lines at round numbers.
function chart(host, low, high, height, tell) {
  const width = Math.max(300, host.clientWidth), left = 52, top = 8, bottom = height - 22;
  const y = (value) => bottom - (value - low) / (high - low) * (bottom - top);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (const value of rounds(low, high)) {
    svg.append(shape("path", { class: "axis", d: `M${left} ${y(value)}H${width}` }),
      shape("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, tell(value)));
  }
  return { svg, y, left, width, bottom };
}
function overTraining() {
  const entries = R.history ?? [], host = within("history");
  if (!entries.length) return;
  host.hidden = false;
  const box = host.querySelector(".line"), ends = [entries[0].step, entries.at(-1).step];
  const high = Math.max(0.01, R.summary.chance_local, ...entries.map((entry) => entry.local_share ?? 0)) * 1.1;
  painters.push(() => {
    const { svg, y, left, width, bottom } = chart(box, 0, high, 170, percent);
    const x = (step) => left + 10 + (ends[1] > ends[0] ? (step - ends[0]) / (ends[1] - ends[0]) : 0.5) * (width - left - 30);
    const points = entries.filter((entry) => known(entry.local_share)).map((entry) => [x(entry.step), y(entry.local_share), entry]);
    svg.setAttribute("aria-label", `Local share from step ${ends[0]} to step ${ends[1]}`);
    svg.append(shape("path", { class: "chance", d: `M${left} ${y(R.summary.chance_local)}H${width}` }),
      shape("polyline", { class: "local", points: points.map(([a, b]) => `${a},${b}`).join(" ") }));
    for (const [a, b, entry] of points) svg.append(shape("circle", { class: "dot", cx: a, cy: b, r: 2.5 },
      shape("title", {}, `step ${entry.step}: ${percent(entry.local_share)}`)));
    for (const step of new Set(ends)) svg.append(shape("text", { x: x(step) + 14, y: bottom + 16, "text-anchor": "end" }, `step ${step}`));
    box.replaceChildren(svg);
  });
  const most = Math.max(...entries.flatMap((entry) => entry.use)) || 1;
  const columnTicks = entries.map((entry, at) => ({ at, text: String(entry.step) }));
  const natural = SITES.map((_, index) => index);
  new Heat(host.querySelector(".heat"), {
    name: "Controls by training step", size: () => ({ rows: COUNT, columns: entries.length }),
    ticks: () => ({ rowTicks: natural.map((at) => ({ at, text: SITES[at].name })), columnTicks }),
    value: (row, column) => entries[column].use[row], high: () => most,
    tell: (row, column) => [`${SITES[row].name} at step ${entries[column].step}`,
      [["use", percent(entries[column].use[row])], ["local share", percent(entries[column].local_share)]]],
  });
  painters.push(() => scale(host.querySelector(".scale"), 0, most, false, percent, "share of all choices"));
}
function distances() {
  const names = R.task_distance?.tasks ?? [], matrix = R.task_distance?.matrix ?? [];
  if (names.length < 2) return;
  const host = within("distance"), high = 1;
  host.hidden = false;
  host.querySelector("figure").style.maxWidth = `${Math.min(34, 10 + 4 * names.length)}rem`;
  const ticks = names.map((text, at) => ({ at, text }));
  new Heat(host.querySelector(".heat"), {
    name: "Tasks by tasks", square: true, size: () => ({ rows: names.length, columns: names.length }),
    ticks: () => ({ rowTicks: ticks, columnTicks: ticks }), value: (row, column) => matrix[row][column],
    high: () => high, tell: (row, column) => [`${names[row]} and ${names[column]}`, [["distance", number(matrix[row][column])]]],
  });
  painters.push(() => scale(host.querySelector(".scale"), 0, high, false, number, "distance", "0"));
}
function ablation() {
  const entries = R.ablation ?? [];
  if (!entries.length) return;
  within("ablation").hidden = false;
  const box = within("ablation").querySelector(".bars"), spread = entries.flatMap((entry) =>
    [entry.loss_change - (entry.stderr ?? 0), entry.loss_change + (entry.stderr ?? 0)]);
  const low = Math.min(0, ...spread), high = Math.max(0, ...spread), block = Object.fromEntries(SITES.map((site) => [site.name, site.block]));
  painters.push(() => {
    const { svg, y, left, width, bottom } = chart(box, low, high > low ? high : low + 1, 240, number);
    const wide = (width - left) / entries.length, every = Math.ceil(52 / wide);
    svg.setAttribute("aria-label", "Change of loss by block; the table of blocks holds the numbers");
    entries.forEach((entry, index) => {
      const x = left + wide * (index + 0.15), middle = left + wide * (index + 0.5), error = entry.stderr ?? 0;
      svg.append(shape("rect", { class: block[entry.site], x, width: wide * 0.7, y: y(Math.max(0, entry.loss_change)),
        height: Math.abs(y(0) - y(entry.loss_change)) }, shape("title", {}, `${entry.site}: ${number(entry.loss_change)} ± ${number(error)}`)),
        shape("path", { class: "error", d: `M${middle} ${y(entry.loss_change - error)}V${y(entry.loss_change + error)}` }));
      if (index % every === 0) svg.append(shape("text", { x: middle, y: bottom + 16, "text-anchor": "middle" }, entry.site));
    });
    box.replaceChildren(svg);
  });
}
// Each token of --text, with its own vote at one block, and what the block chose.
function tokens() {
  if (!R.tokens) return;
  within("tokens").hidden = false;
  const { tokens: letters, votes, probability, choice, margin } = R.tokens;
  const pick = node("select", {}, ...SITES.map((site, at) => node("option", { value: at }, site.name)));
  const told = node("p", { role: "status" }), list = node("ol", { className: "tokens" });
  const show = () => {
    const at = Number(pick.value), own = R.level === "token" ? choice[at].length / letters.length : 0;
    const chosen = [...new Set(choice[at])].map((control) => SITES[control].name).join(", ");
    const agreed = (token) => (own ? choice[at].slice(token * own, (token + 1) * own) : choice[at]).includes(votes[at][token]);
    const count = letters.filter((_, token) => agreed(token)).length;
    told.textContent = `Chosen: ${chosen}, by ${number(margin[at])} of probability. `
      + `${count} of ${letters.length} tokens vote for what was chosen (outlined).`;
    list.replaceChildren(...letters.map((text, token) => node("li", { className: agreed(token) ? "agreed" : "" },
      node("code", {}, text), node("span", {}, SITES[votes[at][token]].name), node("span", {}, percent(probability[at][token])))));
  };
  pick.addEventListener("change", show);
  within("tokens").append(node("form", {}, node("label", {}, "Block", pick)), told, list);
  show();
}

if (R.compare) MEASURES.difference = [`difference from ${String(R.compare.run).split(/[\\/]/).at(-1)}`, number];
const follow = choices();
warnings();
summary();
tables();
overTraining();
distances();
ablation();
tokens();
follow();
darkness.addEventListener("change", () => painters.forEach((paint) => paint()));
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) painters.forEach((paint) => paint());
  width = innerWidth;
});
