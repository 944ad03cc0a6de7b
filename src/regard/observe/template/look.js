const D = JSON.parse($("data").textContent);
const L = D.layers, H = D.heads, T = D.length, N = D.segments.length;

/* ---- small helpers ------------------------------------------------------------------------ */
const many = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
const clamp = (v, low, high) => Math.max(low, Math.min(high, v));
function show(v, digits = 4) {
  if (!v) return "0";
  return v < 1e-4 ? v.toExponential(digits - 1).replace("-", "−") : v.toPrecision(digits);
}
const percent = (v) => (v * 100).toFixed(1) + " %";

/* ---- the data ------------------------------------------------------------------------------- */
function bytes(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}
function halves(raw) {
  const words = new Uint16Array(raw.buffer), out = new Float32Array(words.length);
  for (let i = 0; i < words.length; i++) {
    const word = words[i], exponent = (word >> 10) & 31, fraction = word & 1023;
    out[i] = (word >> 15 ? -1 : 1) * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
  }
  return out;
}
// Where the kept tiles of each row begin.
const starts = (tiles) => tiles.kept.reduce((all, n) => [...all, all[all.length - 1] + n], [0]);
const M = D.maps, rows = M.rows, keys = M.keys, R = rows.length - 1, C = keys.length - 1, at = starts(M);
const small = D.thumbnails, smallAt = starts(small), smallBytes = bytes(small.data);
const means = new Float32Array(bytes(D.means).buffer);
const given = { shares: new Float32Array(bytes(D.keys.shares).buffer), arrivals: new Int32Array(bytes(D.keys.arrivals).buffer), sinks: bytes(D.keys.sinks) };
const letters = M.data.length / (L * H);
const opened = new Map();
// A head's numbers; decoded when it is first looked at.
function open(head) {
  if (!opened.has(head)) {
    if (opened.size > 64) opened.clear();
    const all = halves(bytes(M.data.slice(head * letters, (head + 1) * letters))), size = at[R];
    opened.set(head, { maps: all.subarray(0, size), masses: all.subarray(size, size + R * N), entropy: all.subarray(size + R * N, size + R * N + R) });
  }
  return opened.get(head);
}
const value = (head, i, j) => (j < M.kept[i] ? open(head).maps[at[i] + j] : null);
const tileOf = (edges, arrival) => {
  let low = 0, high = edges.length - 2;
  while (low < high) { const middle = (low + high + 1) >> 1; if (edges[middle] <= arrival) low = middle; else high = middle - 1; }
  return low;
};
const single = (edges, i) => edges[i + 1] - edges[i] === 1;
const exact = C === T && R === rows[R] - rows[0];

/* ---- tokens and kinds ------------------------------------------------------------------------- */
const kindName = (arrival) => D.kind_names[D.kinds[arrival]];
const spanOf = (arrival) => D.spans.find((span) => span.start <= arrival && arrival < span.stop);
const kindColour = (name) => `var(--${["first", "template", "query", "visual", "generated"].includes(name) ? name : /^image|^video/.test(name) ? "visual" : "other"})`;
const printed = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
function words(start, stop) {
  if (stop - start === 1) return h("span", { class: "token" }, `“${printed(D.tokens[start])}”`);
  const text = D.tokens.slice(start, Math.min(stop, start + 16)).join("");
  return h("span", { class: "token" }, `“${printed(text)}${stop - start > 16 ? "…" : ""}”`);
}
const range = (start, stop) => (stop - start === 1 ? count(start) : `${count(start)}–${count(stop - 1)}`);
function told(edges, i) {
  const span = spanOf(edges[i]), start = edges[i], stop = edges[i + 1];
  const place = span && span.grid && stop - start === 1 ? gridPlace(span, start) : null;
  return [range(start, stop) + " ", place ? `${kindWord(span)}, ${place}` : words(start, stop)];
}
const kindWord = (span) => `${span.kind} ${span.image + 1}`;
function gridPlace(span, arrival) {
  const [frames, , columns] = span.grid, offset = arrival - span.start, inFrame = offset % (span.grid[1] * columns);
  const frame = frames > 1 ? `frame ${Math.floor(offset / (span.grid[1] * columns)) + 1}, ` : "";
  return `${frame}row ${Math.floor(inFrame / columns) + 1}, column ${inFrame % columns + 1}`;
}

