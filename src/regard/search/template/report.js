const S = JSON.parse($("data").textContent);
const rows = S.rows, byNumber = new Map(rows.map((r) => [r.number, r]));
const measured = rows.filter((r) => r.measurement), failed = rows.filter((r) => !r.measurement);
const chosen = byNumber.get(S.chosen) || null;
const trialLength = measured.length ? measured[0].measurement.length : 0;
const anyFinal = rows.find((r) => r.final);
const finalLength = anyFinal ? anyFinal.final.length : 0;
const criteria = S.criteria || S.objectives;
let selected = chosen || measured.find((r) => (finalLength ? r.final_front : r.front) && !r.dense) || measured.find((r) => r.front && !r.dense) || rows[0] || null;

/* ---- small helpers ------------------------------------------------------------------------ */
const NAMES = {
  kl: "KL to dense", kl_last_half: "KL, last half", kl_worst: "KL, worst window", top1: "Top-1 agreement",
  perplexity: "Perplexity", bytes: "Cache bytes", prefill: "Prefill time", decode: "Decode time", recall: "Recall",
};
const UNITS = { kl: "nats per token", kl_last_half: "nats per token", kl_worst: "nats per token" };
const share = (name) => ["bytes", "top1", "recall"].includes(name);
function show(name, v) {
  if (v === null || v === undefined) return "–";
  if (share(name)) return (v * 100).toFixed(1) + " %";
  if (["prefill", "decode"].includes(name)) return v.toFixed(2) + "×";
  if (name === "perplexity") return v.toFixed(3) + "×";
  return v === 0 ? "0" : Math.abs(v) < 0.001 ? v.toExponential(1) : v.toFixed(v < 0.01 ? 4 : v < 1 ? 3 : 2);
}
const worse = (name, a, b) => (S.scores[name] && S.scores[name].larger ? a < b : a > b);
const title = (r) => (r.dense ? "Dense" : `Trial ${r.number}`);
const best = (r) => (r.final ? r.final_scores : r.scores);

/* ---- what the page opens with -------------------------------------------------------------- */
function headline() {
  const f = S.facts || {}, model = (f.model && f.model.name || "model").replace(/\/+$/, "").split("/").pop();
  if (chosen) {
    const v = best(chosen), dense = v.top1 !== undefined ? `, and the same next token ${show("top1", v.top1)} of the time` : "";
    $("title").textContent = `${model} with ${show("bytes", v.bytes)} of its cache: KL ${show("kl", v.kl)} nats per token${dense}`;
  } else $("title").textContent = S.shortfall ? `${model}: no recipe meets what was asked` : `${model}: no recipe was chosen`;
  const asked = S.constraints.map((c) => `${c.name} ${c.sign.replace("<=", "≤").replace(">=", "≥")} ${c.bound}`).join(" and ");
  const parts = [`${measured.filter((r) => !r.dense).length} recipes measured against the model's own attention at ${count(trialLength)} tokens`];
  if (failed.length) parts[0] += ` (${failed.length} more failed)`;
  if (finalLength) parts.push(`${rows.filter((r) => r.final).length} of them measured again at ${count(finalLength)} tokens on other text${chosen && chosen.final ? ", where the choice was made" : ""}`);
  $("lede").textContent = parts.join("; ") + "." + (chosen && chosen.final ? ` The figures here are at ${count(finalLength)} tokens.` : "") + (asked ? ` Asked for: ${asked}.` : "") + (S.interrupted ? " The search was interrupted." : "");
}
function tile(name, row) {
  const v = best(row)[name], told = row.final || row.measurement, notes = [];
  if (v === undefined) return null;
  if (name === "kl") notes.push(`last half ${show("kl", best(row).kl_last_half)}, worst window ${show("kl", best(row).kl_worst)}`);
  if (name === "bytes") notes.push(`${(told.bytes.stored / 1e6).toFixed(1)} of ${(told.bytes.dense / 1e6).toFixed(1)} MB, dense in bf16`);
  if (name === "decode" || name === "prefill") {
    const t = told.seconds[name];
    const unit = name === "decode" ? ["ms a token", 1] : ["s", 2];
    notes.push(`${t.method.median.toFixed(unit[1])} against ${t.dense.median.toFixed(unit[1])} ${unit[0]}`);
  }
  if (name === "recall") notes.push(`dense recalls ${show("recall", told.recall.dense_recalled)} of ${told.recall.hits.length} facts`);
  if (name === "top1") notes.push("rows where both prefer one token");
  return h("div", { class: "tile" }, h("span", {}, NAMES[name]), h("b", {}, show(name, v)), h("small", {}, notes[0] || ""));
}
function verdict() {
  if (chosen) $("verdict").append(h("div", { class: "tiles" }, ["bytes", "kl", "top1", "decode", "prefill", "recall"].map((n) => tile(n, chosen))));
  else if (S.shortfall) $("verdict").append(h("div", { class: "card alert", role: "status" }, S.shortfall[0].toUpperCase() + S.shortfall.slice(1) + "."));
}

