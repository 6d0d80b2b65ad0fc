// The browser of features and neurons: a list to search and sort, and a view of one unit.
{
const { index, listedOf, detailsOf } = blocks;
const { words, edges } = index;
const find = selector => document.querySelector(".browser " + selector);
const finder = find(".finder"), list = find(".list"), rows = find(".rows"), view = find(".unit");
const [search, key, live] = [find("[type=search]"), find("select"), find(".live input")];
const ROW = 54; // pixels of a row, as in browser.css
const ORDERS = { // name -> the number of a unit, none if its kind has no such number
  "token score": listed => listed.score?.values,
  density: listed => listed.fired.values,
  "maximum strength": listed => listed.maximum.values,
  "mean strength": listed => listed.mean.values,
  "sharpness of effect": listed => listed.sharpness?.values,
  id: listed => listed.fired.values.map((_, unit) => unit),
};
const kinds = new Map(index.kinds.map(kind => [kind.kind, kind]));
let kind, unit = null, order = [], matches = null, wanted = "token score", down = true, asked = 0;

// ---- making elements; text only ever becomes text ----

function make(tag, { tip, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  if (tip) element.dataset.tip = tip;
  element.append(...children);
  return element;
}
const bare = word => word.trim() ? word : word.replaceAll(" ", "␣");
const piece = number => make("bdi", {}, words[number]); // its script turns no neighbour round
const chip = number => make("bdi", { className: "chip" }, bare(words[number]));
const chips = (numbers, most = 99) =>
  [...new Set(numbers)].filter(Boolean).slice(0, most).map(chip);
const link = (kind, unit) => `#${kind.kind}-${unit}`;
const digits = value => Number(value.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 });
const percent = share => share < 1e-5 && share > 0 ? "<0.001 %" : `${digits(Number((100 * share).toPrecision(2)))} %`;
const capital = word => word[0].toUpperCase() + word.slice(1);

// ---- the list ----

// For a unit the tokens that hold what is typed, or are it if it is in quotes: those that it fires
// on and those that it promotes. Null while nothing is typed.
function matcher(listed) {
  const typed = search.value.trimEnd().toLowerCase();
  if (!typed) return null;
  if (/^#\d+$/.test(typed)) return () => [[], []];
  const whole = /^"(.+)"$/.exec(typed)?.[1];
  const hit = words.map(word => whole ? word.trim().toLowerCase() === whole.trim()
                                      : word.toLowerCase().includes(typed));
  const hits = (unit, ...fields) => fields.flatMap(field => field ? [...field.of(unit)].filter(n => hit[n]) : []);
  return unit => [hits(unit, listed.reading, listed.peaks), hits(unit, listed.promoted)];
}

async function refill() {
  const mine = ++asked, listed = await listedOf(kind);
  if (mine !== asked) return;
  const values = ORDERS[key.value](listed);
  matches = matcher(listed);
  const fired = listed.fired.values, sign = down ? -1 : 1;
  const id = Number(/^#?(\d+)$/.exec(search.value.trim())?.[1] ?? NaN);
  order = [];
  const place = new Uint8Array(kind.units); // the id that is asked for, units that fire on it, the rest
  for (let unit = 0; unit < kind.units; unit++) {
    if (unit === id) order.push(unit);
    if (unit === id || live.checked && !fired[unit]) continue;
    const [fires, promotes] = matches?.(unit) ?? [[0], []];
    place[unit] = fires.length ? 1 : 2;
    if (fires.length || promotes.length) order.push(unit);
  }
  // units without a number stay last in both directions
  order.sort((a, b) => place[a] - place[b] || Number.isNaN(values[a]) - Number.isNaN(values[b])
    || sign * (values[a] - values[b]) || a - b);
  const some = order.length === kind.units ? "all" : order.length.toLocaleString("en") + " of";
  find(".count").replaceChildren(
    make("span", {}, `${some} ${kind.units.toLocaleString("en")} ${kind.kind}s`),
    make("span", {}, `${listed.score ? "score, " : ""}density · max`));
  find(".direction").textContent = down ? "↓" : "↑";
  rows.style.height = `${order.length * ROW}px`;
  list.scrollTop = 0;
  draw(listed);
}

function draw(listed) {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 6);
  const last = first + Math.ceil(list.clientHeight / ROW) + 12;
  rows.replaceChildren(...order.slice(first, last).map((unit, i) => row(listed, unit, first + i)));
}

function row(listed, id, place) {
  const score = listed.score?.values[id];
  const preview = [...listed.preview.of(id)];
  const peak = index.before - index.preview;
  const text = make("span", { className: "line" },
    ...preview.slice(0, peak).map(piece),
    make("b", {}, piece(preview[peak])),
    ...preview.slice(peak + 1).map(piece));
  const main = listed.reading?.of(id)[0] ? listed.reading : listed.peaks;
  const fired = listed.fired.values[id];
  const [fires, promotes] = matches?.(id) ?? [[], []];
  const tokens = chips([...fires, ...main.of(id)], 4);
  tokens.slice(0, new Set(fires).size).forEach(chip => chip.classList.add("hit"));
  if (!fires.length && promotes.length) {
    const [first] = chips(promotes, 1);
    first.classList.add("hit");
    tokens.unshift("promotes ", first);
  }
  const element = make("a", { className: "row", href: link(kind, id), tabIndex: -1 },
    make("span", { className: "id" }, String(id)),
    make("span", { className: "line" }, ...tokens),
    make("span", { className: "number" }, score === undefined ? "" : Number.isNaN(score) ? "–" : score.toFixed(2)),
    text,
    make("span", { className: "number" }, `${percent(fired / kind.tokens)} · ${digits(listed.maximum.values[id])}`));
  if (id === unit) element.setAttribute("aria-current", "true");
  element.style.top = `${place * ROW}px`;
  return element;
}

async function redraw() {
  draw(await listedOf(kind));
}

// Bring the open unit's row into the list's window.
async function reveal() {
  const place = order.indexOf(unit);
  if (place >= 0) {
    const top = place * ROW, room = list.clientHeight - ROW;
    list.scrollTop = Math.min(Math.max(list.scrollTop, top - room), top);
  }
  await redraw();
}

// ---- one unit ----

async function open(id) {
  const [mine, own] = [unit = id, kind];
  const [listed, details] = await Promise.all([listedOf(kind), detailsOf(kind, id)]);
  if (mine !== unit || own !== kind) return;
  const side = make("aside", {}, histogram(details.histogram), ...effect(listed, id),
    ...related("Nearest directions", details.neighbours, details.neighbours_likeness, listed,
      "cosine of decoder rows"),
    ...related("Fire together", details.partners, details.partners_likeness, listed,
      "tokens on which both fire / on which either does"));
  view.replaceChildren(heading(listed, id), make("div", { className: "columns" },
    make("div", { className: "examples" }, ...examples(listed, id, details)), side));
  view.scrollTop = 0;
  document.title = `${capital(kind.kind)} ${id}`;
}

function heading(listed, id) {
  const fired = listed.fired.values[id], score = listed.score?.values[id];
  const facts = { "fires on": `${percent(fired / kind.tokens)} of ${kind.tokens.toLocaleString("en")} tokens` };
  if (fired) facts.mean = digits(listed.mean.values[id]);
  if (fired) facts.maximum = digits(listed.maximum.values[id]);
  const said = make("dl", { className: "facts" });
  const add = (name, ...value) => said.append(make("div", {}, make("dt", {}, name), make("dd", {}, ...value)));
  Object.entries(facts).forEach(([name, value]) => add(name, value));
  const tokens = listed.reading ? chips(listed.reading.of(id)) : [];
  if (tokens.length) {
    const where = listed.previous.values[id] ? "best predicted by the token before" : "best predicted by the token";
    add(where, ...tokens, Number.isNaN(score) ? "" : ` score ${score.toFixed(2)}`);
  }
  const walks = [["‹", -1, "previous (k)"], ["›", 1, "next (j)"]].map(([sign, step, title]) =>
    make("button", { title, onclick: () => walk(step) }, sign));
  return make("header", {},
    make("a", { className: "back", href: `#${kind.kind}s` }, "‹ all"),
    make("h2", {}, `${capital(kind.kind)} ${id}`), make("span", { className: "walk" }, ...walks), said);
}

function examples(listed, id, { tokens, strengths }) {
  const { window: width, before, levels } = index, unit = listed.maximum.values[id] / levels;
  const texts = [[], []];
  for (let at = 0, n = 0; at < tokens.length; at += width, n++) {
    if (!tokens[at + before]) continue;
    const parts = [[0, before], [before, before + 1], [before + 1, width]].map(([from, to]) => {
      const part = make("span", { className: from === before ? "peak" : "" });
      for (let i = at + from; i < at + to; i++) {
        const word = words[tokens[i]];
        if (!strengths[i]) { part.append(piece(tokens[i])); continue; }
        const tip = `\u2066${word}\u2069  ${digits(strengths[i] * unit)}`; // isolated
        const token = make("bdi", { className: "t", tip }, word);
        token.style.setProperty("--s", (strengths[i] / levels).toFixed(2));
        part.append(token);
      }
      return part;
    });
    const strength = make("span", { className: "strength" }, digits(strengths[at + before] * unit));
    texts[Number(n >= kind.strongest)].push(
      make("li", {}, strength, make("span", { className: "words" }, ...parts)));
  }
  if (!texts[0].length) return [make("p", { className: "note" }, "It fires on none of the tokens that were read.")];
  return [["Strongest", texts[0]], ["From all over its range", texts[1]]]
    .filter(([, items]) => items.length)
    .map(([title, items]) => make("section", {}, make("h3", {}, title), make("ol", {}, ...items)));
}

function histogram(counts) {
  const first = counts.findIndex(Boolean), last = counts.length - [...counts].reverse().findIndex(Boolean);
  if (first < 0) return "";
  const [width, height, most] = [300, 90, Math.max(...counts)];
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height + 16}`, role: "img", "aria-label": "histogram of strengths" });
  // a few bins are not stretched over the whole width
  const bins = Math.max(last - first, 10), step = width / bins;
  for (let i = first; i < last; i++) {
    const bar = Math.max(counts[i] ? 1 : 0, counts[i] / most * height), x = (i - first) * step;
    picture.append(svg("rect", { x: x + .5, y: height - bar, width: step - 1, height: bar, class: "bar" }));
    const whole = svg("rect", { x, y: 0, width: step, height, class: "reach" });
    whole.dataset.tip = `${digits(edges[i])} to ${digits(edges[i + 1])}: ${counts[i].toLocaleString("en")} tokens`;
    picture.append(whole);
  }
  picture.append(svg("line", { x1: 0, x2: width, y1: height, y2: height }));
  const every = Math.ceil(bins / 12) * 2; // edges are half octaves: label whole ones
  let end = -Infinity; // of the label before
  for (let i = first + first % 2; i <= first + bins && i < edges.length; i += every) {
    const x = (i - first) * step, anchor = x < 10 ? "start" : x > width - 12 ? "end" : "middle";
    const text = digits(edges[i]), long = 6 * text.length;
    const from = x - long * { start: 0, middle: .5, end: 1 }[anchor];
    if (from < end + 4) continue;
    end = from + long;
    const label = svg("text", { x, y: height + 13, "text-anchor": anchor });
    label.textContent = text;
    picture.append(label);
  }
  return make("section", {}, make("h3", {}, "Strengths"), picture);
}

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
  return element;
}

function effect(listed, id) {
  return [["Makes likelier (estimated)", listed.promoted], ["Makes less likely (estimated)", listed.suppressed]]
    .filter(([, field]) => field)
    .map(([title, field]) => make("section", {}, make("h3", {}, title), make("p", {}, ...chips(field.of(id)))));
}

function related(title, units, likeness, listed, meaning) {
  const some = [...units ?? []].map((other, i) => [other, likeness[i] / 100]).filter(([other]) => other >= 0);
  if (!some.length) return [];
  const lines = some.map(([other, like]) => {
    const main = listed.reading?.of(other)[0] ? listed.reading : listed.peaks;
    return make("a", { href: link(kind, other) }, make("span", { className: "id" }, String(other)),
      make("span", { className: "number" }, like.toFixed(2)),
      make("span", { className: "line" }, ...chips(main.of(other), 4)));
  });
  return [make("section", { className: "related" }, make("h3", { title: meaning }, title), ...lines)];
}

// ---- going about ----

const isWide = () => matchMedia("(min-width: 901px)").matches;

function walk(step) {
  if (!order.length) return;
  const place = order.indexOf(unit);
  const next = order[place < 0 ? 0 : Math.min(Math.max(place + step, 0), order.length - 1)];
  history.replaceState(null, "", link(kind, next));
  open(next);
  reveal();
}

async function choose(name) {
  kind = kinds.get(name);
  const listed = await listedOf(kind);
  const names = Object.keys(ORDERS).filter(name => ORDERS[name](listed));
  key.replaceChildren(...names.map(name => make("option", {}, name)));
  key.value = names.includes(wanted) ? wanted : names[0];
  find(".kinds").replaceChildren(...kinds.size < 2 ? [] : [...kinds.values()].map(other => {
    const label = `${capital(other.kind)}s ${other.units.toLocaleString("en")}`;
    const button = make("a", { className: "kind", href: `#${other.kind}s` }, label);
    if (other === kind) button.setAttribute("aria-current", "true");
    return button;
  }));
  await refill();
}

