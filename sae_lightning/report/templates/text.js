// The user's own text: a click on a token lists its features; the open feature colours the text.
{
const { index, loadFields } = blocks, [kind] = index.kinds, { make, makeChips, formatNumber, makeLink, COPIES_TIP } = units;
const annotated = JSON.parse(document.getElementById("annotated").textContent);
const text = document.querySelector(".annotated .tokens"), elements = [...text.children]; // one per token
const heading = document.querySelector(".strongest h2"), results = document.querySelector(".results");
const note = document.querySelector(".annotated .note");
const MAX_FEATURES = 100; // features in the list
let chosen = null; // index of the chosen token
let open = null; // the feature that is open

// Returns [feature, strength] of each feature on a token, by descending strength * norm of its decoder row.
const listFirings = token => annotated.features[token].map((feature, i) => [feature, annotated.strengths[token][i]]);
const normalise = id => index.vocabulary[id].trim().toLowerCase();
const isolate = token => `\u2066${token}\u2069`; // a right-to-left token reorders no neighbour
const listPeakTokens = (fields, feature) => { // ids of up to four distinct tokens at its strongest peaks
  const peaks = [...fields.peaks.of(feature)].filter(Boolean);
  return peaks.filter((id, i) => i === peaks.findIndex(other => normalise(other) === normalise(id))).slice(0, 4);
};
const formatShareOfMaximum = (fields, feature, strength) => {
  const maximum = fields.maximum.values[feature];
  return maximum ? `${Math.round(100 * strength / maximum)} %` : "–";
};

// Merges copies into the first of them; returns [feature, strength, number of copies that fire too].
function mergeCopies(fields, firings) {
  const merged = new Map();
  for (const [feature, strength] of firings) {
    const original = fields.copy_of?.values[feature] ?? feature;
    if (merged.has(original)) merged.get(original)[2]++;
    else merged.set(original, [feature, strength, 0]);
  }
  return [...merged.values()];
}

// Lists the features of the chosen token or, if none is chosen, of the whole text.
async function listFeatures() {
  const token = chosen, firings = token === null ? annotated.ranked : listFirings(token);
  const merged = mergeCopies(await loadFields(kind), firings).slice(0, MAX_FEATURES);
  const fields = await loadFields(kind, merged.map(([feature]) => feature));
  if (token !== chosen) return; // a later call lists
  const title = chosen === null ? "Strongest in the text"
    : make("span", {}, `${firings.length} features on `, make("bdi", { className: "chip" }, annotated.tokens[chosen]));
  const back = make("button", { onclick: () => choose(null) }, "whole text");
  heading.replaceChildren(title, chosen === null ? make("small", { className: "number" }, "strength · share of maximum") : back);
  results.replaceChildren(...merged.map(([feature, strength, copies]) => {
    const chips = makeChips(listPeakTokens(fields, feature));
    if (copies) chips.push(make("span", { tip: COPIES_TIP }, `+${copies} ${copies === 1 ? "copy" : "copies"}`));
    const line = make("a", { href: makeLink(kind, feature) },
      make("span", { className: "id" }, String(feature)),
      make("span", { className: "line" }, ...chips),
      make("span", { className: "number" }, formatNumber(strength)),
      make("span", { className: "number" }, formatShareOfMaximum(fields, feature, strength)));
    line.toggleAttribute("aria-current", feature === open);
    return line;
  }));
  results.scrollTop = 0;
}

function choose(token) {
  chosen = token === chosen || !annotated.features[token]?.length ? null : token;
  elements.forEach((element, i) => element.classList.toggle("chosen", i === chosen));
  listFeatures();
}

async function colour(feature) {
  const fields = await loadFields(kind), maximum = fields.maximum.values[feature];
  let most = 0;
  open = feature;
  elements.forEach((element, i) => {
    const strength = annotated.strengths[i][annotated.features[i].indexOf(feature)] ?? 0;
    most = Math.max(most, strength);
    element.classList.toggle("t", strength > 0);
    // weak strengths stay visible
    element.style.setProperty("--s", Math.min(1, Math.max(.12, strength / maximum)).toFixed(2));
  });
  note.textContent = `Coloured by feature ${feature}, `
    + (most ? `up to ${formatNumber(most)} (${formatShareOfMaximum(fields, feature, most)} of its maximum in the catalogue). ` : "which does not fire here. ")
    + "Click a token to list the features that fire on it; the arrow keys move to the next one.";
  for (const line of results.children) line.toggleAttribute("aria-current", line.hash === makeLink(kind, feature));
}

// Sets the tooltip of a token: the open feature if it fires there, then the first features of the token.
async function setTip(token) {
  const fields = await loadFields(kind);
  const describe = ([feature, strength]) => `${feature}: ${formatNumber(strength)}, ${formatShareOfMaximum(fields, feature, strength)}  `
    + listPeakTokens(fields, feature).map(id => isolate(index.vocabulary[id].trim() || "␣")).join(" ");
  const merged = mergeCopies(fields, listFirings(token)), ofOpen = merged.filter(([feature]) => feature === open);
  const described = [...new Set([...ofOpen, ...merged.slice(0, 5)])];
  await loadFields(kind, described.map(([feature]) => feature));
  const isRead = !elements[token].classList.contains("unread");
  elements[token].dataset.tip = described.map(describe).join("\n") || (isRead ? "no feature fires" : "not read by the SAE");
}

text.addEventListener("click", event => {
  const token = elements.indexOf(event.target.closest("bdi"));
  if (token >= 0) choose(token);
});
text.addEventListener("pointerover", event => {
  const token = elements.indexOf(event.target.closest("bdi"));
  if (token >= 0) setTip(token);
});
text.addEventListener("keydown", event => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  let next = chosen ?? (step > 0 ? -1 : elements.length);
  do next += step; while (elements[next] && !annotated.features[next].length);
  if (elements[next]) choose(next);
  event.preventDefault();
});
addEventListener("unit", ({ detail }) => colour(detail.unit));
if (!location.hash && annotated.ranked.length) history.replaceState(null, "", makeLink(kind, annotated.ranked[0][0]));
listFeatures();
}