/* ---- the chart ----------------------------------------------------------------------------- */
function axis(name, values, from, to, floor) {
  const positive = values.filter((v) => v > 0), low = Math.min(...positive), high = Math.max(...positive);
  if (/^kl/.test(name) && positive.length && high / low > 12) {
    const a = Math.log10(low) - 0.12, b = Math.log10(high) + 0.12, zero = values.some((v) => v <= 0), start = zero ? from + floor : from;
    const ticks = [];
    for (let e = Math.floor(a); e <= b; e++) for (const m of [1, 2, 5]) {
      const t = Math.log10(m) + e;
      if (t >= a && t <= b && (b - a < 2.2 || m === 1)) ticks.push(m * 10 ** e);
    }
    const at = (v) => (v > 0 ? start + ((Math.log10(v) - a) / (b - a)) * (to - start) : from);
    return { at, ticks: zero ? [0, ...ticks] : ticks, log: true };
  }
  let a = Math.min(...values), b = Math.max(...values);
  if (share(name) && a < 0.5) a = 0;
  const pad = (b - a) * 0.06 || Math.abs(b) * 0.1 || 1;
  a = a === 0 ? 0 : a - pad; b = b + pad;
  const raw = (b - a) / 6, power = 10 ** Math.floor(Math.log10(raw)), step = power * [1, 2, 2.5, 5, 10].find((m) => m * power >= raw);
  const ticks = [];
  for (let t = Math.ceil(a / step) * step; t <= b + step * 1e-9; t += step) ticks.push(Math.abs(t) < step / 1e6 ? 0 : t);
  return { at: (v) => from + ((v - a) / (b - a)) * (to - from), ticks, log: false };
}
function tick(name, v) {
  if (share(name)) return `${+(v * 100).toFixed(1)} %`;
  return ["prefill", "decode", "perplexity"].includes(name) ? `${+v.toFixed(3)}×` : String(+v.toPrecision(3));
}
const shapes = {
  dot: (x, y) => s("circle", { class: "mark", cx: x, cy: y, r: 5.5 }),
  square: (x, y) => s("rect", { class: "mark", x: x - 5, y: y - 5, width: 10, height: 10, rx: 1.5 }),
  diamond: (x, y) => s("path", { class: "mark", d: `M${x} ${y - 6.5}l6.5 6.5l-6.5 6.5l-6.5 -6.5z`, "stroke-width": 2 }),
  star: (x, y) => {
    const p = [...Array(10).keys()].map((i) => { const r = i % 2 ? 4.6 : 10, t = (i * Math.PI) / 5; return `${(x + r * Math.sin(t)).toFixed(2)},${(y - r * Math.cos(t)).toFixed(2)}`; });
    return s("polygon", { class: "mark", points: p.join(" ") });
  },
  cross: (x, y) => s("path", { class: "mark", d: `M${x - 4} ${y - 4}l8 8m0 -8l-8 8` }),
};
const shapeOf = (r, final) => (!r.measurement ? "cross" : r.dense ? "square" : final ? "diamond" : "dot");
const onFront = (r, final) => (final ? r.final_front : r.front);
const kinds = (r, final) => [onFront(r, final) && "front", r.dense && "dense", r === chosen && "chosen", !r.measurement && "failed", r === selected && "selected"].filter(Boolean).join(" ");
const has = (scores, X, Y) => scores[X] !== undefined && scores[X] !== null && scores[Y] !== undefined && scores[Y] !== null;
/* Where a row stands: at the final length if it was measured there and that is shown, else at the trials'. Dense,
   which everything is compared with, is a point of both fronts; it is drawn once where both agree. */