// What the address says: #feature-87, #neurons, or a part of the report.
async function go() {
  const [, name, id] = /^#(\w+?)(?:s|-(\d+))$/.exec(location.hash) ?? [];
  const part = document.getElementById(location.hash.slice(1));
  const browsing = !part?.matches(".part");
  document.body.classList.toggle("browsing", browsing);
  document.querySelectorAll("nav.parts a").forEach((anchor, i) =>
    anchor.toggleAttribute("aria-current", browsing ? i === 0 : anchor.hash === location.hash));
  if (!browsing) { part.scrollIntoView(); return; }
  const wanted = kinds.has(name) ? name : index.kinds[0].kind;
  if (kind?.kind !== wanted) { unit = null; await choose(wanted); }
  const known = id !== undefined && Number(id) < kind.units;
  finder.parentElement.classList.toggle("opened", known);
  if (known) open(Number(id));
  else if (order.length) open(unit ?? order[0]);
  if (known || isWide()) reveal(); else redraw();
}

async function changed() {
  await refill();
  if (isWide() && order.length && !order.includes(unit)) walk(0);
}

search.addEventListener("input", changed);
live.addEventListener("change", changed);
key.addEventListener("change", () => { wanted = key.value; down = wanted !== "id"; changed(); });
find(".direction").addEventListener("click", () => { down = !down; changed(); });
list.addEventListener("scroll", redraw, { passive: true });
addEventListener("resize", redraw);
addEventListener("hashchange", go);
addEventListener("keydown", event => {
  const typing = event.target === search;
  if (!document.body.classList.contains("browsing") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("select, [type=checkbox]")) return;
  if (!typing && event.key === "/") { search.focus(); event.preventDefault(); return; }
  const step = { ArrowDown: 1, ArrowUp: -1, ...typing ? {} : { j: 1, k: -1 } }[event.key];
  if (step) { walk(step); event.preventDefault(); }
});

if (typeof DecompressionStream === "undefined") {
  view.append(make("p", { className: "note" }, "The list needs a browser of 2023 or later."));
  document.body.classList.add("browsing");
} else go();
}
