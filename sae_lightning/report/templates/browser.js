// The browser of features and neurons: a list to search and sort, and the view of one unit.
{
const { index, loadFields } = blocks, { vocabulary } = index;
const { make, makeToken, makeChips, makeLink, formatNumber, formatShare, capitalise, findCopies, pickTokens, COPIES_TIP } = units;
const find = selector => document.querySelector(".browser " + selector);
const finder = find(".finder"), list = find(".list"), rows = find(".rows"), view = find(".unit");
const [search, sortBy, hideSilent] = [find("[type=search]"), find("select"), find(".live input")];
const ROW = 54; // pixels of a row, as in browser.css
const ORDERS = { // name -> its meaning, and a function: fields -> values of all units, or undefined if there are none
  "most informative": ["well predicted by words that are rare in the text; the best feature of each such word comes first", fields => fields.informativeness?.values],
  "token score": ["how well a set of tokens predicts where it fires: 1 is perfectly, 0 is not at all", fields => fields.score?.values],
  density: ["share of tokens on which it fires", fields => fields.firing_counts.values],
  "maximum strength": ["strength of its strongest example", fields => fields.maximum.values],
  "mean strength": ["mean over the tokens on which it fires", fields => fields.mean.values],
  "sharpness of effect": ["excess kurtosis of what it adds to the logits: high if it promotes only a few tokens", fields => fields.sharpness?.values],
  id: ["index in the SAE", fields => fields.firing_counts.values.map((_, unit) => unit)],
};
const kinds = new Map(index.kinds.map(kind => [kind.kind, kind]));
let kind, openUnit = null, sortKey = "most informative", descending = true, requests = 0;
let listing = []; // ids of the units in the list, in order
let foldable = new Map(); // each original in the list -> its copies, which a button shows
let match = null; // what makeMatcher returned for the search
const unfolded = new Set(); // units whose copies are shown

// ---- the list ----

const isId = typed => /^#\d+$/.test(typed);

// Returns a function: unit -> [ids of matching tokens that it fires on, ids of those that it promotes]; null while
// nothing is typed. A search in quotes must match the whole token.
function makeMatcher(fields, typed) {
  if (!typed) return null;
  if (isId(typed)) return () => [[], []];
  const whole = /^"(.+)"$/.exec(typed)?.[1];
  const matches = vocabulary.map(token => whole ? token.trim().toLowerCase() === whole.trim()
                                                : token.toLowerCase().includes(typed));
  const pick = (unit, ...fields) => fields.flatMap(field => field ? [...field.of(unit)].filter(id => matches[id]) : []);
  return unit => [pick(unit, fields.token_set, fields.peaks), pick(unit, fields.promoted)];
}

// Finds, sorts and draws the units that match the search.
async function refill() {
  const request = ++requests, typed = search.value.trimEnd().toLowerCase();
  const fields = await loadFields(kind, typed && !isId(typed) ? Array(kind.units).keys() : []);
  if (request !== requests) return; // a newer one has started
  const [meaning, readValues] = ORDERS[sortBy.value], values = readValues(fields);
  match = makeMatcher(fields, typed);
  const counts = fields.firing_counts.values, sign = descending ? -1 : 1;
  const typedId = Number(/^#?(\d+)$/.exec(search.value.trim())?.[1] ?? NaN);
  const group = new Uint8Array(kind.units); // 0: not listed, 1: has the typed id, 2: fires on a match, 3: promotes a match
  // without a search, every unit is in group 2
  for (let unit = 0; unit < kind.units; unit++) {
    const [fires, promotes] = match?.(unit) ?? [[0], []];
    if (unit === typedId) group[unit] = 1;
    else if (hideSilent.checked && !counts[unit]) continue;
    else if (fires.length) group[unit] = 2;
    else if (promotes.length) group[unit] = 3;
  }
  // units without a value come last in both directions
  const sort = units => units.sort((a, b) => group[a] - group[b]
    || Number.isNaN(values[a]) - Number.isNaN(values[b]) || sign * (values[a] - values[b]) || a - b);
  const all = [...group.keys()].filter(unit => group[unit]);
  const listCopies = unit => (findCopies(fields).get(unit) ?? []).filter(copy => group[copy] && copy !== typedId);
  // a copy is listed under its original, unless the original is not listed
  const originalOf = unit => fields.copy_of?.values[unit] ?? unit;
  const entries = sort(all.filter(unit => unit === typedId || originalOf(unit) === unit || !group[originalOf(unit)]));
  foldable = new Map(entries.map(unit => [unit, listCopies(unit)]));
  listing = entries.flatMap(unit => unfolded.has(unit) ? [unit, ...sort(foldable.get(unit))] : unit);
  const matching = all.length === kind.units ? "" : all.length.toLocaleString("en") + " of ";
  const count = `${matching}${kind.units.toLocaleString("en")} ${kind.kind}s`;
  const fewer = all.length > entries.length ? `, ${entries.length.toLocaleString("en")} without copies` : "";
  find(".count").replaceChildren(
    make("span", { title: fewer && COPIES_TIP }, count + fewer),
    make("span", {}, `${fields.score ? "score, " : ""}density · max`));
  find(".direction").textContent = descending ? "↓" : "↑";
  find(".meaning").textContent = meaning;
  rows.style.height = `${listing.length * ROW}px`;
  list.scrollTop = 0;
  draw();
}

// Draws the rows that are in view, and a few above and below.
async function draw() {
  const all = listing, top = list.scrollTop, first = Math.max(0, Math.floor(top / ROW) - 6);
  const inView = all.slice(first, first + Math.ceil(list.clientHeight / ROW) + 12);
  const fields = await loadFields(kind, inView);
  if (all !== listing || top !== list.scrollTop) return; // a later call draws
  rows.replaceChildren(...inView.map((unit, i) => makeRow(fields, unit, first + i)));
}

function makeRow(fields, id, place) {
  const score = fields.score?.values[id], count = fields.firing_counts.values[id];
  const preview = [...fields.preview.of(id)];
  const peak = index.before - index.preview_start;
  const example = make("span", { className: "line" },
    ...preview.slice(0, peak).map(makeToken),
    make("b", {}, makeToken(preview[peak])),
    ...preview.slice(peak + 1).map(makeToken));
  const [fires, promotes] = match?.(id) ?? [[], []];
  const chips = makeChips([...fires, ...pickTokens(fields, id)], 4);
  chips.slice(0, new Set(fires).size).forEach(chip => chip.classList.add("hit"));
  if (!fires.length && promotes.length) {
    const [first] = makeChips(promotes, 1);
    first.classList.add("hit");
    chips.unshift("promotes ", first);
  }
  const copies = foldable.get(id)?.length;
  const fold = copies && make("button", { className: "alike", title: `${copies} ${copies === 1 ? "copy" : "copies"}; ${COPIES_TIP}`,
    ariaExpanded: String(unfolded.has(id)), onclick: event => toggleCopies(event, id) }, `+${copies}`);
  const className = foldable.has(id) ? "row" : "row copy";
  const element = make("a", { className, href: makeLink(kind, id), tabIndex: -1 },
    make("span", { className: "id" }, String(id), fold || ""),
    make("span", { className: "line" }, ...chips),
    make("span", { className: "number" }, score === undefined ? "" : Number.isNaN(score) ? "–" : score.toFixed(2)),
    example,
    make("span", { className: "number" }, `${formatShare(count / kind.tokens)} · ${formatNumber(fields.maximum.values[id])}`));
  if (id === openUnit) element.setAttribute("aria-current", "true");
  element.style.top = `${place * ROW}px`;
  return element;
}

// Scrolls the list to the row of the open unit.
async function reveal() {
  const place = listing.indexOf(openUnit);
  if (place >= 0) {
    const top = place * ROW, room = list.clientHeight - ROW;
    list.scrollTop = Math.min(Math.max(list.scrollTop, top - room), top);
  }
  await draw();
}

// Shows or hides a unit's copies in the list.
async function toggleCopies(event, id) {
  event.preventDefault(); // the row is a link
  if (!unfolded.delete(id)) unfolded.add(id);
  const top = list.scrollTop;
  await refill();
  list.scrollTop = top;
}

// ---- navigation ----

async function open(id) {
  const kindThen = kind;
  openUnit = id;
  const elements = await units.makeView(kind, id, walk);
  if (id !== openUnit || kind !== kindThen) return; // another unit was opened since
  view.replaceChildren(...elements);
  view.scrollTop = 0;
  document.title = `${capitalise(kind.kind)} ${id}`;
  dispatchEvent(new CustomEvent("unit", { detail: { kind: kind.kind, unit: id } }));
}

const isWide = () => matchMedia("(min-width: 901px)").matches;

// Opens the unit `step` places below the open one in the list, or the first one if the open one is not listed.
function walk(step) {
  if (!listing.length) return;
  const place = listing.indexOf(openUnit);
  const next = listing[place < 0 ? 0 : Math.min(Math.max(place + step, 0), listing.length - 1)];
  history.replaceState(null, "", makeLink(kind, next));
  open(next);
  reveal();
}

async function chooseKind(name) {
  [kind, listing] = [kinds.get(name), []];
  const fields = await loadFields(kind);
  const names = Object.keys(ORDERS).filter(name => ORDERS[name][1](fields));
  sortBy.replaceChildren(...names.map(name => make("option", {}, name)));
  sortBy.value = names.includes(sortKey) ? sortKey : names[0];
  find(".kinds").replaceChildren(...kinds.size < 2 ? [] : [...kinds.values()].map(other => {
    const label = `${capitalise(other.kind)}s ${other.units.toLocaleString("en")}`;
    const button = make("a", { className: "kind", href: `#${other.kind}s` }, label);
    if (other === kind) button.setAttribute("aria-current", "true");
    return button;
  }));
  await refill();
}

// Shows what the hash of the page's address names: #feature-87, #neurons, or a part of the report.
async function followAddress() {
  const [, name, id] = /^#(\w+?)(?:s|-(\d+))$/.exec(location.hash) ?? [];
  const part = document.getElementById(location.hash.slice(1));
  const browsing = !part?.matches(".part");
  document.body.classList.toggle("browsing", browsing);
  document.querySelectorAll("nav.parts a").forEach((anchor, i) =>
    anchor.toggleAttribute("aria-current", browsing ? i === 0 : anchor.hash === location.hash));
  if (!browsing) { part.scrollIntoView(); return; }
  const target = kinds.has(name) ? name : index.kinds[0].kind;
  if (kind?.kind !== target) { openUnit = null; await chooseKind(target); }
  const hasUnit = id !== undefined && Number(id) < kind.units;
  finder.parentElement.classList.toggle("opened", hasUnit);
  if (hasUnit) {
    open(Number(id));
    const original = (await loadFields(kind)).copy_of?.values[id];
    if (!listing.includes(Number(id)) && listing.includes(original)) { unfolded.add(original); await refill(); }
  }
  else if (listing.length) open(openUnit ?? listing[0]);
  if (hasUnit || isWide()) reveal(); else draw();
}

async function update() {
  await refill();
  if (isWide() && listing.length && !listing.includes(openUnit)) walk(0);
}

search.addEventListener("input", update);
hideSilent.addEventListener("change", update);
sortBy.addEventListener("change", () => { sortKey = sortBy.value; descending = sortKey !== "id"; update(); });
find(".direction").addEventListener("click", () => { descending = !descending; update(); });
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