function spots(X, Y) {
  const finals = finalLength && $("show-final").checked, found = [];
  for (const r of measured) {
    const late = finals && has(r.final_scores, X, Y), early = has(r.scores, X, Y);
    const same = late && early && r.dense && r.scores[X] === r.final_scores[X] && r.scores[Y] === r.final_scores[Y];
    if (late) found.push({ r, final: true, main: true, v: r.final_scores });
    if (early && !same) found.push({ r, final: false, main: !late, v: r.scores });
  }
  return found;
}
function point({ r, final, main, v }, x, y, X, Y) {
  const role = r === chosen && main ? ", chosen" : onFront(r, final) ? ", on the front" : "", at = finalLength ? ` at ${count(final ? finalLength : trialLength)} tokens` : "";
  const said = r.measurement ? `${title(r)}${at}${role}: ${NAMES[Y]} ${show(Y, v[Y])}, ${NAMES[X]} ${show(X, v[X])}` : `${title(r)} failed: ${r.reason}`;
  const star = r === chosen && main;
  return s("g", {
    class: `point ${kinds(r, final)}${final ? " final" : ""}${main ? "" : " early"}`, "data-trial": main ? r.number : null,
    "data-final": final && r.final ? r.number : null, "data-early": main ? null : r.number,
    tabindex: main ? 0 : null, role: main ? "button" : null, "aria-label": main ? said : null, "aria-hidden": main ? null : "true",
    "aria-pressed": main ? String(r === selected) : null,
    onclick: () => select(r), onkeydown: main ? (e) => keys(e, r) : null,
    onpointerenter: (e) => tip(e, r, final), onpointermove: (e) => tip(e, r, final), onpointerleave: () => tip(null),
  }, s("circle", { class: "hit", cx: x, cy: y, r: 13 }), shapes[star ? "star" : shapeOf(r, final)](x, y), s("circle", { class: "ring", cx: x, cy: y, r: star ? 14 : main ? 10.5 : 8.5 }));
}
function zone(svg, X, Y, ax, ay, box) {
  const bounds = S.constraints.filter((c) => c.name === X || c.name === Y);
  let { x0, x1, y0, y1 } = box;
  for (const c of bounds) {
    const across = c.name === X, at = (across ? ax : ay).at(c.bound), below = c.sign[0] === "<";
    if (across) { const p = Math.min(Math.max(at, box.x0), box.x1); if (below) x1 = Math.min(x1, p); else x0 = Math.max(x0, p); }
    else { const p = Math.min(Math.max(at, box.y0), box.y1); if (below) y0 = Math.max(y0, p); else y1 = Math.min(y1, p); }
  }
  if (bounds.length && x1 > x0 && y1 > y0) svg.append(s("rect", { class: "zone", x: x0, y: y0, width: x1 - x0, height: y1 - y0 }));
  for (const c of bounds) {
    const across = c.name === X, at = (across ? ax : ay).at(c.bound), text = `${c.name} ${c.sign.replace("<=", "≤").replace(">=", "≥")} ${tick(c.name, c.bound)}`;
    if (across && at >= box.x0 && at <= box.x1) svg.append(s("line", { class: "bound", x1: at, x2: at, y1: box.y0, y2: box.y1 }), s("text", { class: "bound-name", x: at + 6, y: box.y0 + 12 }, text));
    if (!across && at >= box.y0 && at <= box.y1) svg.append(s("line", { class: "bound", x1: box.x0, x2: box.x1, y1: at, y2: at }), s("text", { class: "bound-name", x: box.x1 - 6, y: at - 6, "text-anchor": "end" }, text));
  }
}
/* The steps through a front, where the axes are two of the scores that rows are compared in; of more scores than
   two, through those of its rows that no other beats in these two. */