/* ---- colours: lightness changes evenly with the root of a share ----------------------------------- */
const dark = matchMedia("(prefers-color-scheme: dark)");
let palette = null;
function oklch(l, c, hue) {
  const a = c * Math.cos(hue * Math.PI / 180), b = c * Math.sin(hue * Math.PI / 180);
  const x = (l + 0.3963377774 * a + 0.2158037573 * b) ** 3, y = (l - 0.1055613458 * a - 0.0638541728 * b) ** 3, z = (l - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [4.0767416621 * x - 3.3077115913 * y + 0.2309699292 * z, -1.2684380046 * x + 2.6097574011 * y - 0.3413193965 * z, -0.0041960863 * x - 0.7034186147 * y + 1.707614701 * z];
}
function colour(t) {
  const l = dark.matches ? 0.27 + 0.68 * t : 0.985 - 0.7 * t, hue = dark.matches ? 285 - 180 * t : 135 + 150 * t;
  let c = 0.008 + 0.135 * Math.sin(Math.PI * (dark.matches ? 0.04 + 0.79 * t : 0.01 + 0.79 * t)), rgb = oklch(l, c, hue);
  while (c > 0 && rgb.some((v) => v < -1e-4 || v > 1.0001)) { c -= 0.004; rgb = oklch(l, c, hue); }
  return rgb.map((v) => Math.round(255 * (v <= 0.0031308 ? 12.92 * Math.max(v, 0) : 1.055 * Math.min(v, 1) ** (1 / 2.4) - 0.055)));
}
const shade = (v) => palette[Math.round(255 * Math.sqrt(clamp(v, 0, 1)))];
const css = (rgb) => `rgb(${rgb.join(" ")})`;
const inkOn = (rgb) => (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140 ? "#14181f" : "#ffffff");
function paint(canvas, width, height, rgba) {
  canvas.width = width; canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const found = rgba(y, x), at = 4 * (y * width + x);
    if (!found) continue;
    image.data[at] = found[0]; image.data[at + 1] = found[1]; image.data[at + 2] = found[2];
    image.data[at + 3] = found.length > 3 ? found[3] : 255;
  }
  context.putImageData(image, 0, 0);
}

/* ---- roles: a shape and a letter each --------------------------------------------------------------- */
const SHAPES = {
  sink: ["S", "M8 1A7 7 0 1 1 8 15A7 7 0 1 1 8 1Z"], local: ["L", "M2 2H14V14H2Z"], previous: ["P", "M0 8L5 1.5H15V14.5H5Z"],
  induction: ["I", "M8 -1L17 8L8 17L-1 8Z"], retrieval: ["R", "M4 1H12L16 8L12 15H4L0 8Z"], vision: ["V", "M0 8Q8 -4 16 8Q8 20 0 8Z"],
};
function badge(name) {
  const [letter, path] = SHAPES[name] || [name[0].toUpperCase(), "M8 0L16 15H0Z"];
  return s("svg", { class: "badge", viewBox: "0 0 16 16", "aria-hidden": "true" }, s("path", { d: path }), s("text", { x: 8, y: 11.2 }, letter));
}
const names = D.roles.names, rolesOf = (head) => D.roles.marks[head].map((i) => names[i]);

