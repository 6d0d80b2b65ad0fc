// The reader's own text: a click on a token lists its features; the open feature colours the text.
{
const { index, listedOf } = blocks, [kind] = index.kinds, { make, chips, digits, link, COPIES } = units;
const annotated = JSON.parse(document.getElementById("annotated").textContent);
const text = document.querySelector(".annotated .tokens"), tokens = [...text.children];
const heading = document.querySelector(".strongest h2"), results = document.querySelector(".results");
const note = document.querySelector(".annotated .note");
const MAX_FEATURES = 100; // features of a token
let chosen = null, open = null; // index of the chosen token; the feature that is open

// [feature, strength] of each feature on a token, by descending strength x norm of its decoder row
const featuresOn = token => annotated.features[token].map((feature, i) => [feature, annotated.strengths[token][i]]);
const bare = number => index.words[number].trim().toLowerCase();
const same = (a, b) => bare(a) === bare(b);
const isolated = word => `\u2066${word}\u2069`; // a right-to-left token reorders no neighbour
const wordsOf = (listed, feature) => { // distinct tokens of its strongest examples
  const peaks = [...listed.peaks.of(feature)].filter(Boolean);
  return peaks.filter((word, i) => i === peaks.findIndex(other => same(other, word))).slice(0, 4);
};
const shareOf = (listed, feature, strength) => {
  const maximum = listed.maximum.values[feature];
  return maximum ? `${Math.round(100 * strength / maximum)} %` : "–";
};

// Merge copies into the first of them -> [feature, strength, number of copies that fire too]
function mergeCopies(listed, features) {
  const merged = new Map();
  for (const [feature, strength] of features) {
    const original = listed.copy_of?.values[feature] ?? feature;
    if (merged.has(original)) merged.get(original)[2]++;
    else merged.set(original, [feature, strength, 0]);
  }
  return [...merged.values()];
}

async function list() {
  const token = chosen, features = token === null ? annotated.strongest : featuresOn(token);
  const merged = mergeCopies(await listedOf(kind), features).slice(0, MAX_FEATURES);
  const listed = await listedOf(kind, merged.map(([feature]) => feature));
  if (token !== chosen) return; // a later call lists
  const what = chosen === null ? "Strongest in the text"
    : make("span", {}, `${features.length} features on `, make("bdi", { className: "chip" }, annotated.shown[chosen]));
  const all = make("button", { onclick: () => choose(null) }, "whole text");
  heading.replaceChildren(what, chosen === null ? make("small", { className: "number" }, "strength · share of maximum") : all);
  results.replaceChildren(...merged.map(([feature, strength, copies]) => {
    const words = chips(wordsOf(listed, feature));
    if (copies) words.push(make("span", { tip: COPIES }, `+${copies} ${copies === 1 ? "copy" : "copies"}`));
    const line = make("a", { href: link(kind, feature) },
      make("span", { className: "id" }, String(feature)),
      make("span", { className: "line" }, ...words),
      make("span", { className: "number" }, digits(strength)),
      make("span", { className: "number" }, shareOf(listed, feature, strength)));
    line.toggleAttribute("aria-current", feature === open);
    return line;
  }));
  results.scrollTop = 0;
}

function choose(token) {
  chosen = token === chosen || !annotated.features[token]?.length ? null : token;
  tokens.forEach((element, i) => element.classList.toggle("chosen", i === chosen));
  list();
}

async function colour(feature) {
  const listed = await listedOf(kind), maximum = listed.maximum.values[feature];
  let most = 0;
  open = feature;
  tokens.forEach((element, i) => {
    const strength = annotated.strengths[i][annotated.features[i].indexOf(feature)] ?? 0;
    most = Math.max(most, strength);
    element.classList.toggle("t", strength > 0);
    // weak strengths stay visible
    element.style.setProperty("--s", Math.min(1, Math.max(.12, strength / maximum)).toFixed(2));
  });
  note.textContent = `Coloured by feature ${feature}, `
    + (most ? `up to ${digits(most)} (${shareOf(listed, feature, most)} of its maximum in the catalogue). ` : "which does not fire here. ")
    + "Click a token to list the features that fire on it; the arrow keys move to the next one.";
  for (const line of results.children) line.toggleAttribute("aria-current", line.hash === link(kind, feature));
}

async function setTip(token) {
  const listed = await listedOf(kind);
  const line = ([feature, strength]) => `${feature}: ${digits(strength)}, ${shareOf(listed, feature, strength)}  `
    + wordsOf(listed, feature).map(word => isolated(index.words[word].trim() || "␣")).join(" ");
  const fired = mergeCopies(listed, featuresOn(token)), here = fired.find(([feature]) => feature === open);
  const told = [...new Set([...here ? [here] : [], ...fired.slice(0, 5)])];
  await listedOf(kind, told.map(([feature]) => feature));
  const lines = told.map(line);
  tokens[token].dataset.tip = lines.length ? lines.join("\n") : "not read by the SAE";
}

text.addEventListener("click", event => {
  const token = tokens.indexOf(event.target.closest("bdi"));
  if (token >= 0) choose(token);
});
text.addEventListener("pointerover", event => {
  const token = tokens.indexOf(event.target.closest("bdi"));
  if (token >= 0) setTip(token);
});
text.addEventListener("keydown", event => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  let next = chosen ?? (step > 0 ? -1 : tokens.length);
  do next += step; while (tokens[next] && !annotated.features[next].length);
  if (tokens[next]) choose(next);
  event.preventDefault();
});
addEventListener("unit", ({ detail }) => colour(detail.unit));
if (!location.hash && annotated.strongest.length) history.replaceState(null, "", link(kind, annotated.strongest[0][0]));
list();
}