function frontLine(X, Y, px, py, final) {
  if (X === Y || !criteria.includes(X) || !criteria.includes(Y)) return null;
  const of = (r) => (final ? r.final_scores : r.scores), better = (n, a, b) => worse(n, b, a);
  const on = measured.filter((r) => onFront(r, final) && has(of(r), X, Y)).sort((a, b) => (better(X, of(a)[X], of(b)[X]) ? -1 : better(X, of(b)[X], of(a)[X]) ? 1 : better(Y, of(a)[Y], of(b)[Y]) ? -1 : 1));
  const steps = on.filter((r, i) => on.slice(0, i).every((q) => better(Y, of(r)[Y], of(q)[Y]))).map((r) => [px(of(r)[X]), py(of(r)[Y])]);
  if (steps.length < 2) return null;
  const d = steps.map(([x, y], i) => (i ? `H${x}V${y}` : `M${x} ${y}`)).join("");
  return { steps, path: s("path", { class: `steps ${final ? "final" : "first"}${finalLength ? "" : " only"}`, d }) };
}
/* The name of a line, at whichever of its levels covers the fewest of `taken` (points, boxes of words) and of the lines' upright parts. */
function lineName(line, text, final, box, taken, lines) {
  const w = text.length * 7, found = [];
  const upright = lines.flatMap(([l]) => l.steps.slice(1).map(([x, y], i) => ({ x, top: Math.min(l.steps[i][1], y), end: Math.max(l.steps[i][1], y) })));
  const cut = (x, y) => upright.filter((u) => u.x > x - 4 && u.x < x + w + 4 && u.end > y - 12 && u.top < y + 4).length;
  const over = (x, y) => taken.filter((t) => (t.w ? x < t.x + t.w && t.x < x + w && Math.abs(t.y - y) < 15 : t.x > x - 8 && t.x < x + w + 8 && t.y > y - 18 && t.y < y + 9)).length;
  for (let i = 1; i < line.steps.length; i++) {
    const [x0, y] = line.steps[i - 1], [x1, low] = line.steps[i];
    for (const x of [x0 + 10, (x0 + x1 - w) / 2, x1 - w - 10]) for (const at of [y - 7, y + 16]) found.push([x, at, x1 - x0 < w]);
    for (const at of [(y + low) / 2 + 4, y + 30, low - 24]) found.push([x1 + 8, at, Math.abs(low - y) < 60], [x1 - w - 8, at, Math.abs(low - y) < 60]);
  }
  const fits = found.filter(([x, y]) => x >= box.x0 + 4 && x + w <= box.x1 && y >= box.y0 + 10 && y <= box.y1 - 4);
  const best = fits.map(([x, y, away]) => [(over(x, y) + cut(x, y)) * 2 + away, x, y]).sort((a, b) => a[0] - b[0])[0];
  if (!best || best[0] > 4) return null;
  taken.push({ x: best[1], y: best[2], w });
  return s("text", { class: `line-name ${final ? "final" : "first"}`, x: best[1], y: best[2] }, text);
}
function axes(svg, X, Y, ax, ay, box) {
  svg.append(s("line", { class: "axis", x1: box.x0, x2: box.x1, y1: box.y1, y2: box.y1 }));
  for (const t of ay.ticks) svg.append(s("line", { class: "grid", x1: box.x0, x2: box.x1, y1: ay.at(t), y2: ay.at(t) }), s("text", { x: box.x0 - 9, y: ay.at(t) + 4, "text-anchor": "end" }, tick(Y, t)));
  let edge = -1e9;
  for (const t of ax.ticks) { const x = ax.at(t); svg.append(s("line", { class: "grid", x1: x, x2: x, y1: box.y0, y2: box.y1 })); if (x - edge > 46) { svg.append(s("text", { x, y: box.y1 + 19, "text-anchor": "middle" }, tick(X, t))); edge = x; } }
}
function plot(svg, X, Y, found, box) {
  const ax = axis(X, found.map((p) => p.v[X]), box.x0, box.x1, 34), ay = axis(Y, found.map((p) => p.v[Y]), box.y1, box.y0, -34);
  const at = (p) => [ax.at(p.v[X]), ay.at(p.v[Y])], finals = found.some((p) => p.final), lines = [];
  zone(svg, X, Y, ax, ay, box);
  axes(svg, X, Y, ax, ay, box);
  for (const final of [false, true]) {
    const line = final && !finals ? null : frontLine(X, Y, ax.at, ay.at, final);
    if (line) { svg.append(line.path); lines.push([line, final]); }
  }
  for (const p of found) if (!p.main) { const q = found.find((o) => o.main && o.r === p.r), [x1, y1] = at(p), [x2, y2] = at(q); svg.append(s("line", { class: `tie${p.r === selected ? " selected" : ""}`, x1, y1, x2, y2 })); }
  const rank = (p) => [p.main, onFront(p.r, p.final), p.final, p.r === chosen, p.r === selected].reduce((n, b, i) => n + (b ? 1 << i : 0), 0);
  const order = [...found].sort((a, b) => rank(a) - rank(b)), taken = found.map((p) => { const [x, y] = at(p); return { x, y }; }), names = [];
  for (const p of order) svg.append(point(p, ...at(p), X, Y));
  for (const p of order) if (p.main && (p.r.dense || p.r === chosen || p.r === selected)) {
    const [x, y] = at(p), left = x > box.x1 - 90, text = p.r === chosen ? `chosen: ${p.r.number}` : p.r.dense ? "dense" : String(p.r.number);
    const level = y < box.y0 + 40 ? y + 18 : y - 9;  // below, where a bound's name stands above
    names.push(s("text", { class: "label", x: left ? x - 16 : x + 16, y: level, "text-anchor": left ? "end" : "start" }, text));
    taken.push({ x: left ? x - 16 - text.length * 7 : x + 16, y: level, w: text.length * 7 });
  }
  for (const c of S.constraints) if (c.name === X) taken.push({ x: ax.at(c.bound), y: box.y0 + 12, w: 96 });
  if (finals) for (const [line, final] of lines.reverse()) { const name = lineName(line, `${box.x1 - box.x0 < 400 ? "" : "front "}at ${count(final ? finalLength : trialLength)} tokens`, final, box, taken, lines); if (name) svg.append(name); }
  svg.append(...names);
  return lines.length > 0;
}
function chart() {
  const X = $("axis-x").value, Y = $("axis-y").value, found = spots(X, Y);
  const W = Math.max(280, $("chart").clientWidth), H = Math.round(Math.min(540, Math.max(320, W * 0.74)));
  const strip = failed.length ? 46 : 0, box = { x0: 58, x1: W - 14 - strip, y0: 16, y1: H - 46 };
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, height: H, role: "group", "aria-label": `${NAMES[Y]} against ${NAMES[X]} of every trial` });
  const drawn = found.length > 0 && plot(svg, X, Y, found, box);
  svg.append(s("text", { class: "name", x: (box.x0 + box.x1) / 2, y: H - 6, "text-anchor": "middle" }, NAMES[X] + (UNITS[X] ? `, ${UNITS[X]}` : ", relative to dense")));
  svg.append(s("text", { class: "name", transform: `translate(12 ${(box.y0 + box.y1) / 2}) rotate(-90)`, "text-anchor": "middle" }, NAMES[Y] + (UNITS[Y] ? `, ${UNITS[Y]}` : ", relative to dense")));
  if (failed.length) {
    const x = W - 20, gap = Math.min(22, (box.y1 - box.y0 - 16) / failed.length);
    svg.append(s("text", { x: x + 6, y: box.y1 + 19, "text-anchor": "end" }, "failed"));
    failed.forEach((r, i) => svg.append(point({ r, final: false, main: true, v: {} }, x, box.y1 - 12 - i * gap, X, Y)));
  }
  const focus = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.trial : null;
  $("chart").replaceChildren(svg);
  legend(drawn, found);
  if (focus) { const g = svg.querySelector(`[data-trial="${focus}"]`); if (g) g.focus({ preventScroll: true }); }
}
function keys(e, r) {
  if (e.key === "Enter" || e.key === " ") { e.preventDefault(); select(r); return; }
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
  if (!step) return;
  e.preventDefault();
  const X = $("axis-x").value, found = spots(X, $("axis-y").value).filter((p) => p.main);
  const line = found.sort((a, b) => a.v[X] - b.v[X]).map((p) => p.r).concat(failed);
  const next = line[(line.indexOf(r) + step + line.length) % line.length];
  select(next);
  const g = document.querySelector(`.point[data-trial="${next.number}"]`);
  if (g) g.focus();
}
function tip(e, r, final) {
  const box = $("tip");
  if (!e) { box.hidden = true; return; }
  const v = final ? r.final_scores : r.scores, told = final && r.final ? r.final : r.measurement, length = final ? finalLength : told && told.length;
  box.replaceChildren(h("b", {}, title(r) + (told ? ` at ${count(length)} tokens` : "")), told ? `KL ${show("kl", v.kl)} · bytes ${show("bytes", v.bytes)}` + (v.decode !== undefined ? ` · decode ${show("decode", v.decode)}` : "") : r.reason, h("div", { class: "what" }, r.words));
  box.hidden = false;
  const w = box.offsetWidth, t = box.offsetHeight;
  box.style.left = Math.max(8, Math.min(innerWidth - w - 8, e.clientX + 16)) + "px";
  box.style.top = Math.max(8, e.clientY + t + 24 > innerHeight ? e.clientY - t - 14 : e.clientY + 16) + "px";
}
function legend(drawn, found) {
  const item = (shape, cls, text) => h("span", {}, s("svg", { width: 18, height: 18, "aria-hidden": "true" }, s("g", { class: `point ${cls}` }, shapes[shape](9, 9))), text);
  const line = (cls, mark, text) => h("span", {}, s("svg", { width: 34, height: 18, "aria-hidden": "true" }, drawn ? s("path", { class: `steps ${cls}`, d: "M1 9H33" }) : null, s("g", { class: `point front ${cls}` }, shapes[mark](17, 9))), text);
  const finals = found.some((p) => p.final && p.r.final), early = found.some((p) => !p.final && !p.r.dense);
  const tie = () => h("span", {}, s("svg", { width: 24, height: 18, "aria-hidden": "true" }, s("line", { class: "tie", x1: 1, y1: 9, x2: 23, y2: 9 })), "one recipe at both");
  const items = [chosen && item("star", "chosen", `chosen: ${chosen.number}`)];
  if (finals) items.push(line("final", "diamond", `front at ${count(finalLength)} tokens, other text`), found.some((p) => p.final && !p.r.final_front) && item("diamond", "final", `beaten at ${count(finalLength)}`));
  if (early) items.push(line(finalLength ? "first" : "first only", "dot", `front at ${count(trialLength)} tokens${finals ? ", searched on" : ""}`), item("dot", "", finals ? `beaten at ${count(trialLength)}` : "beaten"), finals && tie());
  items.push(item("square", "dense", "dense: the model's own attention"), failed.length && item("cross", "failed", "failed"));
  $("legend").replaceChildren(...items.filter(Boolean));
}