/* ---- the grid ------------------------------------------------------------------------------------------ */
let selected = 0, pin = R - 1, focus = null, only = null, across = null;
const cells = [];
const place = (head) => [Math.floor(head / H), head % H];
const title = (head) => `Layer ${place(head)[0]}, head ${place(head)[1]}`;
const meanEntropy = (head) => means[head * (N + 1) + N];
const most = Math.max(...Array.from({ length: L * H }, (_, head) => meanEntropy(head)), 1e-9);
const SHOWS = [
  { name: "attention", end: "1", note: "share of a row's attention; colours go with its root" },
  { name: "entropy", end: show(most, 3), note: "nats, mean over rows", of: (head) => (meanEntropy(head) / most) ** 2 },
  ...D.segments.map((name, k) => ({ name: `mass on ${name}`, end: "1", note: `share of attention on ${name}, mean over rows`, of: (head) => means[head * (N + 1) + k] })),
];
let shows = SHOWS[0], drawn = "";
function buildGrid() {
  // The longer side goes across where there is room, and down on a phone.
  const layersAcross = (L >= H) === (innerWidth > 640), n = layersAcross ? L : H, m = layersAcross ? H : L;
  if (across === layersAcross) return;
  across = layersAcross;
  const grid = $("grid"), size = clamp(Math.floor(1060 / n), 12, 64), every = n > 20 ? 5 : 1;
  grid.style.gridTemplateColumns = `max-content repeat(${n}, minmax(0, 1fr))`;
  grid.style.setProperty("--sheet-size", `${100 * H}% ${100 * L}%`);
  grid.style.maxWidth = `${n * (size + 3) + 48}px`;
  grid.setAttribute("aria-label", `${L} layers of ${H} heads; arrows move, Enter goes into the map`);
  const out = [h("div", { role: "row" }, h("span", { class: "axis" }, layersAcross ? "layer" : "head"), Array.from({ length: n }, (_, x) => h("span", { class: "tag", "aria-hidden": "true" }, x % every ? "" : String(x))))];
  for (let y = 0; y < m; y++) {
    const line = h("div", { role: "row" }, h("span", { class: "tag side", "aria-hidden": "true" }, (y ? "" : layersAcross ? "head " : "layer ") + y));
    for (let x = 0; x < n; x++) {
      const head = layersAcross ? x * H + y : y * H + x, roles = rolesOf(head);
      cells[head] = cells[head] || h("div", { class: "cell", role: "gridcell", tabindex: -1, "data-head": place(head).join("."), "aria-selected": "false", title: [title(head), ...roles].join(" · "), "aria-label": [title(head), ...roles, `entropy ${show(meanEntropy(head), 3)}`].join(", "), style: `background-position: ${H > 1 ? 100 * place(head)[1] / (H - 1) : 0}% ${L > 1 ? 100 * place(head)[0] / (L - 1) : 0}%` },
        roles.length ? h("span", { class: "badges" }, roles.map(badge)) : null);
      line.append(cells[head]);
    }
    out.push(line);
  }
  grid.replaceChildren(...out);
}
function drawGrid() {
  // One picture of all thumbnails, of which each cell shows its own: hundreds of canvases would take seconds.
  const n = shows.of ? 1 : small.rows.length - 1, m = shows.of ? 1 : small.keys.length - 1, size = smallAt[small.rows.length - 1], sheet = h("canvas", {});
  paint(sheet, H * m, L * n, (y, x) => {
    const head = Math.floor(y / n) * H + Math.floor(x / m), i = y % n, j = x % m;
    if (shows.of) return shade(shows.of(head));
    return j < small.kept[i] ? palette[smallBytes[head * size + smallAt[i] + j]] : null;
  });
  // A short address: as a data URL it would be copied into the style of every cell.
  URL.revokeObjectURL(drawn);
  drawn = URL.createObjectURL(new Blob([bytes(sheet.toDataURL().split(",")[1])], { type: "image/png" }));
  $("grid").style.setProperty("--sheet", `url("${drawn}")`);
  paint($("scale"), 256, 1, (_, x) => shade(x / 255));
  $("scale-end").textContent = shows.end;
  $("scale-note").textContent = shows.note;
}
function gridKeys(event) {
  const cell = event.target.closest(".cell");
  if (!cell) return;
  const [layer, head] = cell.dataset.head.split(".").map(Number), moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (event.key === "Enter" || event.key === " ") { select(layer * H + head); $("map").focus(); if (!focus) point(pin, strongest(pin)); }
  else if (event.key === "Home" || event.key === "End") focusCell(event.key === "Home" ? 0 : L * H - 1);
  else if (moves[event.key]) {
    const [x, y] = moves[event.key], [dl, dh] = across ? [x, y] : [y, x];
    focusCell(clamp(layer + dl, 0, L - 1) * H + clamp(head + dh, 0, H - 1));
  } else return;
  event.preventDefault();
}
function focusCell(head) { select(head); cells[head].focus(); }

