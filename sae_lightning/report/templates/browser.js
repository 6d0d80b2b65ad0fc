// The browser of features and neurons: a list to search and sort, and the view of one unit.
{
const { index, listedOf } = blocks, { words } = index;
const { make, piece, chips, link, digits, percent, capital, copiesOf, COPIES } = units;
const find = selector => document.querySelector(".browser " + selector);
const finder = find(".finder"), list = find(".list"), rows = find(".rows"), view = find(".unit");
const [search, key, live] = [find("[type=search]"), find("select"), find(".live input")];
const ROW = 54; // pixels of a row, as in browser.css
const ORDERS = { // name -> its meaning, and the values of all units; undefined if this kind of unit has none
  "most informative": ["well predicted by words that are rare in the text; the best feature of each such word comes first", listed => listed.telling?.values],
  "token score": ["how well a set of tokens predicts where it fires: 1 is perfectly, 0 is not at all", listed => listed.score?.values],
  density: ["share of tokens on which it fires", listed => listed.fired.values],
  "maximum strength": ["strength of its strongest example", listed => listed.maximum.values],
  "mean strength": ["mean over the tokens on which it fires", listed => listed.mean.values],
  "sharpness of effect": ["excess kurtosis of what it adds to the logits: high if it promotes only a few tokens", listed => listed.sharpness?.values],
  id: ["index in the SAE", listed => listed.fired.values.map((_, unit) => unit)],
};
const kinds = new Map(index.kinds.map(kind => [kind.kind, kind]));
let kind, unit = null, order = [], folded = new Map(), matches = null, sortKey = "most informative", down = true, requests = 0;
const unfolded = new Set(); // units whose copies are listed too

// ---- the list ----

const isId = typed => /^#\d+$/.test(typed);

// Returns a function: unit -> [matching tokens it fires on, matching tokens it promotes]; null while
// nothing is typed. A search in quotes must match the whole token.
function matcher(listed, typed) {
  if (!typed) return null;
  if (isId(typed)) return () => [[], []];
  const whole = /^"(.+)"$/.exec(typed)?.[1];
  const hit = words.map(word => whole ? word.trim().toLowerCase() === whole.trim()
                                      : word.toLowerCase().includes(typed));
  const hits = (unit, ...fields) => fields.flatMap(field => field ? [...field.of(unit)].filter(n => hit[n]) : []);
  return unit => [hits(unit, listed.token_set, listed.peaks), hits(unit, listed.promoted)];
}

async function refill() {
  const request = ++requests, typed = search.value.trimEnd().toLowerCase();
  const listed = await listedOf(kind, typed && !isId(typed) ? Array(kind.units).keys() : []);
  if (request !== requests) return; // a newer one has started
  const [meaning, value] = ORDERS[key.value], values = value(listed);
  matches = matcher(listed, typed);
  const fired = listed.fired.values, sign = down ? -1 : 1;
  const id = Number(/^#?(\d+)$/.exec(search.value.trim())?.[1] ?? NaN);
  const place = new Uint8Array(kind.units); // 0: not listed, 1: has the typed id, 2: fires on a match, 3: promotes a match
  for (let unit = 0; unit < kind.units; unit++) {
    const [fires, promotes] = matches?.(unit) ?? [[0], []];
    if (unit === id) place[unit] = 1;
    else if (live.checked && !fired[unit]) continue;
    else if (fires.length) place[unit] = 2;
    else if (promotes.length) place[unit] = 3;
  }
  // units without a value come last in both directions
  const ranked = units => units.sort((a, b) => place[a] - place[b]
    || Number.isNaN(values[a]) - Number.isNaN(values[b]) || sign * (values[a] - values[b]) || a - b);
  const copies = unit => (copiesOf(listed).get(unit) ?? []).filter(copy => place[copy]);
  const all = [...place.keys()].filter(unit => place[unit]);
  // a copy is listed under its original, unless the original is not listed
  const original = unit => listed.copy_of?.values[unit] ?? unit;
  const entries = ranked(all.filter(unit => unit === id || original(unit) === unit || !place[original(unit)]));
  folded = new Map(entries.map(unit => [unit, copies(unit).filter(copy => copy !== id)]));
  order = entries.flatMap(unit => unfolded.has(unit) ? [unit, ...ranked(folded.get(unit))] : unit);
  const matching = all.length === kind.units ? "" : all.length.toLocaleString("en") + " of ";
  const count = `${matching}${kind.units.toLocaleString("en")} ${kind.kind}s`;
  const fewer = all.length > entries.length ? `, ${entries.length.toLocaleString("en")} without copies` : "";
  find(".count").replaceChildren(
    make("span", { title: fewer && COPIES }, count + fewer),
    make("span", {}, `${listed.score ? "score, " : ""}density · max`));
  find(".direction").textContent = down ? "↓" : "↑";
  find(".meaning").textContent = meaning;
  rows.style.height = `${order.length * ROW}px`;
  list.scrollTop = 0;
  draw();
}

async function draw() {
  const all = order, top = list.scrollTop, first = Math.max(0, Math.floor(top / ROW) - 6);
  const shown = all.slice(first, first + Math.ceil(list.clientHeight / ROW) + 12);
  const listed = await listedOf(kind, shown);
  if (all !== order || top !== list.scrollTop) return; // a later call draws
  rows.replaceChildren(...shown.map((unit, i) => row(listed, unit, first + i)));
}

function row(listed, id, place) {
  const score = listed.score?.values[id];
  const preview = [...listed.preview.of(id)];
  const peak = index.before - index.preview;
  const text = make("span", { className: "line" },
    ...preview.slice(0, peak).map(piece),
    make("b", {}, piece(preview[peak])),
    ...preview.slice(peak + 1).map(piece));
  const main = listed.token_set?.of(id)[0] ? listed.token_set : listed.peaks;
  const fired = listed.fired.values[id];
  const [fires, promotes] = matches?.(id) ?? [[], []];
  const tokens = chips([...fires, ...main.of(id)], 4);
  tokens.slice(0, new Set(fires).size).forEach(chip => chip.classList.add("hit"));
  if (!fires.length && promotes.length) {
    const [first] = chips(promotes, 1);
    first.classList.add("hit");
    tokens.unshift("promotes ", first);
  }
  const alike = folded.get(id)?.length;
  const more = alike && make("button", { className: "alike", title: `${alike} ${alike === 1 ? "copy" : "copies"}; ${COPIES}`,
    ariaExpanded: String(unfolded.has(id)), onclick: event => unfold(event, id) }, `+${alike}`);
  const className = folded.has(id) ? "row" : "row copy";
  const element = make("a", { className, href: link(kind, id), tabIndex: -1 },
    make("span", { className: "id" }, String(id), more || ""),
    make("span", { className: "line" }, ...tokens),
    make("span", { className: "number" }, score === undefined ? "" : Number.isNaN(score) ? "–" : score.toFixed(2)),
    text,
    make("span", { className: "number" }, `${percent(fired / kind.tokens)} · ${digits(listed.maximum.values[id])}`));
  if (id === unit) element.setAttribute("aria-current", "true");
  element.style.top = `${place * ROW}px`;
  return element;
}

// Scroll the list to the row of the open unit.
async function reveal() {
  const place = order.indexOf(unit);
  if (place >= 0) {
    const top = place * ROW, room = list.clientHeight - ROW;
    list.scrollTop = Math.min(Math.max(list.scrollTop, top - room), top);
  }
  await draw();
}

// Show or hide a unit's copies in the list.
async function unfold(event, id) {
  event.preventDefault(); // the row is a link
  unfolded.delete(id) || unfolded.add(id);
  const top = list.scrollTop;
  await refill();
  list.scrollTop = top;
}

// ---- navigation ----

async function open(id) {
  const [openUnit, openKind] = [unit = id, kind];
  const elements = await units.view(kind, id, walk);
  if (openUnit !== unit || openKind !== kind) return;
  view.replaceChildren(...elements);
  view.scrollTop = 0;
  document.title = `${capital(kind.kind)} ${id}`;
  dispatchEvent(new CustomEvent("unit", { detail: { kind: kind.kind, unit: id } }));
}

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
  [kind, order] = [kinds.get(name), []];
  const listed = await listedOf(kind);
  const names = Object.keys(ORDERS).filter(name => ORDERS[name][1](listed));
  key.replaceChildren(...names.map(name => make("option", {}, name)));
  key.value = names.includes(sortKey) ? sortKey : names[0];
  find(".kinds").replaceChildren(...kinds.size < 2 ? [] : [...kinds.values()].map(other => {
    const label = `${capital(other.kind)}s ${other.units.toLocaleString("en")}`;
    const button = make("a", { className: "kind", href: `#${other.kind}s` }, label);
    if (other === kind) button.setAttribute("aria-current", "true");
    return button;
  }));
  await refill();
}

// Show what the hash of the page's address names: #feature-87, #neurons, or a part of the report.
async function followAddress() {
  const [, name, id] = /^#(\w+?)(?:s|-(\d+))$/.exec(location.hash) ?? [];
  const part = document.getElementById(location.hash.slice(1));
  const browsing = !part?.matches(".part");
  document.body.classList.toggle("browsing", browsing);
  document.querySelectorAll("nav.parts a").forEach((anchor, i) =>
    anchor.toggleAttribute("aria-current", browsing ? i === 0 : anchor.hash === location.hash));
  if (!browsing) { part.scrollIntoView(); return; }
  const target = kinds.has(name) ? name : index.kinds[0].kind;
  if (kind?.kind !== target) { unit = null; await choose(target); }
  const hasUnit = id !== undefined && Number(id) < kind.units;
  finder.parentElement.classList.toggle("opened", hasUnit);
  if (hasUnit) {
    open(Number(id));
    const original = (await listedOf(kind)).copy_of?.values[id];
    if (!order.includes(Number(id)) && order.includes(original)) { unfolded.add(original); await refill(); }
  }
  else if (order.length) open(unit ?? order[0]);
  if (hasUnit || isWide()) reveal(); else draw();
}

async function update() {
  await refill();
  if (isWide() && order.length && !order.includes(unit)) walk(0);
}

search.addEventListener("input", update);
live.addEventListener("change", update);
key.addEventListener("change", () => { sortKey = key.value; down = sortKey !== "id"; update(); });
find(".direction").addEventListener("click", () => { down = !down; update(); });
list.addEventListener("scroll", draw, { passive: true });
addEventListener("resize", draw);
addEventListener("hashchange", followAddress);
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
} else followAddress();
}