/* ---- the selected trial -------------------------------------------------------------------- */
function spreadOf(told, name) {
  const t = told && told.seconds && told.seconds[name];
  return t ? `${t.ratio.low.toFixed(2)} to ${t.ratio.high.toFixed(2)}` : null;
}
/* What a score gains or loses by a mechanism: shares in points of a hundred, ratios and KL as they are. */
function gain(name, v) {
  const sign = v > 0 ? "+" : v < 0 ? "−" : "±", size = Math.abs(v);
  return sign + (share(name) ? (size * 100).toFixed(1) + " %" : ["prefill", "decode", "perplexity"].includes(name) ? size.toFixed(2) + "×" : size < 0.00005 ? "0" : size.toFixed(size < 0.1 ? 4 : 2));
}
function brings(r) {
  const names = criteria.filter((n) => Object.values(r.owes).some((o) => o.change && o.change[n] !== undefined));
  const most = Object.fromEntries(names.map((n) => [n, Math.max(...Object.values(r.owes).map((o) => Math.abs((o.change || {})[n] || 0)))]));
  const cell = (o, n) => {
    const v = -o.change[n], good = v === 0 ? "" : (v > 0) === S.scores[n].larger ? "gain" : "loss", wide = most[n] ? Math.abs(v) / most[n] * 50 : 0;
    return h("td", { class: good }, gain(n, v), h("i", { class: "swing", "aria-hidden": "true" }, h("b", { style: `width:${wide}%;${v < 0 ? "right" : "left"}:50%` })));
  };
  const line = ([stem, o]) => h("tr", { "data-stem": stem }, h("th", { scope: "row" }, stem, o.pays === false ? h("span", { class: "tag bad" }, "does not pay") : null),
    o.reason ? h("td", { colspan: names.length || 1, class: "lost" }, `the rest could not be measured: ${o.reason}`) : names.map((n) => cell(o, n)));
  const idle = Object.entries(r.owes).filter(([, o]) => o.pays === false).map(([stem]) => stem);
  const said = `Changes by each mechanism: this recipe against the same less that one, at ${count(trialLength)} tokens.` + (idle.length ? ` Without ${idle.join(" or without ")} it would be at least as good in everything asked for.` : "");
  return [h("h4", {}, "What each mechanism brings"), h("table", { class: "brings" }, h("thead", {}, h("tr", {}, h("th", {}), names.map((n) => h("th", { scope: "col" }, NAMES[n])))), h("tbody", {}, Object.entries(r.owes).map(line))), h("p", { class: "note small" }, said)];
}
function detail() {
  const r = selected, box = $("detail");
  if (!r) return;
  const tag = (cls, text) => h("span", { class: `tag ${cls}` }, text);
  const tags = [r === chosen && tag("chosen", "chosen"), r.final_front && tag("again", `on the front at ${count(finalLength)}`), r.front && tag("front", finalLength ? `on the front at ${count(trialLength)}` : "on the front"), !r.measurement && tag("bad", "failed"), r.measurement && S.constraints.length && (r.meets ? tag("good", "meets the constraints") : tag("", "misses a constraint"))].filter(Boolean);
  const kids = [h("h3", {}, title(r)), h("div", {}, tags), h("p", { class: "what" }, r.words)];
  if (!r.measurement) kids.push(h("p", {}, h("b", {}, "Reason: "), r.reason));
  else {
    const cols = [r.measurement, r.final].filter(Boolean);
    const line = (n) => h("tr", {}, h("th", { scope: "row" }, NAMES[n]), cols.map((told) => h("td", {}, show(n, told.scores[n]), spreadOf(told, n) ? h("small", {}, spreadOf(told, n)) : null)));
    const names = Object.keys(S.scores).filter((n) => cols.some((told) => told.scores[n] !== undefined));
    kids.push(h("table", {}, h("thead", {}, h("tr", {}, h("th", {}), cols.map((told) => h("th", { scope: "col" }, `at ${count(told.length)}`)))), h("tbody", {}, names.map(line))));
    const windows = (r.final || r.measurement).quality.windows;
    if (windows.length > 1 && !r.dense) kids.push(h("p", { class: "note", style: "margin:12px 0 0;font-size:13px" }, "Windows: " + windows.map((w) => `KL ${show("kl", w.kl)} (last half ${show("kl", w.kl_last_half)}) at token ${count(w.start)}`).join("; ") + "."));
    if (r.owes) kids.push(...brings(r));
    if ((r.front || r.final) && !r.dense) kids.push(h("code", {}, `regard run MODEL --recipe ${r === chosen ? "recipe.yaml" : `front/trial-${String(r.number).padStart(3, "0")}.yaml`}`));
  }
  box.replaceChildren(...kids);
}