/* ---- one head ------------------------------------------------------------------------------------------- */
function select(head) {
  cells[selected].setAttribute("aria-selected", "false"); cells[selected].tabIndex = -1;
  selected = head;
  cells[head].setAttribute("aria-selected", "true"); cells[head].tabIndex = 0;
  history.replaceState(null, "", `#${place(head).join(".")}`);
  $("head-heading").textContent = title(head);
  $("marks").replaceChildren(...rolesOf(head).map((name) => h("span", { class: "role" }, badge(name), name, D.roles.scores[name] ? h("small", {}, D.roles.scores[name][head].toFixed(2)) : null)));
  $("map").setAttribute("aria-label", `Attention of ${title(head)}: arrows move over ${R} rows and ${C} columns, Enter keeps a row, Escape goes back`);
  drawMap(); drawFacts(); drawPrompt(); readout();
}
function drawMap() {
  const { maps } = open(selected);
  paint($("map"), C, R, (i, j) => (j < M.kept[i] ? shade(maps[at[i] + j]) : null));
  $("plot").style.aspectRatio = `${C} / ${Math.max(R, C / 4)}`;
}
function drawKinds() {
  const style = getComputedStyle(document.documentElement);
  const rgb = (name) => { const hex = style.getPropertyValue(`--${name}`).trim() || style.getPropertyValue("--void").trim(); return [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16)); };
  const colours = Object.fromEntries(Object.values(D.kind_names).map((name) => [name, rgb(name)]));
  const kind = (edges, i) => colours[kindName((edges[i] + edges[i + 1] - 1) >> 1)];
  paint($("over-keys"), C, 1, (_, j) => kind(keys, j));
  paint($("over-rows"), 1, R, (i) => kind(rows, i));
  const present = [...new Set(D.kinds)].sort((a, b) => a - b).map((k) => D.kind_names[k]);
  $("kinds").replaceChildren(...present.map((name) => h("span", {}, h("i", { class: "swatch", style: `--kind: ${kindColour(name)}` }), name)));
}
function strongest(i) {
  let best = 0;
  for (let j = 1; j < M.kept[i]; j++) if (value(selected, i, j) > value(selected, i, best)) best = j;
  return best;
}
function point(i, j) {
  focus = i === null ? null : [clamp(i, 0, R - 1), clamp(j, 0, C - 1)];
  readout(); drawPrompt(); drawFacts();
}
function stripe(line, edge, i, n, on) {
  line.classList.toggle("on", on);
  if (!on) return;
  const vertical = edge === "left";
  line.style[edge] = `${100 * i / n}%`;
  line.style[vertical ? "width" : "height"] = `${100 / n}%`;
  line.style.borderWidth = vertical ? "0 1px" : "1px 0";
}
function readout() {
  const box = $("readout");
  stripe($("pinned"), "top", pin, R, true);
  stripe($("row-line"), "top", focus ? focus[0] : 0, R, Boolean(focus) && focus[0] !== pin);
  stripe($("key-line"), "left", focus ? focus[1] : 0, C, Boolean(focus));
  if (!focus) {
    box.replaceChildren(h("p", { class: "hint" }, `Rows are queries, from the first at the top; columns are keys; grey is what comes later. Move over the map to read values. A click keeps a row: now ${range(rows[pin], rows[pin + 1])}.`));
    return;
  }
  const [i, j] = focus, v = value(selected, i, j), n = rows[i + 1] - rows[i], m = keys[j + 1] - keys[j];
  const kind = [n > 1 ? `mean over ${n} rows` : null, m > 1 ? `sum over ${m} keys` : null].filter(Boolean).join(", ");
  box.replaceChildren(
    h("dl", {}, h("dt", {}, "query"), h("dd", { id: "query" }, told(rows, i)), h("dt", {}, "key"), h("dd", { id: "key" }, told(keys, j), " ", h("small", { style: "display: inline" }, kindName(keys[j])))),
    h("output", { id: "value", "data-value": v === null ? "" : v, "data-row": i, "data-key": j }, v === null ? "not seen" : show(v), h("small", {}, v === null ? "the key comes later" : kind || "share of the row")),
  );
}
function mapKeys(event) {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const [i, j] = focus || [pin, strongest(pin)], step = event.shiftKey ? 8 : 1;
  if (moves[event.key]) point(i + step * moves[event.key][0], j + step * moves[event.key][1]);
  else if (event.key === "Home") point(i, 0);
  else if (event.key === "End") point(i, M.kept[i] - 1);
  else if (event.key === "Enter") { pin = i; point(i, j); }
  else if (event.key === "Escape") { point(null); cells[selected].focus(); }
  else return;
  event.preventDefault();
}
function mapCell(event) {
  const box = $("map").getBoundingClientRect();
  return [Math.floor((event.clientY - box.top) / box.height * R), Math.floor((event.clientX - box.left) / box.width * C)];
}

