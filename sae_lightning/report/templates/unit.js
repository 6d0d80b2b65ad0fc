// The view of one unit (a feature or a neuron): its numbers, examples, histogram and relations.
const units = (() => {
const { index, loadFields, loadDetails, loadText } = blocks;
const { vocabulary, edges } = index;
const COPIES_TIP = "copies: features whose decoder rows have a cosine above 0.9, listed as one entry";
const WIDE = 128; // tokens on each side of the peak in a widened example

// ---- making elements; text is never parsed as HTML ----

function make(tag, { tip, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  if (tip) element.dataset.tip = tip;
  element.append(...children);
  return element;
}
const showSpaces = token => token.trim() ? token : token.replaceAll(" ", "␣");
const makeToken = id => make("bdi", {}, vocabulary[id]); // a right-to-left token reorders no neighbour
const makeChip = id => make("bdi", { className: "chip" }, showSpaces(vocabulary[id]));
const makeChips = (ids, most = 99) =>
  [...new Set(ids)].filter(Boolean).slice(0, most).map(makeChip);
const makeLink = (kind, unit) => `#${kind.kind}-${unit}`;
const formatNumber = value => Number(value.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 });
const formatShare = share => share < 1e-5 && share > 0 ? "<0.001 %" : `${formatNumber(Number((100 * share).toPrecision(2)))} %`;
const capitalise = word => word[0].toUpperCase() + word.slice(1);

// ---- one unit ----

// Makes the elements that show a unit; `walk(step)` goes to the next or the previous unit of the list.
async function makeView(kind, id, walk) {
  const [details, text] = await Promise.all([loadDetails(kind, id), loadText()]);
  const others = [...details.neighbours ?? [], ...details.partners ?? []].filter(other => other >= 0);
  const fields = await loadFields(kind, [id, ...others]);
  const maximum = fields.maximum.values[id];
  const side = make("aside", {}, drawHistogram(kind, details.histogram, maximum), ...listEffects(fields, id),
    ...listRelated("Most similar directions", kind, details.neighbours, details.neighbours_similarity, fields,
      "cosine similarity of decoder rows"),
    ...listRelated("Often fires together with", kind, details.partners, details.partners_similarity, fields,
      "Jaccard index: tokens on which both fire / tokens on which either fires"));
  return [makeHeader(kind, fields, id, walk), make("div", { className: "columns" },
    make("div", { className: "examples" }, ...listExamples(kind, maximum, details, text.tokens)), side)];
}

// Returns a map from each original to its copies.
function findCopies(fields) {
  if (!fields.copiesOf) {
    fields.copiesOf = new Map();
    fields.copy_of?.values.forEach((original, unit) => {
      if (original === unit) return;
      if (!fields.copiesOf.has(original)) fields.copiesOf.set(original, []);
      fields.copiesOf.get(original).push(unit);
    });
  }
  return fields.copiesOf;
}

function makeHeader(kind, fields, id, walk) {
  const count = fields.firing_counts.values[id], score = fields.score?.values[id];
  const facts = { "fires on": `${formatShare(count / kind.tokens)} of ${kind.tokens.toLocaleString("en")} tokens` };
  if (count) facts["mean when active"] = formatNumber(fields.mean.values[id]);
  if (count) facts.maximum = formatNumber(fields.maximum.values[id]);
  const list = make("dl", { className: "facts" });
  const add = (name, ...value) => list.append(make("div", {}, make("dt", {}, name), make("dd", {}, ...value)));
  Object.entries(facts).forEach(([name, value]) => add(name, value));
  const tokens = fields.token_set ? makeChips(fields.token_set.of(id)) : [];
  if (tokens.length) {
    const name = fields.previous.of(id)[0] ? "best predicted by the previous token being one of" : "best predicted by the token being one of";
    add(name, ...tokens, Number.isNaN(score) ? "" : ` score ${score.toFixed(2)}`);
  }
  const original = fields.copy_of?.values[id] ?? id, copies = findCopies(fields).get(original) ?? [];
  const others = [original, ...copies].filter(other => other !== id);
  if (others.length) {
    add(others.length === 1 ? "1 copy" : `${others.length} copies`, ...others.map(other =>
      make("a", { className: "chip", href: makeLink(kind, other), title: COPIES_TIP }, String(other))));
  }
  const walks = [["‹", -1, "previous (k)"], ["›", 1, "next (j)"]].map(([sign, step, title]) =>
    make("button", { title, onclick: () => walk(step) }, sign));
  return make("header", {},
    make("a", { className: "back", href: `#${kind.kind}s` }, "‹ all"),
    make("h2", {}, `${capitalise(kind.kind)} ${id}`), make("span", { className: "walk" }, ...walks), list);
}

// Makes a section of the strongest examples, then one of random examples from each interval of strengths.
function listExamples(kind, maximum, { sequence, position, interval, levels }, text) {
  const { window: width, before, intervals } = index;
  const sections = [["Strongest examples", ""]], items = [[]];
  for (let i = 0; i < intervals; i++) { sections.push(describeInterval(i, maximum)); items.push([]); }
  for (let n = 0; n < sequence.length; n++) {
    const windowLevels = levels.subarray(n * width, (n + 1) * width);
    if (!windowLevels[before]) continue;
    const section = n < kind.top_examples ? 0 : 1 + interval[n - kind.top_examples];
    items[section].push(makeExample(text.of(sequence[n]), position[n], windowLevels, maximum));
  }
  if (!items[0].length) return [make("p", { className: "note" }, "It never fires in the text.")];
  return sections.flatMap(([title, bounds], i) => items[i].length ? [make("section", {},
    make("h3", {}, title, make("span", { className: "more" }, bounds)), make("ol", {}, ...items[i]))] : []);
}

// Returns the bounds of an interval of strengths, as shares of the maximum and as strengths; 0 is the top interval.
function describeInterval(i, maximum) {
  const low = 1 - (i + 1) / index.intervals, high = 1 - i / index.intervals;
  return [`${Math.round(100 * low)} to ${Math.round(100 * high)} % of the maximum`, `${formatNumber(low * maximum)} to ${formatNumber(high * maximum)}`];
}

// Makes the text around the peak of an example in the sequence `tokens`; a click widens or narrows it.
function makeExample(tokens, peak, windowLevels, maximum) {
  const { window: width, before } = index, first = peak - before;
  const shareOf = level => level / index.max_level;
  const text = make("span", { className: "words" });
  const fill = wide => {
    const from = Math.max(0, wide ? peak - WIDE : first);
    const end = Math.min(tokens.length, wide ? peak + WIDE : first + width);
    const elements = [];
    for (let i = from; i < end; i++) {
      const level = windowLevels[i - first], token = vocabulary[tokens[i]];
      if (!level) {
        const beyond = i < first || i >= first + width;
        elements.push(make("bdi", { className: beyond ? "beyond" : "" }, token));
        continue;
      }
      // the marks keep a right-to-left token from reordering the number
      const tip = `\u2066${token}\u2069  ${formatNumber(shareOf(level) * maximum)}`;
      const element = make("bdi", { className: i === peak ? "t peak" : "t", tip }, token);
      element.style.setProperty("--s", shareOf(level).toFixed(2));
      elements.push(element);
    }
    const title = wide ? "show less text" : "show more text; strengths are stored near the peak only";
    const more = make("button", { className: "wider", title, ariaExpanded: String(wide) }, wide ? "less" : "…");
    text.replaceChildren(...elements, more);
  };
  fill(false);
  const strength = make("span", { className: "strength" }, formatNumber(shareOf(windowLevels[before]) * maximum));
  let wide = false;
  const onclick = () => { if (getSelection().isCollapsed) fill(wide = !wide); };
  return make("li", { onclick }, strength, text);
}

function drawHistogram(kind, counts, maximum) {
  const first = counts.findIndex(Boolean), last = counts.findLastIndex(Boolean);
  if (first < 0) return "";
  const [width, top, base, most] = [300, 14, 104, Math.max(...counts)]; // bars are between y = top and y = base
  const picture = makeSvg("svg", { viewBox: `0 0 ${width} ${base + 46}`, role: "img",
    "aria-label": "histogram of tokens by strength, in half octaves" });
  const write = (text, x, y, anchor) => {
    const label = makeSvg("text", { x, y, "text-anchor": anchor });
    label.textContent = text;
    picture.append(label);
  };
  // bins are half an octave wide; at least ten, so that a few are not stretched
  const bins = Math.max(last + 1 - first, 10), step = width / bins;
  const findX = strength => Math.min(Math.max(2 * Math.log2(strength / edges[first]), 0), bins) * step;
  write(`number of tokens; highest bar: ${most.toLocaleString("en")}`, 0, 9, "start");
  for (let i = first; i <= last; i++) {
    const bar = Math.max(counts[i] ? 1 : 0, counts[i] / most * (base - top)), x = (i - first) * step;
    picture.append(makeSvg("rect", { x: x + .5, y: base - bar, width: step - 1, height: bar, class: "bar" }));
    const hoverArea = makeSvg("rect", { x, y: top, width: step, height: base - top, class: "reach" });
    hoverArea.dataset.tip = `${formatNumber(edges[i])} to ${formatNumber(edges[i + 1])}: ${counts[i].toLocaleString("en")} tokens`;
    picture.append(hoverArea);
  }
  // mark the strongest example, and the intervals that random examples are drawn from
  const peak = makeSvg("path", { d: `M${findX(maximum)} ${base - 1}l-4 -8h8z`, class: "strongest" });
  peak.dataset.tip = `strongest example: ${formatNumber(maximum)}`;
  picture.append(peak);
  for (let i = 0; i < index.intervals; i++) {
    const low = findX((1 - (i + 1) / index.intervals) * maximum), high = findX((1 - i / index.intervals) * maximum);
    const band = makeSvg("rect", { x: low, y: base + 1, width: Math.max(high - low, 0), height: 5, class: i % 2 ? "band" : "band odd" });
    band.dataset.tip = describeInterval(i, maximum).join(": ");
    picture.append(band);
  }
  picture.append(makeSvg("line", { x1: 0, x2: width, y1: base, y2: base }));
  const every = Math.ceil(bins / 12) * 2; // label whole octaves
  let end = -Infinity; // x at which the previous label ends
  for (let i = first + first % 2; i <= first + bins && i < edges.length; i += every) {
    const text = formatNumber(edges[i]), labelWidth = 6 * text.length, x = (i - first) * step;
    const anchor = x < labelWidth / 2 ? "start" : x > width - labelWidth / 2 ? "end" : "middle";
    const from = x - labelWidth * { start: 0, middle: .5, end: 1 }[anchor];
    if (from < end + 4) continue;
    end = from + labelWidth;
    write(text, x, base + 19, anchor);
  }
  write(`strength (activation of the ${kind.kind}), log scale`, width / 2, base + 34, "middle");
  const legend = make("p", { className: "note" }, "▼ strongest example; grey bands: the intervals of ",
    "strength that the other examples are from");
  return make("section", {}, make("h3", {}, "Distribution of strengths"), picture, legend);
}

function makeSvg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
  return element;
}

function listEffects(fields, id) {
  return [["Promotes (estimated)", fields.promoted], ["Suppresses (estimated)", fields.suppressed]]
    .filter(([, field]) => field)
    .map(([title, field]) => make("section", {}, make("h3", {}, title), make("p", {}, ...makeChips(field.of(id)))));
}

// Tokens that stand for a unit in lists: its token set or, without one, those at its peaks.
const pickTokens = (fields, id) => (fields.token_set?.of(id)[0] ? fields.token_set : fields.peaks).of(id);

function listRelated(title, kind, units, similarity, fields, meaning) {
  const pairs = [...units ?? []].map((other, i) => [other, similarity[i] / 100]).filter(([other]) => other >= 0);
  if (!pairs.length) return [];
  const lines = pairs.map(([other, value]) =>
    make("a", { href: makeLink(kind, other) }, make("span", { className: "id" }, String(other)),
      make("span", { className: "number" }, value.toFixed(2)),
      make("span", { className: "line" }, ...makeChips(pickTokens(fields, other), 4))));
  return [make("section", { className: "related" }, make("h3", { title: meaning }, title), ...lines)];
}

return { make, makeToken, makeChips, makeLink, formatNumber, formatShare, capitalise, findCopies, pickTokens, COPIES_TIP, makeView };
})();