/* ---- the layers x heads picture ------------------------------------------------------------- */
const bitsOf = (codec) => { const found = codec && /\d+/.exec(codec); return codec ? (found ? +found[0] : 0) : 16; };
const tone = (codec) => { const b = bitsOf(codec); return codec === null || b >= 16 ? "var(--b16)" : b > 4 ? "var(--b8)" : b > 0 ? "var(--b4)" : "var(--bx)"; };
function kept(cell, length) {
  if (cell.recent === null || cell.sink + cell.recent >= length) return [[0, 1]];
  const sink = cell.sink / length, recent = Math.min(1, cell.recent / length);
  return [[0, Math.max(sink, cell.sink ? 0.06 : 0)], [1 - Math.max(recent, 0.06), 1]];
}
function cellOf(cell, x, y, w, hgt, length, where) {
  const half = (hgt - 3) / 2, parts = [];
  [["key", y], ["value", y + half + 3]].forEach(([what, top]) => {
    parts.push(s("rect", { class: "void", x, y: top, width: w, height: half, rx: 2 }));
    for (const [a, b] of kept(cell, length)) if (b > a) parts.push(s("rect", { class: what, x: x + a * w, y: top, width: (b - a) * w, height: half, rx: 2, style: `fill:${tone(cell[what])}` }));
  });
  const holds = cell.recent === null ? "every token" : `the first ${cell.sink} and the last ${cell.recent} tokens`;
  const said = `${where}: ${holds}; keys ${cell.key || "as they come"}, values ${cell.value || "as they come"}`;
  return s("g", { class: "cell", "data-recent": cell.recent === null ? "all" : cell.recent, "data-sink": cell.sink, "data-key": cell.key || "raw", "data-value": cell.value || "raw" }, s("title", {}, said), parts);
}
function picture() {
  const r = selected, table = r && r.picture;
  if (!table) { $("picture").replaceChildren(); $("picture-legend").replaceChildren(); $("picture-note").textContent = r ? `${title(r)} was not measured.` : ""; return; }
  const length = (r.final || r.measurement).length, L = table.length, K = table[0].length;
  const room = Math.max($("picture").clientWidth, 300) - 44, w = Math.max(20, Math.min(44, room / L - 5)), hgt = 26, gap = 5;
  const W = 44 + L * (w + gap), H = K * (hgt + gap + 2) + 24;
  const svg = s("svg", { width: W, height: H, viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `What ${title(r)} holds, layer by layer` });
  for (let k = 0; k < K; k++) svg.append(s("text", { x: 0, y: k * (hgt + gap + 2) + hgt / 2 + 4 }, `KV ${k}`));
  table.forEach((layer, l) => {
    const x = 44 + l * (w + gap);
    layer.forEach((cell, k) => svg.append(cellOf(cell, x, k * (hgt + gap + 2), w, hgt, length, `layer ${l}, KV head ${k}`)));
    if (L <= 16 || l % 5 === 0 || l === L - 1) svg.append(s("text", { x: x + w / 2, y: H - 5, "text-anchor": "middle" }, String(l)));
  });
  $("picture").replaceChildren(svg);
  $("picture-note").textContent = `${title(r)}. One box a KV head, layers left to right; the upper bar is its keys, the lower its values. A bar runs from the first token to the last of ${count(length)}: what is coloured is held, what is blank was dropped. The darker, or in dark mode the lighter, the more bits.`;
  const cells = table.flat(), names = [...new Set(cells.flatMap((c) => [c.key, c.value]))].sort((a, b) => bitsOf(b) - bitsOf(a));
  const swatch = (css, text) => h("span", {}, h("i", { class: "swatch", style: `background:${css}` }), text);
  const items = names.map((n) => swatch(tone(n), n || "as they come"));
  if (cells.some((c) => c.recent !== null)) items.push(swatch("var(--void)", "dropped"));
  $("picture-legend").replaceChildren(...items);
}