/* ---- facts ------------------------------------------------------------------------------------------------ */
function drawFacts() {
  const own = open(selected), i = focus ? focus[0] : pin, row = range(rows[i], rows[i + 1]), layer = place(selected)[0];
  const masses = D.segments.map((name, k) => {
    const mean = means[selected * (N + 1) + k], here = own.masses[i * N + k], kind = `--kind: ${kindColour(name)}`;
    return h("tr", {}, h("th", { scope: "row" }, h("span", { class: "name" }, h("i", { class: "swatch", style: kind }), name), h("span", { class: "mass" }, h("i", { style: `${kind}; width: ${100 * clamp(mean, 0, 1)}%` }), h("b", { style: `left: ${100 * clamp(here, 0, 1)}%` }))),
      h("td", { "data-mean": mean }, percent(mean)), h("td", {}, percent(here)));
  });
  const entropy = h("tr", {}, h("th", { scope: "row" }, "entropy, nats"), h("td", { "data-mean": meanEntropy(selected) }, show(meanEntropy(selected), 3)), h("td", {}, show(own.entropy[i], 3)));
  const first = selected * D.keys.count, list = [];
  for (let k = 0; k < Math.min(D.keys.count, 12); k++) {
    const arrival = given.arrivals[first + k], share = given.shares[first + k], flags = [];
    if (given.sinks[first + k]) flags.push("sink");
    if (D.massive[layer].includes(arrival)) flags.push("massive");
    const span = spanOf(arrival);
    list.push(h("tr", {}, h("th", { scope: "row" }, h("span", { class: "at" }, count(arrival)), span && span.grid ? h("span", {}, gridPlace(span, arrival)) : words(arrival, arrival + 1), flags.map((flag) => h("span", { class: "flag" }, flag))), h("td", { "data-share": share }, show(share, 5))));
  }
  $("facts").replaceChildren(
    h("h3", {}, "Where it looks"),
    h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, ""), h("th", { scope: "col" }, "all rows"), h("th", { scope: "col", style: "color: var(--pin)" }, `row ${row}`))), h("tbody", {}, masses, entropy)),
    h("h3", {}, "Keys given most, mean over rows (exact)"), h("table", {}, h("tbody", {}, list)),
    ...(D.massive[layer].length ? [h("p", {}, `Massive activations enter layer ${layer} at ${D.massive[layer].slice(0, 4).map((a) => `${count(a)} “${printed(D.tokens[a])}”`).join(", ")}${D.massive[layer].length > 4 ? " …" : ""}.`)] : []),
  );
}