/* ---- the table ------------------------------------------------------------------------------ */
const fronts = (r) => (!finalLength ? (r.front ? "yes" : "") : [r.front && count(trialLength), r.final_front && count(finalLength)].filter(Boolean).join(" · "));
let sorting = { key: "number", down: false };
const columns = [
  { key: "number", name: "trial", of: (r) => r.number, text: (r) => (r === chosen ? "★ " : "") + r.number },
  ...Object.keys(S.scores).filter((n) => ["kl", "top1", "bytes", "prefill", "decode", "recall"].includes(n) && measured.some((r) => r.scores[n] !== undefined)).map((n) => ({ key: n, name: { kl: "KL", kl_last_half: "last half", top1: "top-1" }[n] || n, of: (r) => r.scores[n], text: (r) => show(n, r.scores[n]) })),
  ...(finalLength ? ["kl", "bytes", "decode"].filter((n) => rows.some((r) => r.final_scores[n] !== undefined)).map((n) => ({ key: "final_" + n, name: `${n === "kl" ? "KL" : n} at ${count(finalLength)}`, of: (r) => r.final_scores[n], text: (r) => (r.final_scores[n] === undefined ? "" : show(n, r.final_scores[n])) })) : []),
  { key: "fronts", name: finalLength ? "on the front at" : "on the front", of: (r) => -(2 * r.final_front + r.front), text: fronts },
  { key: "words", name: "what", of: (r) => r.words, cls: "text" },
];
function trials() {
  const column = columns.find((c) => c.key === sorting.key), sign = sorting.down ? -1 : 1;
  const order = [...rows].sort((a, b) => {
    const x = column.of(a), y = column.of(b), none = (v) => v === undefined || v === null;
    if (none(x) || none(y)) return none(x) - none(y);
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y) || a.number - b.number;
  });
  const head = h("tr", {}, columns.map((c) => h("th", { scope: "col", class: c.cls, "aria-sort": c === column ? (sorting.down ? "descending" : "ascending") : null }, h("button", { type: "button", "data-sort": c.key, onclick: () => { sorting = { key: c.key, down: sorting.key === c.key && !sorting.down }; trials(); document.querySelector(`[data-sort="${c.key}"]`).focus(); } }, c.name))));
  const body = order.map((r) => h("tr", { class: kinds(r, Boolean(finalLength)) + (finalLength ? " late" : ""), "data-row": r.number, tabindex: 0, onclick: () => select(r), onkeydown: (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); select(r); } } },
    columns.map((c) => h("td", { class: c.cls }, c.text ? c.text(r) : [r.words, r.reason ? h("em", {}, "failed: " + r.reason) : null]))));
  $("trials").replaceChildren(h("thead", {}, head), h("tbody", {}, body));
}

/* ---- how it was measured -------------------------------------------------------------------- */
function how() {
  const f = S.facts || {}, plan = f.plan || {}, m = f.machine || {}, model = f.model || {}, box = $("how");
  const list = (pairs) => h("dl", {}, pairs.filter((p) => p[1]).map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)]));
  box.append(h("h3", {}, "Quality"), h("p", {}, `Both the dense model and the changed one prefill the same context (${count(plan.context || 0)} tokens in trials), then read the ${plan.continuation || ""} tokens that follow it in the text, in chunks of ${plan.chunk || ""}, on the cache of that same request. KL is the mean over these tokens of KL(dense ‖ changed), in nats; last half is the mean over the second half of each window. There is no uncached shortcut: what a cache dropped or rounded is what the model reads.`));
  box.append(h("h3", {}, "Bytes"), h("p", {}, "Every live storage of the cache after the whole window, each counted once, allocated capacity included. Codes and scales count as they are; keys and values kept as they come count 2 bytes a number, so that a model run in float32 is compared with the bf16 cache it would be served with. Dense is that bf16 cache."));
  const timed = (anyFinal && anyFinal.final.seconds) || (measured.find((r) => r.measurement.seconds) || { measurement: {} }).measurement.seconds;
  if (timed) {
    const c = S.control, own = c ? ` Dense against itself, timed the same way: prefill ${c.prefill.ratio.median.toFixed(3)}× (${c.prefill.ratio.low.toFixed(2)} to ${c.prefill.ratio.high.toFixed(2)}), decode ${c.decode.ratio.median.toFixed(3)}× (${c.decode.ratio.low.toFixed(2)} to ${c.decode.ratio.high.toFixed(2)}). A difference smaller than that is noise.` : "";
    box.append(h("h3", {}, "Seconds"), h("p", {}, `${timed.repeats} interleaved pairs with dense, right after both sides had run: prefill of ${count(timed.context)} tokens and ${timed.steps} single-token steps each; the ratio is the median over pairs, the range is the lowest and highest pair.${own}`));
  }
  box.append(h("h3", {}, "Windows"), h("p", {}, `The text's ${count(f.tokens || 0)} tokens are cut in three: one part to fit on, one to choose on (${plan.windows || ""} disjoint windows), one to measure a few again on (${plan.final_windows || ""} disjoint windows of ${count(plan.final_length || 0)} tokens). No figure comes from text a recipe was fitted to. Mechanisms that drop tokens lose less in short trials than in long texts, so the best row of every combination that meets the constraints is measured again, and the choice is made there: the chosen recipe is on the front of what was measured at that length. Its figures are those it was chosen by, among ${rows.filter((r) => r.final).length}; dense, which all are compared with, is on that front without a measurement of its own.`));
  const versions = Object.entries(m.versions || {}).filter((v) => v[1]).map(([k, v]) => `${k} ${v}`).join(", ");
  const bad = Object.entries(f.failed_finals || {}).map(([k, v]) => `trial ${k}: ${v}`).join("; ");
  box.append(h("h3", {}, "Facts"), list([
    ["Model", model.name && `${model.name.split("/").pop()} (${model.class}, ${(model.parameters / 1e6).toFixed(1)} M parameters, ${model.dtype}, digest ${model.digest})`],
    ["Text", f.text && `${count(f.tokens || 0)} tokens, digest ${f.text}`],
    ["Machine", m.processor && `${m.processor}, ${m.cores} cores, ${m.threads} threads, on ${m.device}`],
    ["System", m.system && `${m.system}, Python ${m.python}`], ["Versions", versions], ["Commit", m.commit], ["Seed", plan.seed !== undefined && String(plan.seed)],
    ["Objectives", S.objectives.join(", ")], ["Compared in", criteria.length > S.objectives.length && criteria.join(", ")], ["Could not be measured again", bad],
    ["Trial time", measured.length && `${Math.round(rows.reduce((t, r) => t + r.seconds, 0))} s for ${rows.length} trials`],
  ]));
}

/* ---- what was not tried ---------------------------------------------------------------------- */
function refused() {
  const f = S.facts || {}, alone = Object.entries(f.left_out || {}), pairs = f.refused_pairs || [], draws = f.refused_draws || [], box = $("refused");
  const group = (name, items) => (items.length ? [h("h3", {}, name), h("dl", { class: "reasons" }, items.map(([what, why]) => [h("dt", {}, what), h("dd", {}, why)]))] : null);
  const parts = [
    group("Left out: cannot stand on this model", alone),
    group("Not tried together: two that cannot stand on one model", pairs.map((p) => [p.mechanisms.join(" + "), p.reason])),
    group("Drawn and refused before they were measured; no trial was spent", draws.map((d) => [d.words, d.reason])),
  ].filter(Boolean);
  const total = [[alone.length, "left out"], [pairs.length, pairs.length === 1 ? "pair refused" : "pairs refused"], [draws.length, draws.length === 1 ? "draw refused" : "draws refused"]];
  if (!parts.length) { box.parentElement.hidden = true; return; }
  box.append(h("details", {}, h("summary", {}, total.filter((t) => t[0]).map((t) => t.join(" ")).join(", ")), parts));
}

/* ---- putting it together -------------------------------------------------------------------- */
function select(r) {
  selected = r;
  history.replaceState(null, "", `#trial-${r.number}`);
  chart(); detail(); picture();
  for (const row of document.querySelectorAll("#trials tbody tr")) row.classList.toggle("selected", +row.dataset.row === r.number);
}
function start() {
  const known = Object.keys(S.scores).filter((n) => measured.some((r) => r.scores[n] !== undefined) || rows.some((r) => r.final_scores[n] !== undefined));
  const pick = { "axis-y": S.objectives[0], "axis-x": S.objectives[1] || "bytes" };
  for (const [id, first] of Object.entries(pick)) {
    $(id).append(...known.map((n) => h("option", { value: n, selected: n === first }, NAMES[n] || n)));
    $(id).addEventListener("change", chart);
  }
  $("show-final").addEventListener("change", chart);
  if (!finalLength) $("show-final").parentElement.hidden = true;
  const asked = /^#trial-(\d+)$/.exec(location.hash);
  if (asked && byNumber.has(+asked[1])) selected = byNumber.get(+asked[1]);
  headline(); verdict(); chart(); detail(); picture(); trials(); refused(); how();
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; chart(); picture(); } });
}
start();