/* ---- the prompt, as a row reads it ----------------------------------------------------------------------------- */
const LONGEST = 1500;
let spans = [];
function rowShares(i) {
  const shares = new Float32Array(T);
  for (let j = 0; j < M.kept[i]; j++) shares.fill(value(selected, i, j) / (keys[j + 1] - keys[j]), keys[j], keys[j + 1]);
  return shares;
}
function buildPrompt() {
  if (T <= LONGEST) {
    const out = [];
    for (let a = 0; a < T;) {
      const span = spanOf(a), stop = span ? span.stop : a + 1;
      if (D.kinds[a] !== -1) out.push(h("span", { "data-at": a, "data-stop": stop, class: span ? "block" : null, title: range(a, stop) }, span ? `${kindWord(span)}, ${stop - a} tokens` : D.tokens[a].replaceAll("\n", "↵\n")));
      a = stop;
    }
    $("strip").append(...out);
    spans = out;
  }
  for (const span of D.spans.filter((one) => one.grid)) {
    const [frames, down, wide] = span.grid, columns = wide - span.separators, picture = D.images[span.image], box = span.box || [0, 0, 1, 1];
    const canvas = h("canvas", { role: "img" }), under = h("div", { class: "picture" }, canvas);
    under.style.aspectRatio = `${columns * frames} / ${down}`;
    if (picture && frames === 1) {
      const [height, width] = [box[2] - box[0], box[3] - box[1]];
      under.style.backgroundImage = `url("${picture}")`;
      under.style.backgroundSize = `${100 / width}% ${100 / height}%`;
      under.style.backgroundPosition = `${width < 1 ? 100 * box[1] / (1 - width) : 0}% ${height < 1 ? 100 * box[0] / (1 - height) : 0}%`;
    }
    const caption = h("figcaption", {});
    span.view = { canvas, caption, under, columns };
    $("images").append(h("figure", {}, under, caption));
    canvas.addEventListener("pointermove", (event) => {
      const area = canvas.getBoundingClientRect(), y = clamp(Math.floor((event.clientY - area.top) / area.height * down), 0, down - 1), x = clamp(Math.floor((event.clientX - area.left) / area.width * columns * frames), 0, columns * frames - 1);
      const arrival = span.start + (Math.floor(x / columns) * down + y) * wide + x % columns;
      caption.textContent = `${gridPlace(span, arrival)}: ${show(rowShares(focus ? focus[0] : pin)[arrival])}`;
    });
    canvas.addEventListener("pointerleave", () => drawPrompt());
  }
}
function drawPrompt() {
  const i = focus ? focus[0] : pin, shares = rowShares(i), n = rows[i + 1] - rows[i];
  $("prompt-heading").textContent = n === 1 ? `What token ${count(rows[i])} reads` : `What tokens ${range(rows[i], rows[i + 1])} read`;
  let peak = 1e-9;
  for (const share of shares) peak = Math.max(peak, share);
  const sum = (a, b) => { let all = 0; for (let k = a; k < b; k++) all += shares[k]; return all; };
  for (const node of spans) {
    const a = +node.dataset.at, stop = +node.dataset.stop, seen = a < rows[i + 1], rgb = shade(Math.min(1, sum(a, stop)));
    node.style.background = seen ? css(rgb) : ""; node.style.color = seen ? inkOn(rgb) : "";
    node.classList.toggle("out", !seen);
    node.classList.toggle("query", a < rows[i + 1] && stop > rows[i]);
    node.title = `${range(a, stop)} ${kindName(a)}: ${seen ? show(sum(a, stop)) : "comes later"}`;
  }
  if (!spans.length) {
    const best = Array.from({ length: M.kept[i] }, (_, j) => j).sort((a, b) => value(selected, i, b) - value(selected, i, a)).slice(0, 8);
    $("strip").replaceChildren(h("table", { class: "best" }, h("tbody", {}, best.map((j) => h("tr", {}, h("th", { scope: "row" }, h("span", { class: "at" }, range(keys[j], keys[j + 1])), words(keys[j], keys[j + 1])), h("td", {}, show(value(selected, i, j))))))));
  }
  for (const span of D.spans) if (span.view) {
    const [frames, down, wide] = span.grid, { canvas, caption, columns } = span.view;
    let high = 1e-9;
    for (let a = span.start; a < span.stop; a++) high = Math.max(high, shares[a]);
    const shown = Boolean(D.images[span.image]) && frames === 1, veil = dark.matches ? [15, 18, 24] : [246, 247, 249];
    paint(canvas, columns * frames, down, (y, x) => {
      const root = Math.sqrt(shares[span.start + (Math.floor(x / columns) * down + y) * wide + x % columns] / high);
      // What gets little is veiled, so that the picture itself is seen where it is looked at.
      return shown ? [...veil, 215 * (1 - root)] : palette[Math.round(255 * root)];
    });
    canvas.setAttribute("aria-label", `attention over ${kindWord(span)}`);
    const first = tileOf(keys, span.start), pooled = single(keys, first) ? "" : `; tiles of ${keys[first + 1] - keys[first]} keys, shared evenly`;
    caption.textContent = `${kindWord(span)}: ${percent(sum(span.start, span.stop))} of the row, at most ${show(high, 3)} a token${pooled}`;
  }
}

/* ---- putting it together ------------------------------------------------------------------------------------------ */
// The head to open with: the surest one of a role that depends on the text.
function telling() {
  for (const name of ["vision", "induction", "retrieval", "previous"]) {
    const scores = D.roles.scores[name], held = D.roles.marks.map((marks, head) => (marks.includes(names.indexOf(name)) ? head : -1)).filter((head) => head >= 0);
    if (scores && held.length) return held.reduce((a, b) => (scores[b] > scores[a] ? b : a));
  }
  return 0;
}
function headline() {
  const model = D.model.replace(/\/+$/, "").split("/").pop(), text = D.tokens.slice(0, 400).filter((_, a) => kindName(a) === "query").join("").trim();
  $("title").textContent = `How ${model} reads ${many(T, "token")}`;
  const quoted = text ? `“${text.length > 140 ? text.slice(0, 140) + "…" : text}” ` : "";
  $("lede").textContent = `${quoted}${L} layers of ${many(H, "head")}. Each square is a head: its rows are queries, its columns the keys they look at.`;
}
function buildRoles() {
  const held = names.map((_, i) => D.roles.marks.filter((marks) => marks.includes(i)).length);
  $("roles").append(...names.map((name, i) => h("button", { class: "role", type: "button", "aria-pressed": "false", "data-role": name, disabled: !held[i], onclick: () => {
    only = only === i ? null : i;
    for (const button of $("roles").children) button.setAttribute("aria-pressed", String(button.dataset.role === names[only]));
    $("grid").classList.toggle("only", only !== null);
    cells.forEach((cell, head) => cell.classList.toggle("has", D.roles.marks[head].includes(only)));
  } }, badge(name), name, h("small", {}, String(held[i])))));
}
function how() {
  const side = exact ? `Every row and key of the maps is one token.` : `The maps have ${R} × ${C} tiles; the largest holds ${Math.max(...rows.slice(1).map((e, i) => e - rows[i]))} rows and ${Math.max(...keys.slice(1).map((e, i) => e - keys[i]))} keys. A tile is the mean over its rows of the sum over its keys, so a row of tiles still sums to 1.`;
  $("how").append(...[
    side,
    D.images.length ? "Over an image, what gets less than the most that one of its tokens gets is veiled, by the root of its share." : null,
    "Values of maps, and masses and entropy of single rows, are kept as float16: within 0.05 % of the model's, or 3e-8. Masses and entropy over all rows, and the keys given most, are kept as float32, exactly as they were read.",
    "Key shares are means over the rows that see the key. A sink is a key whose mean share is above the threshold; an activation is massive where one dimension of the stream that enters the layer is many times its root mean square.",
    names.length && Object.keys(D.roles.scores).length ? "Roles are scores between 0 and 1, measured on prompts made for it, not on this one; a head is marked at or above the role's threshold." : null,
  ].filter(Boolean).map((text) => h("p", {}, text)));
}
function theme() {
  palette = Array.from({ length: 256 }, (_, k) => colour(k / 255));
  drawGrid(); drawKinds(); select(selected);
}
function start() {
  $("shows").append(...SHOWS.map((one, k) => h("option", { value: k }, one.name)));
  $("shows").addEventListener("change", () => { shows = SHOWS[$("shows").value]; drawGrid(); });
  $("grid").addEventListener("keydown", gridKeys);
  $("grid").addEventListener("click", (event) => { const cell = event.target.closest(".cell"); if (cell) focusCell(cells.indexOf(cell)); });
  const map = $("map");
  map.addEventListener("keydown", mapKeys);
  map.addEventListener("pointermove", (event) => point(...mapCell(event)));
  map.addEventListener("pointerleave", () => { if (document.activeElement !== map) point(null); });
  map.addEventListener("click", (event) => { const [i, j] = mapCell(event); pin = clamp(i, 0, R - 1); point(pin, j); });
  map.addEventListener("blur", () => point(null));
  $("strip").addEventListener("pointerover", (event) => { const node = event.target.closest("[data-at]"), a = node && +node.dataset.at; if (node && a >= rows[0] && a < rows[R]) { const i = tileOf(rows, a); point(i, tileOf(keys, a)); } });
  $("strip").addEventListener("pointerleave", () => point(null));
  $("strip").addEventListener("click", (event) => { const node = event.target.closest("[data-at]"), a = node && +node.dataset.at; if (node && a >= rows[0] && a < rows[R]) { pin = tileOf(rows, a); point(pin, tileOf(keys, a)); } });
  const asked = /^#(\d+)\.(\d+)$/.exec(location.hash), head = asked ? +asked[1] * H + +asked[2] : 0;
  selected = asked && +asked[2] < H && head < L * H ? head : telling();
  headline(); buildGrid(); buildRoles(); buildPrompt(); how(); theme();
  dark.addEventListener("change", theme);
  addEventListener("resize", buildGrid);
  document.documentElement.dataset.ready = "true";
}
start();
